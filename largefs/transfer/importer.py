"""Import of a directory tree: contents, holes, modes, owners, times, xattrs, hard links, special files.

Guarantees
    A file appears in the store whole or not at all, and no sooner than its extents are written.
    The import can be stopped and run again at any moment: files whose size and mtime agree with the
    store are passed over, everything else is brought up to date. Nothing is ever removed.
    A file that cannot be read, or that changes while it is read, is left out and reported. A store that
    cannot be written ends the import.
"""

import contextlib
import errno
import fcntl
import os
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from largefs.hugetext.align import Mode, plan
from largefs.hugetext.view import View
from largefs.store import EXTENT_SIZE, ROOT_INODE, Inode, Store, StoreError
from largefs.store import backing as b
from largefs.store.errors import FULL, fail
from largefs.transfer.copy import TargetError, copy_laid_out, copy_stretch, writing
from largefs.transfer.metadata import xattrs_of

COMMIT_BYTES = 1 << 30
COMMIT_SECONDS = 10.0
"""A commit at least this often, so that an import that was stopped need not start over."""

WRITE_BEHIND = 1 << 20
"""Bytes: for files of this size and more the disk starts to write before the import is through."""

FICLONE = 0x40049409  # linux/fs.h


@dataclass
class Tally:
    """What an import has done so far."""

    entries: int = 0
    """Names seen, of every type."""
    unchanged: int = 0
    """Of these, the names that were in the store already, as they are."""
    copied: int = 0
    """Bytes of data written to the store."""
    aligned: list[tuple[bytes, str]] = field(default_factory=list)
    """Programs and libraries of 2 MiB and more: (path, what was changed, or why nothing)."""
    failed: list[tuple[bytes, str]] = field(default_factory=list)
    """Names that were left out: (path, reason)."""


SHRUNK = "became shorter while it was read; run the import again"


class ChangedError(Exception):
    """A file changed while it was read."""


