"""Files and layouts in the tests: open one as a view, write what a layout says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from largefs.hugetext.view import Layout, View, chunks


@contextmanager
def opened(path: Path) -> Iterator[View]:
    """A view of the file at `path`."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield View.of_file(fd)
    finally:
        os.close(fd)


def write_sparse(view: View, layout: Layout, path: Path) -> None:
    """Write the file that `layout` makes of `view`, as an importer does: holes stay holes."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o755)
    try:
        os.truncate(fd, layout.size)
        for offset, data in chunks(view, layout):
            assert os.pwrite(fd, data, offset) == len(data)
    finally:
        os.close(fd)
