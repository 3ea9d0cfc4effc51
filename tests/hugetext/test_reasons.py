"""Each reason that coverage gives for text in small pages, brought about by a real mapping."""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from largefs.hugetext import coverage, mappings, warm
from largefs.hugetext.coverage import Reason, Report, Text
from tests.hugetext.support import HERE, MIB, check_sums, drop, make_file, text_of, warmed
from tests.users import NOBODY, become

pytestmark = pytest.mark.resident


@pytest.mark.parametrize(
    ("offset", "length", "shift", "eligible", "why"),
    [
        (0, 4 * MIB, 0, 4 * MIB, {}),
        (0, MIB, 0, 0, {Reason.SMALL: MIB}),
        (0, 4 * MIB, 4096, 0, {Reason.NOT_CONGRUENT: 4 * MIB}),
        (4096, 4 * MIB, 0, 2 * MIB, {Reason.EDGE: 2 * MIB}),
        (MIB, 2 * MIB, 0, 0, {Reason.EDGE: 2 * MIB}),
        (0, 6 * MIB, 0, 4 * MIB, {Reason.END_OF_FILE: 2 * MIB}),
    ],
    ids=["none", "small", "not-congruent", "edge", "edges-only", "end-of-file"],
)
def test_ineligible(
    disk: Path,
    map_file: Callable[..., int],
    offset: int,
    length: int,
    shift: int,
    eligible: int,
    why: dict[Reason, int],
) -> None:
    path = warmed(make_file(disk / "file", 5 * MIB))
    text = text_of(map_file(path, offset, length, shift, "touch-first"), path)
    assert text.length == length
    assert text.eligible == eligible
    assert text.why == why
    assert text.touched == text.pmd_mapped == min(eligible, 2 * MIB)


@pytest.mark.parametrize(
    ("actions", "reason", "blocks"),
    [
        (("nohugepage", "touch"), Reason.DISABLED, 2),
        (("disable", "touch"), Reason.DISABLED, 2),
        (("touch", "write"), Reason.COPIED, 1),
        (("touch", "split"), Reason.MAPPED_SMALL, 1),
    ],
)
def test_in_2_mib_folios_but_mapped_small(
    disk: Path, map_file: Callable[..., int], actions: tuple[str, ...], reason: Reason, blocks: int
) -> None:
    path = warmed(make_file(disk / "file", 4 * MIB))
    text = text_of(map_file(path, 0, 4 * MIB, 0, *actions), path)
    assert text.touched == 4 * MIB
    assert text.pmd_mapped == (2 - blocks) * 2 * MIB
    assert text.why == {reason: blocks * 2 * MIB}


def test_small_folios(disk: Path, map_file: Callable[..., int]) -> None:
    path = make_file(disk / "file", 4 * MIB)
    text = text_of(map_file(path, 0, 4 * MIB, 0, "touch-first"), path)
    assert text.eligible == 4 * MIB
    assert text.touched == 2 * MIB
    assert text.why == {Reason.SMALL_FOLIOS: 2 * MIB}


@pytest.mark.parametrize(
    ("route", "reason"), [("none", Reason.NO_ROUTE), ("foreign", Reason.NO_LARGE_FOLIOS)]
)
def test_fuse_without_large_folios(
    disk: Path,
    serve: Callable[[Path, str], Path],
    map_file: Callable[..., int],
    route: str,
    reason: Reason,
) -> None:
    make_file(disk / "file", 4 * MIB)
    path = serve(disk, route) / "file"
    text = text_of(map_file(path, 0, 4 * MIB, 0, "hugepage", "touch"), path)
    if text.pmd_mapped:
        pytest.skip("this kernel's FUSE has large folios")
    assert text.touched == 4 * MIB
    assert text.why == {reason: 4 * MIB}


def test_fuse_passthrough(
    disk: Path, serve: Callable[[Path, str], Path], map_file: Callable[..., int]
) -> None:
    """The kernel shows path, device and inode of the FUSE file; its pages are the backing
    file's."""
    warmed(make_file(disk / "file", 4 * MIB))
    path = serve(disk, "passthrough") / "file"
    pid = map_file(path, 0, 4 * MIB, 0, "touch")
    text = text_of(pid, path)
    assert text.coverage == 1.0
    device = os.stat(path).st_dev
    assert device != os.stat(disk).st_dev
    report = coverage.collect([pid], lambda mapping: mapping.device == device)
    assert [m.mapping.path for m in report.processes[0].mapped] == [str(path)]


