"""Every ELF file of real Debian packages: it stays the same program to readelf and pyelftools,
with the same bytes at all addresses; and the way back gives the same file.

The first run downloads about 900 MB; LARGEFS_PACKAGES=all takes more.
"""

from __future__ import annotations

import filecmp
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from elftools.elf.elffile import ELFFile

from largefs.hugetext.align import Mode, plan, restore
from largefs.hugetext.eligible import describe
from tests.elf.files import opened, write_sparse
from tests.elf.packages import PACKAGES, Unreachable, elf_files, find, unpacked

pytestmark = pytest.mark.timeout(1200)  # the first run downloads

PMD = 2 << 20


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is enough of it: each big file is written twice, and dropped."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shutil.disk_usage(shm).free < 2 << 30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm) as directory:
        yield Path(directory)


@pytest.mark.parametrize("names", PACKAGES)
def test_package(names: str, scratch: Path) -> None:
    try:
        tree = unpacked(find(names))
    except Unreachable as reason:
        pytest.skip(str(reason))
    files = list(elf_files(tree))
    assert files, "no ELF file in the package: take another"
    for path in files:
        check(path, scratch)


def check(path: Path, directory: Path) -> None:
    headers = None
    aligned, restored = directory / "aligned", directory / "restored"
    with opened(path) as view:
        for mode in (Mode.HEADERS, Mode.AUTO):
            p = plan(view, mode)
            assert p.reason
            assert p.before == describe(view).eligible <= p.after
            if not p.changed or (mode is Mode.AUTO and p == headers):
                continue
            headers = p
            write_sparse(view, p.layout, aligned)
            with opened(aligned) as after:
                assert describe(after).eligible == p.after
                write_sparse(after, restore(p.record()), restored)
            assert filecmp.cmp(path, restored, shallow=False), path
            assert len(p.record()) < 4096
            only_holes(path, aligned, len(p.layout.pieces))
            same_to_readelf(path, aligned)
            same_program(path, aligned)


def only_holes(old: Path, new: Path, pieces: int) -> None:
    """The disk holds a block more at either side of a hole, and the larger extent tree, at most."""
    used = os.stat(new).st_blocks * 512
    assert used <= -(-os.stat(old).st_size // 4096) * 4096 + pieces * 3 * 4096


def same_to_readelf(old: Path, new: Path) -> None:
    """All that readelf says of the headers is equal, its warnings too, once offsets are masked."""
    a, b = (
        subprocess.run(
            ["readelf", "--wide", "-h", "-S", "-l", "-d", "-n", "-V", path],
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        for path in (old, new)
    )
    assert masked(a.stdout) == masked(b.stdout)
    assert masked(a.stderr).replace(str(old), "") == masked(b.stderr).replace(str(new), "")


def masked(text: str) -> str:
    """What readelf prints, without file offsets, segments' alignments, and the name."""
    text = re.sub(r"(Start of \w+ headers:\s+)\d+", r"\1OFFSET", text)
    text = re.sub(
        r"(?m)^(  [A-Z_]+\s+)0x[0-9a-f]{6,}( 0x.*) 0x[0-9a-f]+$", r"\1OFFSET\2 ALIGN", text
    )
    text = re.sub(
        r"( [0-9a-f]{16}) [0-9a-f]{6,} (?=[0-9a-f]{6,} [0-9a-f]{2} )", r"\1 OFFSET ", text
    )
    text = re.sub(r"(?i)(offset:? )(0x)?[0-9a-f]+", r"\1OFFSET", text)
    return re.sub(r"(?m)^File: .*", "", text)


def same_program(old: Path, new: Path) -> None:
    """To pyelftools: headers equal but for offsets and p_align, bytes equal at all addresses."""
    with old.open("rb") as f, new.open("rb") as g, mapped(f) as before, mapped(g) as after:
        a, b = ELFFile(f), ELFFile(g)
        assert different(a.header, b.header) <= {"e_phoff", "e_shoff"}
        assert different(a.header["e_ident"], b.header["e_ident"]) == set()
        headers = a["e_phoff"] + a["e_phnum"] * a["e_phentsize"]
        for s, t in zip(a.iter_segments(), b.iter_segments(), strict=True):
            changed = different(s.header, t.header)
            assert changed <= (
                {"p_offset", "p_align"} if s["p_type"] == "PT_LOAD" else {"p_offset"}
            )
            if "p_align" in changed:
                assert t["p_align"] == PMD > s["p_align"]
            if s["p_type"] == "PT_LOAD" and s["p_filesz"]:
                assert (t["p_vaddr"] - t["p_offset"]) % max(t["p_align"], 4096) == 0
            skip = min(max(0, headers - s["p_offset"]), s["p_filesz"])
            low, high, length = s["p_offset"] + skip, t["p_offset"] + skip, s["p_filesz"] - skip
            assert before[low : low + length] == after[high : high + length]
        for c, d in zip(a.iter_sections(), b.iter_sections(), strict=True):
            assert c.name == d.name and different(c.header, d.header) <= {"sh_offset"}
            if c["sh_type"] not in ("SHT_NULL", "SHT_NOBITS"):
                low, high, length = c["sh_offset"], d["sh_offset"], c["sh_size"]
                assert before[low : low + length] == after[high : high + length]


def different(a: Any, b: Any) -> set[str]:
    assert a.keys() == b.keys()
    return {key for key in a.keys() if a[key] != b[key]}  # noqa: SIM118 - a Container has no iterator


def mapped(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
