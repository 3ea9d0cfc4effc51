"""Export: what a store holds, as a directory tree with all its metadata, without a mount.

Programs that the import aligned come out with their original bytes, bit for bit.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from largefs.hugetext.align import restore
from largefs.hugetext.view import BadRecord
from largefs.store import EXTENT_SIZE, ROOT_INODE, Inode, Store
from largefs.store.backing import data_ranges
from largefs.store.errors import FULL, fail
from largefs.transfer.copy import TargetError, copy_laid_out, copy_stretch, writing
from largefs.transfer.metadata import set_metadata, xattrs_of

CUT_SHORT = "its data in the store ends too early"


@dataclass
class Tally:
    """What an export has done so far."""

    entries: int = 0
    copied: int = 0
    """Bytes of file sizes written."""
    failed: list[tuple[bytes, str]] = field(default_factory=list)
    """Names that could not be written: (path in the store, reason)."""
    unset: dict[str, list[bytes]] = field(default_factory=dict)
    """Metadata that could not be set: what ('owner', the name of an xattr) -> paths in the store."""


class Exporter:
    """One export from an open store."""

    def __init__(self, store: Store, progress: Callable[[Tally], None] = lambda _: None) -> None:
        self.tally = Tally()
        self._store = store
        self._progress = progress
        self._todo: list[tuple[bytes, Callable[[], None]]] = []  # a stack, for trees are deep
        self._links: dict[int, bytes] = {}  # inodes with several names -> where the first one is
        self._buffer = memoryview(bytearray(EXTENT_SIZE))

    def run(self, path: bytes, target: bytes) -> Tally:
        """Export what `path` names in the store into the directory `target`.

        A directory's contents come into `target`, which gets its metadata; anything else comes as
        `target/name`. `target` must be empty or missing. OSError: ENOENT for `path`, ENOTEMPTY, and
        what writing raises when the disk is full, or fails.
        """
        row, name = self._find(path)
        os.makedirs(target, exist_ok=True)
        if os.listdir(target):
            raise fail(errno.ENOTEMPTY)
        if stat.S_ISDIR(row.mode):
            self._fill(row, target, path)
        else:
            self._export(row, target + b"/" + name, path)
        while self._todo:
            path, step = self._todo.pop()
            try:
                step()
            except OSError as e:
                if isinstance(e, TargetError) and e.errno != errno.EFBIG:
                    raise OSError(e.errno, e.strerror, target) from e
                if e.errno in (*FULL, errno.EROFS):
                    raise
                self.tally.failed.append((path, e.strerror or str(e)))
            self._progress(self.tally)
        return self.tally

    def _find(self, path: bytes) -> tuple[Inode, bytes]:
        row, name = self._store.get(ROOT_INODE), b""
        for name in [n for n in path.split(b"/") if n not in (b"", b".")]:
            row = self._store.lookup(row.id, name)
        return row, name

    def _fill(self, row: Inode, target: bytes, path: bytes) -> None:
        """Have a directory's entries exported next, and then its metadata: they move its times."""
        self._todo.append((path, partial(self._finish, row, target, path)))
        for d in reversed(list(self._store.entries(row.id))):
            below, inside = target + b"/" + d.name, path.rstrip(b"/") + b"/" + d.name
            self._todo.append((inside, partial(self._export, d.inode, below, inside)))

    def _export(self, row: Inode, target: bytes, path: bytes) -> None:
        self.tally.entries += 1
        if row.id in self._links:
            os.link(self._links[row.id], target, follow_symlinks=False)
            return
        kind = stat.S_IFMT(row.mode)
        if kind == stat.S_IFDIR:
            os.mkdir(target, 0o700)
            self._fill(row, target, path)
            return
        if kind == stat.S_IFREG:
            self._export_file(row, target)
        elif kind == stat.S_IFLNK:
            os.symlink(self._store.readlink(row.id), target)
        else:
            os.mknod(target, row.mode & ~0o7777 | 0o600, row.rdev)
        if row.nlink > 1:
            self._links[row.id] = target
        self._finish(row, target, path)

    def _finish(self, row: Inode, target: bytes, path: bytes) -> None:
        lost = set_metadata(
            target,
            row.mode,
            (row.uid, row.gid),
            self._store.xattrs(row.id),
            (row.atime_ns, row.mtime_ns),
        )
        for what in lost:
            self.tally.unset.setdefault(what, []).append(path)

    def _export_file(self, row: Inode, target: bytes) -> None:
        with self._store.backing.opened(row.id) as fd, _new_file(target) as to:
            alignment = self._store.alignment(row.id)
            if alignment is None:
                self._copy(fd, to, row.size)
            else:
                _copy_original(fd, to, alignment[1])
        self.tally.copied += row.size

    def _copy(self, fd: int, to: int, size: int) -> None:
        if os.fstat(fd).st_size < size:
            raise OSError(errno.EIO, CUT_SHORT)
        with writing():
            os.ftruncate(to, size)
        for start, end in data_ranges(fd, size):
            if not copy_stretch(fd, to, start, end, self._buffer):
                raise OSError(errno.EIO, CUT_SHORT)


def export_original(file: bytes, record: bytes, target: bytes) -> list[str]:
    """Write what an aligned file on a mount was before the import to `target`, with its metadata.

    Returns what could not be set of that; raises OSError (EIO: a bad record).
    """
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        st = os.fstat(fd)
        with _new_file(target) as to:
            _copy_original(fd, to, record)
    finally:
        os.close(fd)
    times = st.st_atime_ns, st.st_mtime_ns
    return set_metadata(target, st.st_mode, (st.st_uid, st.st_gid), xattrs_of(file), times)


@contextmanager
def _new_file(target: bytes) -> Iterator[int]:
    """A new file, open for writing while the block runs; it goes again if the block fails."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    except BaseException:
        os.unlink(target)
        raise
    finally:
        os.close(fd)


def _copy_original(fd: int, to: int, record: bytes) -> None:
    try:
        layout = restore(record)
    except BadRecord as e:
        raise OSError(errno.EIO, str(e)) from None
    if not copy_laid_out(fd, to, layout):
        raise OSError(errno.EIO, CUT_SHORT)
