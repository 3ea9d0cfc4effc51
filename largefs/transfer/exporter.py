"""Export: what a store holds, as a directory tree with all its metadata, without a mount.

Programs that the import aligned come out with their original bytes, bit for bit.
"""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from largefs.hugetext.align import restore
from largefs.hugetext.view import BadRecord
from largefs.store import EXTENT_SIZE, ROOT_INODE, Inode, Store
from largefs.store.backing import data_ranges
from largefs.store.store import fail
from largefs.transfer.copy import copy_laid_out, copy_stretch


@dataclass
class Tally:
    """What an export has done so far."""

    entries: int = 0
    copied: int = 0
    """Bytes of file sizes written."""
    failed: list[tuple[bytes, str]] = field(default_factory=list)
    """Names that could not be written or not fully: (path in the store, reason)."""


class Exporter:
    """One export from an open store."""

    def __init__(self, store: Store, progress: Callable[[Tally], None] = lambda _: None) -> None:
        self.tally = Tally()
        self._store = store
        self._progress = progress
        self._links: dict[int, bytes] = {}  # inodes with several names -> where the first one is
        self._buffer = memoryview(bytearray(EXTENT_SIZE))

    def run(self, path: bytes, target: bytes) -> Tally:
        """Export what `path` names in the store into the directory `target`.

        A directory's contents come into `target`, which gets its metadata; anything else comes as
        `target/name`. `target` must be empty or missing. OSError: ENOENT for `path`, ENOTEMPTY, and
        what writing raises when the disk is full.
        """
        row, name = self._find(path)
        os.makedirs(target, exist_ok=True)
        if os.listdir(target):
            raise fail(errno.ENOTEMPTY)
        if stat.S_ISDIR(row.mode):
            self._fill(row.id, target, path)
            self._finish(row, target, path)
        else:
            self._export(row, target + b"/" + name, path)
            self.tally.entries += 1
        return self.tally

    def _find(self, path: bytes) -> tuple[Inode, bytes]:
        row, name = self._store.get(ROOT_INODE), b""
        for name in [n for n in path.split(b"/") if n not in (b"", b".")]:
            row = self._store.lookup(row.id, name)
        return row, name

    def _fill(self, directory: int, target: bytes, path: bytes) -> None:
        for d in list(self._store.entries(directory)):
            below, inside = target + b"/" + d.name, path.rstrip(b"/") + b"/" + d.name
            try:
                self._export(d.inode, below, inside)
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                self.tally.failed.append((inside, e.strerror or str(e)))
            self.tally.entries += 1
            self._progress(self.tally)

    def _export(self, row: Inode, target: bytes, path: bytes) -> None:
        if row.id in self._links:
            os.link(self._links[row.id], target, follow_symlinks=False)
            return
        kind = stat.S_IFMT(row.mode)
        if kind == stat.S_IFDIR:
            os.mkdir(target, 0o700)
            self._fill(row.id, target, path)
        elif kind == stat.S_IFREG:
            self._export_file(row, target)
        elif kind == stat.S_IFLNK:
            os.symlink(self._store.readlink(row.id), target)
        else:
            os.mknod(target, row.mode & ~0o7777 | 0o600, row.rdev)
        if row.nlink > 1 and kind != stat.S_IFDIR:
            self._links[row.id] = target
        self._finish(row, target, path)

    def _finish(self, row: Inode, target: bytes, path: bytes) -> None:
        """Owner, mode, xattrs and times, in the order in which none undoes another."""
        lost = []
        try:
            os.chown(target, row.uid, row.gid, follow_symlinks=False)
        except PermissionError:
            lost.append("owner")
        if not stat.S_ISLNK(row.mode):
            os.chmod(target, stat.S_IMODE(row.mode))
        for name, value in self._store.xattrs(row.id).items():
            try:
                os.setxattr(target, name, value, follow_symlinks=False)
            except OSError:
                lost.append(os.fsdecode(name))
        os.utime(target, ns=(row.atime_ns, row.mtime_ns), follow_symlinks=False)
        if lost:
            self.tally.failed.append((path, "cannot set " + ", ".join(lost)))

    def _export_file(self, row: Inode, target: bytes) -> None:
        with self._store.backing.opened(row.id) as fd:
            to = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                alignment = self._store.alignment(row.id)
                if alignment is None:
                    self._copy(fd, to, row.size)
                else:
                    copy_original(fd, to, alignment[1])
            except BaseException:
                os.unlink(target)
                raise
            finally:
                os.close(to)
        self.tally.copied += row.size

    def _copy(self, fd: int, to: int, size: int) -> None:
        os.ftruncate(to, size)
        for start, end in data_ranges(fd, size):
            if not copy_stretch(fd, to, start, end, self._buffer):
                raise fail(errno.EIO)  # shorter than the metadata says


def copy_original(fd: int, to: int, record: bytes) -> None:
    """Write the bytes that an aligned file had before the import; raises OSError (EIO: a bad record)."""
    try:
        layout = restore(record)
    except BadRecord as e:
        raise OSError(errno.EIO, str(e)) from None
    copy_laid_out(fd, to, layout)
