"""A server's notifications about a file that is cached in PMD folios and mapped as text."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.conftest import Mapper, Mounted
from tests.kernel.pages import PAGE, PMD

SIZE = 2 * PMD + 3 * PAGE + 10


@pytest.fixture
def text(
    route: str, passthrough: Callable[..., Mounted], mapper: Callable[..., Mapper]
) -> tuple[Mounted, Path, Mapper, bytes]:
    fs = passthrough("--opt-in", "--max-write", str(4 << 20))
    data = os.urandom(SIZE)
    (fs.source / "text").write_bytes(data)
    m = mapper(fs.at / "text", SIZE)
    m.command("touch")
    assert m.pmd_mapped() == (2 * PMD if route == "folio" else 0)
    return fs, fs.at / "text", m, data


def behind(fs: Mounted, offset: int, new: bytes) -> None:
    """Change the file behind the kernel's back."""
    with (fs.source / "text").open("r+b") as f:
        os.pwrite(f.fileno(), new, offset)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0), (0, PMD), (PMD + PAGE, PAGE), (PMD - PAGE, 2 * PAGE), (7, 1)],
    ids=["all", "one block", "one page", "across blocks", "one byte"],
)
def test_invalidate(text: tuple[Mounted, Path, Mapper, bytes], offset: int, length: int) -> None:
    """FUSE_NOTIFY_INVAL_INODE: the range's pages are read again; nothing else is lost."""
    fs, path, m, data = text
    end = offset + length if length else SIZE
    first, last = offset // PAGE * PAGE, min(-(-end // PAGE) * PAGE, SIZE)
    new = os.urandom(last - first)
    behind(fs, first, new)
    assert m.read(first, last - first) == data[first:last], "cached until told"
    assert fs.command(f"inval text {offset} {length}") == 0
    expected = data[:first] + new + data[last:]
    assert m.command("touch") == [-(-SIZE // PAGE), 0]
    assert m.read(0, SIZE) == expected
    assert path.read_bytes() == expected


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, PAGE), (PMD - 5, 10), (PMD + 100, 3 * PAGE), (0, SIZE), (SIZE - 20, 20)],
)
def test_store(text: tuple[Mounted, Path, Mapper, bytes], offset: int, length: int) -> None:
    """FUSE_NOTIFY_STORE: the cache takes the server's bytes at once, under the mapping too."""
    fs, path, m, data = text
    assert fs.command(f"store text {offset} {length} Z") == 0
    expected = data[:offset] + b"Z" * length + data[offset + length :]
    assert m.read(0, SIZE) == expected
    assert path.read_bytes() == expected


def test_store_beyond_end(text: tuple[Mounted, Path, Mapper, bytes]) -> None:
    """A store grows the file, as it always has; the mapping's SIGBUS moves with it."""
    fs, path, _, data = text
    behind(fs, SIZE, b"Z" * 2 * PAGE)
    assert fs.command(f"store text {SIZE} {2 * PAGE} Z") == 0
    assert path.stat().st_size == SIZE + 2 * PAGE
    assert path.read_bytes() == data + b"Z" * 2 * PAGE


def test_unknown_inode(passthrough: Callable[..., Mounted]) -> None:
    fs = passthrough("--opt-in")
    (fs.source / "never").touch()
    assert fs.command("inval never 0 0") == errno.ESTALE
