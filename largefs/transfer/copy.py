"""Copies from one open file into another, holes left out."""

import errno
import os

from largefs.hugetext.view import Layout, View, chunks
from largefs.store.backing import read_full, write_full

NOT_IN_KERNEL = (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def copy_stretch(fd: int, to: int, start: int, end: int, buffer: memoryview) -> bool:
    """Copy bytes `start` to `end`, in the kernel where both files allow it, else through `buffer`.

    False: the source ends before `end`. Raises OSError (copy_file_range(2), pread(2), pwrite(2)).
    """
    try:
        while start < end and (done := os.copy_file_range(fd, to, end - start, start, start)):
            start += done  # 0: shorter than it was, or a filesystem that makes its data up
    except OSError as e:
        if e.errno not in NOT_IN_KERNEL:
            raise
    while start < end:
        view = buffer[: min(len(buffer), end - start)]
        got = read_full(fd, view, start)
        write_full(to, view[:got], start)
        if got < len(view):
            return False
        start += got
    return True


def copy_laid_out(fd: int, to: int, layout: Layout) -> bool:
    """Write what `layout` makes of the source into an empty file; raises OSError.

    False, and nothing is written: the source ends before its last piece does.
    """
    if os.fstat(fd).st_size < max((p.source + p.length for p in layout.pieces), default=0):
        return False
    for offset, data in chunks(View.of_file(fd), layout):
        write_full(to, data, offset)
    os.ftruncate(to, layout.size)
    return True
