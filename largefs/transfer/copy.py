"""Copies from one open file into another, holes left out; an error tells which of them has it."""

import contextlib
import os
from collections.abc import Iterator

from largefs.hugetext.view import Layout, View, chunks
from largefs.store.backing import read_full, write_full


class TargetError(OSError):
    """The copy could not be written. Any other OSError of this module is about the original."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Around what is done to the copy alone: an OSError becomes a TargetError."""
    try:
        yield
    except OSError as e:
        raise TargetError(e.errno, e.strerror) from e


def copy_stretch(fd: int, to: int, start: int, end: int, buffer: memoryview) -> bool:
    """Copy bytes `start` to `end`, in the kernel where both files allow it, else through `buffer`.

    False: the source ends before `end`. Raises OSError (pread(2)) and TargetError (pwrite(2)).
    """
    # By any error: the kernel cannot, or one of the files fails, and the loop below finds out which.
    with contextlib.suppress(OSError):
        while start < end and (done := os.copy_file_range(fd, to, end - start, start, start)):
            start += done  # 0: shorter than it was, or a filesystem that makes its data up
    while start < end:
        view = buffer[: min(len(buffer), end - start)]
        got = read_full(fd, view, start)
        with writing():
            write_full(to, view[:got], start)
        if got < len(view):
            return False
        start += got
    return True


def copy_laid_out(fd: int, to: int, layout: Layout) -> bool:
    """Write what `layout` makes of the source into an empty file; raises OSError and TargetError.

    False, and nothing is written: the source ends before its last piece does.
    """
    if os.fstat(fd).st_size < max((p.source + p.length for p in layout.pieces), default=0):
        return False
    for offset, data in chunks(View.of_file(fd), layout):
        with writing():
            write_full(to, data, offset)
    with writing():
        os.ftruncate(to, layout.size)
    return True
