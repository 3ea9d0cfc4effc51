"""Truncation, hole punching and rewriting beneath PMD-mapped text.

What the reviewers of 2019 feared: that truncate() won't work properly. A process keeps the file
mapped as text while it shrinks, grows, gets holes and new contents; after each change the mapping
holds what the file holds, reading beyond the end is a SIGBUS from the very next page on, and when
the file is whole and read again from cold it is PMD-mapped again.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import pages
from tests.kernel.conftest import SLOW, Mapper, Mounted
from tests.kernel.pages import PAGE, PMD

ROUNDS = int(os.environ.get("LARGEFS_LAB_ROUNDS", "5" if SLOW > 1 else "10"))
BLOCKS = 3
SIZE = BLOCKS * PMD
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


class Oracle:
    """The file as it should be, changed in step with the real one."""

    def __init__(self, fd: int, rng: random.Random) -> None:
        self.fd = fd
        self.rng = rng
        self.data = bytearray()
        self.rewrite()

    def rewrite(self) -> str:
        self.data = bytearray(self.rng.randbytes(SIZE))
        assert os.pwrite(self.fd, self.data, 0) == SIZE
        return "rewrite all"

    def somewhere(self) -> int:
        """An offset: often on, or one byte beside, a boundary of a page or a block."""
        anywhere = self.rng.randrange(SIZE)
        unit = self.rng.choice([1, PAGE, PMD])
        return min(max(anywhere // unit * unit + self.rng.choice([-1, 0, 0, 1]), 0), SIZE)

    def span(self) -> tuple[int, int]:
        a, b = sorted((self.somewhere(), self.somewhere()))
        return a, max(b, a + 1)

    def truncate(self) -> str:
        size = self.somewhere()
        os.ftruncate(self.fd, size)
        self.data = self.data[:size] + bytes(max(size - len(self.data), 0))
        return f"truncate to {size}"

    def punch(self) -> str:
        start, end = self.span()
        if pages.fallocate(self.fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, start, end - start):
            return "punch: not possible"
        end = min(end, len(self.data))
        if start < end:
            self.data[start:end] = bytes(end - start)
        return f"punch {start}..{end}"

    def write(self) -> str:
        start, end = self.span()
        end = min(end, start + 3 * PAGE) if self.rng.random() < 0.5 else end
        if start > len(self.data):
            self.data += bytes(start - len(self.data))
        new = self.rng.randbytes(end - start)
        self.data[start:end] = new
        assert os.pwrite(self.fd, new, start) == len(new)
        return f"write {start}..{end}"

    def change(self) -> str:
        return self.rng.choice([self.truncate, self.punch, self.write])()


def check(mapper: Mapper, oracle: Oracle, path: Path, what: str) -> None:
    """The mapping, read() and the size are the oracle's; beyond the last page is SIGBUS."""
    size = len(oracle.data)
    assert os.fstat(oracle.fd).st_size == size, what
    inside = -(-size // PAGE)
    assert mapper.command("touch") == [inside, 0], what
    whole = bytes(oracle.data) + bytes(inside * PAGE - size)  # the rest of the last page is zero
    mapped = mapper.read(0, inside * PAGE) if inside else b""
    assert first_difference(mapped, whole) is None, f"{what}: mapping differs"
    assert first_difference(path.read_bytes(), bytes(oracle.data)) is None, f"{what}: read differs"


def first_difference(a: bytes, b: bytes) -> int | None:
    """Where two byte strings differ first; None when they are equal."""
    if a == b:
        return None
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))


def cold(mounted: Mounted, path: Path) -> None:
    """Make the file's pages clean and forget those that nobody maps."""
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.timeout(300 + 30 * ROUNDS * SLOW)
@pytest.mark.parametrize("sharing", ["private", "shared"])
@pytest.mark.parametrize("options", [(), ("--writeback",)], ids=["writethrough", "writeback"])
def test_changes_beneath_text(
    route: str,
    options: tuple[str, ...],
    sharing: str,
    passthrough: Callable[..., Mounted],
    mapper: Callable[..., Mapper],
) -> None:
    fs = passthrough("--opt-in", "--max-write", str(4 << 20), *options)
    path = fs.at / "text"
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o755)
    try:
        oracle = Oracle(fd, random.Random(seed))
        m = mapper(path, SIZE, sharing)
        for number in range(ROUNDS):
            what = f"seed {seed} round {number}"
            oracle.rewrite()
            m.command("drop")
            cold(fs, path)
            check(m, oracle, path, f"{what}: rewritten")
            if route == "folio":
                assert m.pmd_mapped() == SIZE, f"{what}: not re-formed: {pages.large_folios(path)}"
            else:
                assert m.pmd_mapped() == 0
            for _ in range(3):
                done = oracle.change()
                check(m, oracle, path, f"{what}: {done}")
    finally:
        os.close(fd)


def test_split(
    route: str, passthrough: Callable[..., Mounted], mapper: Callable[..., Mapper]
) -> None:
    """Truncation into a PMD-mapped folio splits it: what remains keeps its data, small."""
    if route != "folio":
        pytest.skip("nothing to split: this kernel makes no large folio here")
    fs = passthrough("--opt-in", "--max-write", str(4 << 20))
    data = os.urandom(2 * PMD)
    (fs.source / "text").write_bytes(data)
    path = fs.at / "text"
    m = mapper(path, 2 * PMD)
    m.command("touch")
    assert m.pmd_mapped() == 2 * PMD
    assert pages.large_folios(path) == [512, 512]
    splits = pages.vmstat("thp_split_page")

    os.truncate(path, PMD + 5 * PAGE + 100)
    assert m.command("touch") == [512 + 6, 0]
    assert m.pmd_mapped() == PMD
    assert m.read(PMD, 6 * PAGE) == data[PMD : PMD + 5 * PAGE + 100] + bytes(PAGE - 100)
    assert pages.large_folios(path)[0] == 512
    assert sum(pages.large_folios(path)[1:]) <= 6
    assert pages.vmstat("thp_split_page") > splits
