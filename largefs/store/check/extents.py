"""The checks of file data: where there is any it has a checksum, and it is what was recorded."""

import os

from largefs.store import backing
from largefs.store.backing import EXTENT_SIZE
from largefs.store.check.context import REGULAR, Context


def compare_with_holes(c: Context, fd: int, inode: int, size: int) -> None:
    """Extents with data have a checksum, holes have none; zeros may be either."""
    sums = dict(c.all("SELECT number, checksum FROM extents WHERE inode = ?", inode))
    for number in [n for n in sums if not 0 <= n * EXTENT_SIZE < size]:
        del sums[number]
        text = f"a checksum of extent {number}, which is beyond the size of {size} bytes"
        c.problem("extents", text, inode, mendable=True)
        c.db.execute("DELETE FROM extents WHERE inode = ? AND number = ?", (inode, number))
    with_data = set(backing.extents_with_data(fd, size))
    for number in sorted(with_data - sums.keys()):
        found = _sum(fd, number, size)
        if found != _sum_of_zeros(number, size):
            offset = number * EXTENT_SIZE
            text = f"no checksum of the data at {offset}"
            c.problem("extents", text, inode, offset=offset, mendable=True)
            c.db.execute("INSERT INTO extents VALUES (?, ?, ?)", (inode, number, found))
    for number in sorted(sums.keys() - with_data):
        if sums[number] != _sum_of_zeros(number, size):
            c.lost_extents.add((inode, number))
            offset = number * EXTENT_SIZE
            text = f"the data at {offset} is lost: there is a hole"
            c.problem("extents", text, inode, offset=offset)


def are_intact(c: Context, fd: int, inode: int, size: int) -> bool:
    """Whether a file's first `size` bytes are what was recorded."""
    sums = c.all("SELECT number, checksum FROM extents WHERE inode = ?", inode)
    try:
        return all(_sum(fd, n, size) == s for n, s in sums if 0 <= n * EXTENT_SIZE < size)
    except OSError:
        return False


def record(c: Context, inode: int) -> None:
    """Take what a backing file holds for right; raises OSError."""
    with c.backing.opened(inode) as fd:
        sums = backing.checksums(fd, os.fstat(fd).st_size)
    c.db.execute("DELETE FROM extents WHERE inode = ?", (inode,))
    c.db.executemany("INSERT INTO extents VALUES (?, ?, ?)", [(inode, n, s) for n, s in sums])


def compare_data(c: Context) -> None:
    """Read every extent and compare it with its checksum."""
    total = c.value(
        "SELECT ifnull(sum(min(?1, size - number * ?1)), 0) FROM extents JOIN inodes ON id = inode"
        " WHERE writing = 0 AND number >= 0 AND number * ?1 < size",
        EXTENT_SIZE,
    )
    for inode, size in c.db.execute(
        f"SELECT id, size FROM inodes WHERE {REGULAR} AND writing = 0 AND nlink > 0"
    ):
        try:
            fd = c.backing.open(inode, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            continue  # reported already
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # it is the disk that is checked
            _compare_file(c, fd, inode, size, total)
        finally:
            os.close(fd)


def _compare_file(c: Context, fd: int, inode: int, size: int, total: int) -> None:
    for number, recorded in c.all(
        "SELECT number, checksum FROM extents WHERE inode = ? AND number >= 0 ORDER BY number",
        inode,
    ):
        offset = number * EXTENT_SIZE
        length = min(EXTENT_SIZE, size - offset)
        try:
            if (inode, number) in c.lost_extents or offset + length > os.fstat(fd).st_size:
                continue  # reported already
            if length > 0 and _sum(fd, number, size) != recorded:
                text = f"damaged: {length} bytes at {offset} are not what was recorded"
                c.problem("data", text, inode, offset=offset)
        except OSError as e:
            text = f"unreadable: {length} bytes at {offset}: {e.strerror}"
            c.problem("unreadable", text, inode, offset=offset)
        c.report.checked += max(0, length)
        c.progress(c.report.checked, total)


_buffer = memoryview(bytearray(EXTENT_SIZE))
_ZEROS = bytes(EXTENT_SIZE)


def _sum(fd: int, number: int, size: int) -> bytes:
    """The checksum of an extent of a file of `size` bytes; what is missing at the end counts as zeros."""
    offset = number * EXTENT_SIZE
    view = _buffer[: min(EXTENT_SIZE, size - offset)]
    got = backing.read_full(fd, view, offset)
    view[got:] = _ZEROS[: len(view) - got]
    return backing.checksum(view)


def _sum_of_zeros(number: int, size: int) -> bytes:
    length = min(EXTENT_SIZE, size - number * EXTENT_SIZE)
    return backing.checksum(_ZEROS) if length == EXTENT_SIZE else backing.checksum(_ZEROS[:length])