def test_deleted_file_counts_as_before(disk: Path, map_file: Callable[..., int]) -> None:
    path = warmed(make_file(disk / "file", 4 * MIB))
    pid = map_file(path, 0, 4 * MIB, 0, "touch")
    path.unlink()
    assert text_of(pid, path).coverage == 1.0


def test_other_mount_namespace(disk: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    """A file that exists only in the process's own mount namespace."""
    make_file(disk / "file", 4 * MIB)
    hidden = disk / "hidden"
    hidden.mkdir()
    script = f"mount --bind {disk} {hidden} && exec {sys.executable} {HERE}/map_file.py"
    inside = hidden / "file"
    child = start("unshare", "-m", "sh", "-c", f"{script} {inside} 0 {4 * MIB} 0 touch")
    report = coverage.collect([child.pid], lambda mapping: mapping.path.endswith("/file"))
    text = report.processes[0].text
    assert text.eligible == text.touched == 4 * MIB
    check_sums(text)


def collect_as_nobody(pid: int, prefix: str) -> Report:
    """coverage.collect() of one process by a user without any privilege."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            become(NOBODY)
            report = coverage.collect([pid], lambda mapping: mapping.path.startswith(prefix))
            os.write(writer, pickle.dumps(report))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as f:
        answer = f.read()
    assert os.waitpid(child, 0)[1] == 0
    return pickle.loads(answer)  # type: ignore[no-any-return]


def only_text(report: Report) -> Text:
    assert not report.skipped
    check_sums(report.processes[0].text)
    return report.processes[0].text


def test_without_privilege(disk: Path, map_file: Callable[..., int]) -> None:
    path = make_file(disk / "file", 4 * MIB)
    pid = map_file(path, 0, 4 * MIB, 0, "touch", "nobody")
    text = only_text(collect_as_nobody(pid, str(path)))
    assert text.touched == 4 * MIB
    assert text.why == {Reason.UNTOLD: 4 * MIB}
    disk.chmod(0o700)
    text = only_text(collect_as_nobody(pid, str(path)))
    assert text.touched == 0
    assert text.why == {Reason.SIZE_UNKNOWN: 4 * MIB}


def test_other_users_processes_are_skipped() -> None:
    report = collect_as_nobody(os.getpid(), "")
    assert not report.processes
    assert [skipped.pid for skipped in report.skipped] == [os.getpid()]


def test_vanished_process() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert coverage.collect([child.pid]) == Report([], [])


def test_kernel_threads_and_ourselves() -> None:
    report = coverage.collect(coverage.pids())
    assert os.getpid() in [process.pid for process in report.processes]
    for process in report.processes:
        check_sums(process.text)


def test_every_reason_is_tested_here() -> None:
    source = Path(__file__).read_text()
    assert [reason.name for reason in Reason if f"Reason.{reason.name}" not in source] == []


def test_drop_really_drops(disk: Path) -> None:
    """The premise of test_small_folios."""
    path = warmed(make_file(disk / "file", 4 * MIB))
    drop(path)
    assert warm.warm_file(path).already == 0


@pytest.mark.parametrize("actions", [("touch", "write"), ("touch-first",), ()])
def test_kernels_without_pagemap_scan(
    disk: Path, map_file: Callable[..., int], actions: tuple[str, ...]
) -> None:
    """Reading pagemap finds the same blocks as the ioctl, and leaves open which are PMD-mapped."""
    path = warmed(make_file(disk / "file", 6 * MIB))
    pid = map_file(path, 0, 6 * MIB, 0, *actions)
    [mapping] = [m for m in mappings.executable_mappings(pid) if m.path == str(path)]
    blocks = mapping.eligible_blocks(6 * MIB)
    pagemap = mappings.open_pagemap(pid)
    try:
        scanned = mappings.present_blocks(pagemap, blocks)
        read = mappings._read_pagemap(pagemap, blocks)
    finally:
        os.close(pagemap)
    assert [dataclasses.replace(block, pmd=None) for block in scanned] == read