class Importer:
    """One import into an open store.

    `progress` is called between two names. What it raises ends the import: nothing else can come
    between the data of a file and its metadata.
    """

    def __init__(
        self,
        store: Store,
        align: Mode = Mode.AUTO,
        progress: Callable[[Tally], None] = lambda _: None,
    ) -> None:
        self.tally = Tally()
        self._store = store
        self._align = align
        self._progress = progress
        self._todo: list[tuple[bytes, Callable[[], None]]] = []  # a stack, for trees are deep
        self._links: dict[tuple[int, int], int] = {}  # (st_dev, st_ino) with several names -> inode
        self._kept: dict[int, tuple[int, int]] = {}  # unchanged ones, the other way
        self._buffer = memoryview(bytearray(EXTENT_SIZE))
        self._can_clone = True
        self._bytes_at_commit = 0
        self._time_of_commit = time.monotonic()
        self._store_directory = os.stat(store.path)

    def run(self, source: bytes, to: bytes = b"/") -> Tally:
        """Import what the directory `source` holds into the directory `to`, which is made if missing.

        Raises OSError if `source` itself cannot be read, StoreError or OSError (ENOSPC, EDQUOT) if the
        store cannot be written: what was imported before is kept.
        """
        st = os.stat(source)
        if not stat.S_ISDIR(st.st_mode):
            raise fail(errno.ENOTDIR)
        if Path(os.fsdecode(source)).resolve().is_relative_to(self._store.path.resolve()):
            raise OSError(errno.EINVAL, "is the store itself, or inside it")
        _check_times(st)
        try:
            self._fill(self._directory(to), source, st)
            while self._todo:
                path, step = self._todo.pop()
                try:
                    step()
                except (OSError, ChangedError) as error:
                    self._leave_out(path, error)
                self._report()
        finally:
            if not isinstance(sys.exception(), StoreError):  # else there is nothing more to say
                self._store.commit()
        return self.tally

    def _directory(self, path: bytes) -> int:
        inode = ROOT_INODE
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            row = self._store.find(inode, name)
            if row is None:
                mode = stat.S_IFDIR | 0o755
                row = self._store.make(inode, name, mode, os.geteuid(), os.getegid())
            if not stat.S_ISDIR(row.mode):
                raise fail(errno.ENOTDIR)
            inode = row.id
        return inode

    def _fill(self, directory: int, source: bytes, st: os.stat_result) -> None:
        """Have the entries of a source directory imported next, its directories after the others.

        The directory's own metadata comes last: what is put into it moves its times.
        """
        known = {d.name: d.inode for d in self._store.entries(directory)}
        with os.scandir(source) as entries:
            names = sorted(entries, key=lambda e: e.is_dir(follow_symlinks=False))
        self._todo.append((source, partial(self._finish, directory, source, st)))
        for e in reversed(names):
            self._todo.append((e.path, partial(self._import, directory, e, known.get(e.name))))

    def _finish(self, directory: int, source: bytes, st: os.stat_result) -> None:
        self._set_metadata(self._store.get(directory), st, xattrs_of(source))

    def _is_the_store(self, st: os.stat_result) -> bool:
        """The store, inside the tree that is imported, is not part of it.

        Nothing of it is opened: to close meta.db would release SQLite's lock (fcntl(2)).
        """
        return os.path.samestat(st, self._store_directory)

    def _leave_out(self, path: bytes, error: Exception) -> None:
        """Note a name that cannot be imported; a store that cannot be written ends the import."""
        if not isinstance(error, OSError):
            self.tally.failed.append((path, str(error)))
            return
        why = error.strerror or str(error)
        if error.errno in (*FULL, errno.EMFILE):
            raise error
        if isinstance(error, TargetError) or error.errno == errno.EROFS:
            if error.errno != errno.EFBIG:
                name = path.decode(errors="backslashreplace")
                raise StoreError(
                    f"{self._store.path}: cannot write what {name} holds: {why}; "
                    "see to the disk of the store (dmesg), then run the same import again"
                ) from error
            why = f"the store's filesystem: {why}"
        elif error.errno == errno.EIO:
            why = f"cannot be read: {why}"
        self.tally.failed.append((path, why))

    def _report(self) -> None:
        """Between two names: show progress, and commit when it is time."""
        self._progress(self.tally)
        now = time.monotonic()
        if (
            self.tally.copied - self._bytes_at_commit > COMMIT_BYTES
            or now - self._time_of_commit > COMMIT_SECONDS
        ):
            self._store.commit()
            self._bytes_at_commit = self.tally.copied
            self._time_of_commit = time.monotonic()

    # ---------------------------------------------------------------------------- one name at a time

    def _import(self, parent: int, entry: os.DirEntry[bytes], old: Inode | None) -> None:
        """Import what a name of the source is; `old` is what it names in the store."""
        st = entry.stat(follow_symlinks=False)
        if self._is_the_store(st):
            return
        self.tally.entries += 1
        _check_times(st)
        if stat.S_ISDIR(st.st_mode):
            self._import_directory(parent, entry.name, entry.path, st, old)
        else:
            self._import_other(parent, entry.name, entry.path, st, old)

    def _import_directory(
        self, parent: int, name: bytes, path: bytes, st: os.stat_result, old: Inode | None
    ) -> None:
        if old is None:
            old = self._row(st, size=0, nlink=2)
            self._store.adopt(parent, name, old, xattrs=xattrs_of(path))
        elif not stat.S_ISDIR(old.mode):
            raise fail(errno.ENOTDIR)
        self._fill(old.id, path, st)

    def _import_other(
        self, parent: int, name: bytes, path: bytes, st: os.stat_result, old: Inode | None
    ) -> None:
        """Import anything but a directory."""
        if old is not None and stat.S_ISDIR(old.mode):
            raise fail(errno.EISDIR)
        first = self._links.get((st.st_dev, st.st_ino)) if st.st_nlink > 1 else None
        if first is not None:
            self._import_link(parent, name, first, old)
            return
        if old is not None and self._same_content(old, path, st) and self._is_one(old, st):
            inode = old.id
            self._set_metadata(old, st, xattrs_of(path))
            self.tally.unchanged += 1
        elif stat.S_ISREG(st.st_mode):
            inode = self._import_file(parent, name, path, st)
        else:
            inode = self._import_special(parent, name, path, st)
        if st.st_nlink > 1:
            self._links[st.st_dev, st.st_ino] = inode

    def _import_link(self, parent: int, name: bytes, inode: int, old: Inode | None) -> None:
        """One more name of an inode that this import has seen."""
        if old is not None and old.id == inode:
            self.tally.unchanged += 1
            return
        with self._store.change():
            if old is not None:
                self._store.remove(parent, name)
            self._store.link(inode, parent, name)

    def _same_content(self, old: Inode, path: bytes, st: os.stat_result) -> bool:
        if stat.S_IFMT(old.mode) != stat.S_IFMT(st.st_mode):
            return False
        if stat.S_ISREG(st.st_mode):
            alignment = self._store.alignment(old.id)
            size = alignment[0] if alignment else old.size
            return (size, old.mtime_ns) == (st.st_size, st.st_mtime_ns)
        if stat.S_ISLNK(st.st_mode):
            return self._store.readlink(old.id) == os.readlink(path)
        return old.rdev == st.st_rdev

    def _is_one(self, old: Inode, st: os.stat_result) -> bool:
        """Whether all names of an inode in the store, so far, are names of one inode in the source."""
        source = st.st_dev, st.st_ino
        return old.nlink == 1 or self._kept.setdefault(old.id, source) == source

    def _set_metadata(self, row: Inode, st: os.stat_result, xattrs: dict[bytes, bytes]) -> None:
        """Bring mode, owner, times and xattrs of an inode up to date."""
        new = {
            "mode": st.st_mode,
            "uid": st.st_uid,
            "gid": st.st_gid,
            "mtime_ns": st.st_mtime_ns,
        }
        if any(getattr(row, column) != value for column, value in new.items()):
            self._store.set_attributes(row.id, **new, ctime_ns=time.time_ns())
        old = self._store.xattrs(row.id)
        for name in old.keys() - xattrs.keys():
            self._store.remove_xattr(row.id, name)
        for name, value in xattrs.items():
            if old.get(name) != value:
                self._store.set_xattr(row.id, name, value)

    def _row(self, st: os.stat_result, *, size: int, nlink: int = 1, blocks: int = 0) -> Inode:
        now = time.time_ns()
        special = stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode)
        return Inode(
            id=self._store.reserve(),
            mode=st.st_mode,
            uid=st.st_uid,
            gid=st.st_gid,
            nlink=nlink,
            size=size,
            blocks=blocks,
            rdev=st.st_rdev if special else 0,
            atime_ns=st.st_atime_ns,
            mtime_ns=st.st_mtime_ns,
            ctime_ns=now,
            btime_ns=now,
            huge=0,
            writing=0,
        )

    def _import_special(self, parent: int, name: bytes, path: bytes, st: os.stat_result) -> int:
        """A symlink, device node, FIFO or socket."""
        target = os.readlink(path) if stat.S_ISLNK(st.st_mode) else b""
        row = self._row(st, size=len(target))
        self._store.adopt(parent, name, row, target=target, xattrs=xattrs_of(path))
        return row.id

    # ------------------------------------------------------------------------------- file contents

    def _import_file(self, parent: int, name: bytes, path: bytes, st: os.stat_result) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        row = self._row(st, size=st.st_size)
        fd = os.open(path, flags)
        try:
            with writing():
                written = self._store.backing.make(row.id)
            try:
                xattrs = xattrs_of(path)
                row, sums, alignment = self._copy(fd, written, row, path, xattrs)
                after = os.fstat(fd)
                if _identity(after) != _identity(st):
                    raise ChangedError("changed while it was read; run the import again")
                with writing():
                    os.utime(written, ns=(st.st_atime_ns, st.st_mtime_ns))
                    row = row._replace(blocks=os.fstat(written).st_blocks)
            finally:
                os.close(written)
            self._store.adopt(parent, name, row, xattrs=xattrs, checksums=sums, alignment=alignment)
        except Exception:
            with contextlib.suppress(OSError):  # what failed before is what there is to say
                self._store.backing.remove(row.id)
            raise
        finally:
            os.close(fd)
        self.tally.copied += row.size
        return row.id

    def _copy(
        self, fd: int, to: int, row: Inode, path: bytes, xattrs: dict[bytes, bytes]
    ) -> tuple[Inode, list[tuple[int, bytes]], tuple[int, bytes] | None]:
        """Write the backing file; returns the row as it became, checksums, and the alignment."""
        if row.size < EXTENT_SIZE:
            return row, self._copy_plain(fd, to, row.size), None
        signed = "signed (security.ima)" if b"security.ima" in xattrs else ""
        aligned = plan(View.of_file(fd), self._align, signed)
        if aligned.text:
            self.tally.aligned.append((path, aligned.reason))
        huge = int(bool(aligned.ranges))
        if not aligned.changed:
            if huge:
                self._prepare_extents(fd, to, row.size)
            return row._replace(huge=huge), self._copy_plain(fd, to, row.size), None
        b.prefer_extents(to)
        if not copy_laid_out(fd, to, aligned.layout):
            raise ChangedError(SHRUNK)
        size = aligned.layout.size
        alignment = os.fstat(fd).st_size, aligned.record()
        return row._replace(size=size, huge=huge), _sums(to, size), alignment

    def _prepare_extents(self, fd: int, to: int, size: int) -> None:
        b.prefer_extents(to)
        for start, end in b.data_ranges(fd, size):
            with writing():
                b.allocate_extents(to, start, end)

    def _copy_plain(self, fd: int, to: int, size: int) -> list[tuple[int, bytes]]:
        """Copy data and holes as they are, or share them; returns the checksums."""
        with writing():
            os.ftruncate(to, size)
        if self._clone(fd, to):
            return b.checksums(to, size)  # what cannot be read is the source's, too
        if size <= EXTENT_SIZE:
            return self._copy_extent(fd, to, size)
        for start, end in b.data_ranges(fd, size):
            if not copy_stretch(fd, to, start, end, self._buffer):
                raise ChangedError(SHRUNK)
        b.start_writing(to)
        return _sums(to, size)

    def _copy_extent(self, fd: int, to: int, size: int) -> list[tuple[int, bytes]]:
        """Copy a file of one extent: read, written and summed in one buffer."""
        stretches = list(b.data_ranges(fd, size))
        view = self._buffer[:size]
        if stretches != [(0, size)]:
            view[:] = bytes(size)
        for start, end in stretches:
            if b.read_full(fd, view[start:end], start) < end - start:
                raise ChangedError(SHRUNK)
            with writing():
                b.write_full(to, view[start:end], start)
        if size >= WRITE_BEHIND:
            b.start_writing(to)
        return [(0, b.checksum(view))] if stretches else []

    def _clone(self, fd: int, to: int) -> bool:
        """Share the extents with the source where the filesystem can (FICLONE: xfs, btrfs)."""
        if not self._can_clone:
            return False
        try:
            fcntl.ioctl(to, FICLONE, fd)
        except OSError as e:
            if e.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV):
                self._can_clone = e.errno == errno.EXDEV
            return False
        return True


def _sums(written: int, size: int) -> list[tuple[int, bytes]]:
    """The checksums of a backing file, which is read back for them."""
    with writing():
        return b.checksums(written, size)


def _check_times(st: os.stat_result) -> None:
    """The store has times as nanoseconds in 64 bits: from September 1677 to April 2262."""
    if not all(-(1 << 63) <= ns < 1 << 63 for ns in (st.st_atime_ns, st.st_mtime_ns)):
        raise OSError(errno.EOVERFLOW, "its times are not between 1678 and 2261; touch it")


def _identity(st: os.stat_result) -> tuple[int, ...]:
    return st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns
