"""A program run from a mount that opted in has its text on 2 MiB pages: no hint from anyone."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel import pages
from tests.kernel.conftest import Mapper, Mounted
from tests.kernel.programs import BIGTEXT_BLOCKS, program

MIB = 1 << 20


@contextmanager
def running(path: Path) -> Iterator[int]:
    """Run the program until it has touched all its text; yields its process id."""
    process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout
        assert process.stdout.readline() == b"%d\n" % (BIGTEXT_BLOCKS * 512)
        yield process.pid
    finally:
        process.communicate()
        assert process.returncode == 0


def installed(fs: Mounted) -> Path:
    """Put the program into the mount's source, and make the caches cold."""
    shutil.copy(program("bigtext"), fs.source)
    pages.drop_caches()
    return fs.at / "bigtext"


def test_thp_is_not_forced() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    assert "[madvise]" in enabled, "these tests show what happens without a hint"


def test_no_hint(
    route: str,
    passthrough: Callable[..., Mounted],
    record_coverage: Callable[[str, pages.Coverage], None],
) -> None:
    fs = passthrough("--opt-in", "--max-write", str(4 * MIB))
    bigtext = installed(fs)
    with running(bigtext) as pid:
        first = pages.coverage(pid, bigtext)
    with running(bigtext) as pid:
        second = pages.coverage(pid, bigtext)
    record_coverage("no hint", first)
    assert first.touched >= BIGTEXT_BLOCKS * 2 * MIB
    if route == "folio":
        assert first.ratio >= 0.95
        assert second.ratio >= 0.95
    else:
        assert first.pmd_mapped == second.pmd_mapped == 0


def test_counters(route: str, passthrough: Callable[..., Mounted]) -> None:
    if route != "folio":
        with pytest.raises(KeyError):
            pages.vmstat("thp_file_exec_fault")
        return
    fs = passthrough("--opt-in", "--max-write", str(4 * MIB))
    bigtext = installed(fs)
    before = pages.vmstat("thp_file_exec_fault")
    with running(bigtext) as pid:
        blocks = pages.coverage(pid, bigtext).pmd_mapped // (2 * MIB)
    assert blocks >= BIGTEXT_BLOCKS
    assert pages.vmstat("thp_file_exec_fault") - before >= blocks


@pytest.mark.parametrize("max_write", [128 << 10, 1 * MIB, 2 * MIB])
def test_small_requests(route: str, max_write: int, passthrough: Callable[..., Mounted]) -> None:
    """A folio that one request cannot carry is not made; the program runs all the same."""
    fs = passthrough("--opt-in", "--max-write", str(max_write))
    bigtext = installed(fs)
    with running(bigtext) as pid:
        ratio = pages.coverage(pid, bigtext).ratio
    assert bigtext.read_bytes() == program("bigtext").read_bytes()
    assert max(pages.large_folios(bigtext), default=1) * 4096 <= max(max_write, 4096)
    if max_write < 2 * MIB or route != "folio":
        assert ratio == 0
    else:
        assert ratio >= 0.95


def test_not_opted_in(passthrough: Callable[..., Mounted]) -> None:
    fs = passthrough("--max-write", str(4 * MIB))
    bigtext = installed(fs)
    with running(bigtext) as pid:
        assert pages.coverage(pid, bigtext).pmd_mapped == 0
    assert pages.large_folios(bigtext) == []


def test_offered_flag(route: str, passthrough: Callable[..., Mounted]) -> None:
    """The kernel offers bit 62 at INIT if, and only if, it has the series."""
    offered = passthrough().offered
    assert bool(offered & (1 << 62)) == (route == "folio")


def test_last_partial_block(
    passthrough: Callable[..., Mounted], route: str, mapper: Callable[..., Mapper]
) -> None:
    """The file's last block, which it does not fill, stays small."""
    fs = passthrough("--opt-in", "--max-write", str(4 * MIB))
    (fs.source / "f").write_bytes(os.urandom(5 * MIB))
    pages.drop_caches()
    m = mapper(fs.at / "f", 6 * MIB)
    assert m.command("touch") == [5 * MIB // 4096, 0]
    assert m.pmd_mapped() == (4 * MIB if route == "folio" else 0)
    assert m.read(0, 5 * MIB) == (fs.source / "f").read_bytes()


@pytest.fixture
def no_huge_memory() -> Iterator[None]:
    """While this lasts, no allocation of a PMD's order succeeds."""
    inject = Path("/sys/kernel/debug/fail_page_alloc")
    if not inject.exists():
        pytest.skip("this kernel cannot inject failing allocations (FAIL_PAGE_ALLOC, debugfs)")
    settings = {
        "ignore-gfp-wait": "N",
        "ignore-gfp-highmem": "N",
        "min-order": "9",
        "verbose": "0",
        "times": "-1",
        "probability": "100",
    }
    for name, value in settings.items():
        (inject / name).write_text(value)
    try:
        yield
    finally:
        (inject / "probability").write_text("0")


def test_memory_short(
    route: str, no_huge_memory: None, passthrough: Callable[..., Mounted]
) -> None:
    """Without memory for a huge folio the fault falls back: the program runs in small pages."""
    fs = passthrough("--opt-in", "--max-write", str(4 * MIB))
    bigtext = installed(fs)
    before = pages.vmstat("thp_file_exec_fallback") if route == "folio" else 0
    with running(bigtext) as pid:
        assert pages.coverage(pid, bigtext).pmd_mapped == 0
    if route == "folio":
        assert pages.vmstat("thp_file_exec_fallback") > before
    assert bigtext.read_bytes() == program("bigtext").read_bytes()


def test_shared_by_processes(route: str, passthrough: Callable[..., Mounted]) -> None:
    """Two processes map the same folios: the second costs no page of its own."""
    fs = passthrough("--opt-in", "--max-write", str(4 * MIB))
    bigtext = installed(fs)
    with running(bigtext) as one, running(bigtext) as two:
        ratios = [pages.coverage(pid, bigtext).ratio for pid in (one, two)]
    folios = pages.large_folios(bigtext)
    if route == "folio":
        assert min(ratios) >= 0.95
        assert folios.count(512) >= BIGTEXT_BLOCKS
    else:
        assert ratios == [0, 0]
        assert folios == []
