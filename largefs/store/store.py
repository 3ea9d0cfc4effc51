"""A store, open: the inodes and names in `meta.db`, the data in backing files, and what keeps both in step.

Guarantees
    One process at a time holds a store (BusyError for the others).
    A change is one savepoint: it happens wholly or not at all.
    Changes become durable together at `commit`: extents first, then the transaction that refers to
    them; a backing file is removed only after the transaction that drops its inode is durable.
    After a crash `open` puts everything in order by itself: what was committed is there, what was
    written through an open handle has the size its backing file has.

Metadata calls must come from one thread at a time. `Store.sum` and everything of
`BackingFiles` may run in other threads meanwhile. POSIX failures are raised as OSError with the errno
that the system call has by its man page; a store that cannot be used, as StoreError.
"""

import contextlib
import errno
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from largefs.store import backing, database, owner, schema
from largefs.store.backing import BackingFiles
from largefs.store.errors import (
    FULL,
    BusyError,
    DiskFullError,
    ReadOnlyError,
    RestoredError,
    StoreError,
    fail,
    of_database,
)

log = logging.getLogger(__name__)

NAME_MAX = 255
"""Bytes of a name, as limits.h has it."""

SYMLINK_MAX = 4095
"""Bytes of a symlink's target: PATH_MAX without the NUL."""

SEE_TO_IT = "see to its disk (dmesg), then mount it or run the command again"

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4  # linux/fs.h


class Inode(NamedTuple):
    """A row of `inodes`; the units are those of the schema."""

    id: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    blocks: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    huge: int
    writing: int


class Dentry(NamedTuple):
    """A name in a directory, with the inode it names. `id` is the position readdir() resumes from."""

    id: int
    name: bytes
    inode: Inode


REMOVED = "nlink = 0 AND id NOT IN (SELECT inode FROM dentries) AND id NOT IN (SELECT parent FROM dentries)"
"""Of `inodes`: removed while open, to be dropped by recovery. With a name it is nlink that is wrong."""

_COLUMNS = ", ".join(Inode._fields)
_I_COLUMNS = ", ".join(f"i.{c}" for c in Inode._fields)
_GET = f"SELECT {_COLUMNS} FROM inodes WHERE id = ?"  # noqa: S608
_LOOKUP = (
    f"SELECT {_I_COLUMNS} FROM dentries d JOIN inodes i ON i.id = d.inode"  # noqa: S608
    " WHERE d.parent = ? AND d.name = ?"
)
_LIST = (
    f"SELECT d.id, d.name, {_I_COLUMNS} FROM dentries d JOIN inodes i ON i.id = d.inode"  # noqa: S608
    " WHERE d.parent = ? AND d.id > ? ORDER BY d.id"
)
_NEW = (
    f"INSERT INTO inodes ({_COLUMNS})"  # noqa: S608
    f" VALUES ({', '.join('?' * len(Inode._fields))})"
)


def as_written(row: Inode, st: os.stat_result) -> Inode:
    """The inode of a file that may have been written, as its backing file has it.

    The backing file's ctime is that of the writing, but a copy of the store moves it as well, so it
    counts only where the file was written. It comes from a coarser clock than this row's, which must
    not go back.
    """
    written = (st.st_size, st.st_mtime_ns) != (row.size, row.mtime_ns)
    return row._replace(
        size=st.st_size,
        blocks=st.st_blocks,
        mtime_ns=st.st_mtime_ns,
        ctime_ns=max(row.ctime_ns, st.st_ctime_ns) if written else row.ctime_ns,
    )


class Store:
    """An open store. Use `Store.open`; close it, or use it as a context manager."""

    path: Path
    db: apsw.Connection
    backing: BackingFiles
    uuid: str
    unsettled: list[int]
    """After `open`: inodes that a crash left open for writing, whose checksums are to be made."""
    to_remove: set[int]
    """Inodes whose drop is durable, and whose backing files `remove_dropped` has still to remove."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unsettled = []
        self._new: set[int] = set()  # made since the last commit
        self._settled: set[int] = set()  # clean as soon as their extents are durable
        self._flushing: set[int] = set()  # of those, the ones whose extents a commit is flushing
        self._marked: set[int] = set()  # writing = 1 since the last commit, clean on disk
        self._dropped: list[int] = []  # to be removed after the next commit
        self.to_remove = set()
        self._failed = ""  # why no change is taken any more
        self._holder: owner.Holder | None = None
        self._full = False  # the last commit found no room
        self._log = -1  # SQLite's write-ahead log
        self._last = 0  # the highest inode number given by `reserve`

    def _one(self, query: str, *parameters: Any) -> Any:
        try:  # as _database() does, whose cost counts here: every request comes by
            return self.db.execute(query, parameters).fetchone()
        except apsw.Error as e:
            raise of_database(self.path, e) from e

    def _all(self, query: str, *parameters: Any) -> Any:
        with self._database():
            return self.db.execute(query, parameters).fetchall()

    @contextlib.contextmanager
    def _database(self) -> Iterator[None]:
        """Around what SQLite does: what it raises becomes a StoreError."""
        try:
            yield
        except apsw.Error as e:
            raise of_database(self.path, e) from e

    # ------------------------------------------------------------------ creation, opening, closing

    @staticmethod
    def create(
        path: Path, *, mode: int = 0o755, uid: int | None = None, gid: int | None = None
    ) -> None:
        """Make an empty store in `path`, a directory that is missing or empty.

        The root directory gets `mode` (permission bits), `uid` and `gid` (this process's by default).
        Raises StoreError.
        """
        if (path / "meta.db").exists():
            raise StoreError(f"{path}: is a store already; remove it first, or choose another path")
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path}: not a directory; name a directory that is empty or missing")
        if path.is_dir() and any(path.iterdir()):
            raise StoreError(f"{path}: not empty; name a directory that is empty or missing")
        database.check_length(path / database.NEW)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            BackingFiles.create(path / "extents")
            owned = (os.geteuid() if uid is None else uid, os.getegid() if gid is None else gid)
            database.create(path / "meta.db", lambda db: _first_rows(db, mode, *owned))
        except (OSError, apsw.Error) as e:
            if not isinstance(e, FileExistsError):  # another mkfs was here first
                for made in path.glob("meta.db*"):
                    made.unlink()
                shutil.rmtree(path / "extents", ignore_errors=True)
            raise _failure(path, "cannot make a store here", e) from e

    @classmethod
    def open(cls, path: Path, purpose: str) -> "Store":
        """Open a store and hold it until `close`; `purpose` says what for, in messages to others.

        Raises NotAStoreError, NewerFormatError, BusyError or StoreError.
        """
        meta = path / "meta.db"
        database.read_format(meta)
        if other := owner.foreign_and_alive(path):
            raise BusyError(path, other)
        self = cls(path)
        try:
            self.db, self._log = database.connect(meta)
        except apsw.BusyError:
            raise BusyError(path, owner.read(path)) from None
        except (OSError, apsw.Error) as e:
            raise _failure(path, "meta.db is damaged or unreadable", e) from e
        try:
            self.backing = BackingFiles(path / "extents")
        except OSError as e:
            database.disconnect(self.db, self._log)
            raise StoreError(f"{path}: extents/: {e.strerror}") from e
        try:
            self._start(purpose)
        except BaseException as e:
            self._let_go()
            if isinstance(e, (OSError, apsw.Error)):
                raise _failure(path, "cannot open", e) from e
            raise
        return self

    def _start(self, purpose: str) -> None:
        superblock = self._one("SELECT uuid, clean FROM superblock")
        if superblock is None:
            raise StoreError(f"{self.path}: damaged; run: largefs check --repair {self.path}")
        self.uuid, clean = superblock
        if given(self.db) < self.backing.given:
            raise RestoredError(
                f"{self.path}: meta.db is older than the data, as when it was restored from a backup; "
                f"run: largefs check --repair {self.path}"
            )
        self._holder = owner.Holder(self.path, purpose)
        with contextlib.suppress(OSError):  # a disk that is full already: what there is must do
            database.hold_room(self._log, database.LOG_RESERVE)
        with self.change():
            self._recover()
            if not clean:
                self._find_orphans()
                self._agree_on_times()
            self.db.execute("UPDATE superblock SET clean = 0")
        self.commit()

    def _recover(self) -> None:
        """Put in order the inodes that were in use when the store was last let go."""
        for (inode,) in self._all(
            f"SELECT id FROM inodes WHERE {REMOVED}"  # noqa: S608
        ):
            self._drop_rows(inode)
            self._dropped.append(inode)
        for (inode,) in self._all("SELECT id FROM inodes WHERE writing = 1"):
            try:
                st = self.backing.stat(inode)
            except FileNotFoundError:  # never flushed, so never promised
                os.close(self.backing.make(inode))
                st = self.backing.stat(inode)
            self.record_stat(inode, st)
            self.db.execute("DELETE FROM extents WHERE inode = ?", (inode,))
            self.unsettled.append(inode)

    def _find_orphans(self) -> None:
        """Find the backing files that a crash left without an inode.

        One that other tables know is no such file: its inode was lost, and `largefs check` finds it.
        """
        query = (
            "SELECT id FROM inodes UNION SELECT inode FROM dentries UNION SELECT inode FROM extents"
        )
        known = {i for (i,) in self.db.execute(query)}
        for inode in list(self.backing.numbers()):
            if inode not in known:
                self._dropped.append(inode)

    def _agree_on_times(self) -> None:
        """Give backing files the mtime of their inodes: a crash may have come between the two."""
        query = (
            f"SELECT id, size, atime_ns, mtime_ns FROM inodes WHERE mode & {0o170000} = {stat.S_IFREG}"  # noqa: S608
            " AND writing = 0"
        )
        for inode, size, atime_ns, mtime_ns in self._all(query):
            with contextlib.suppress(FileNotFoundError):  # `largefs check` reports that
                st = self.backing.stat(inode)
                if st.st_size == size and st.st_mtime_ns != mtime_ns:
                    self.backing.set_times(inode, atime_ns, mtime_ns)

    def close(self) -> None:
        """Commit and let the store go. Inodes still unsettled are settled here.

        One that cannot be read, or that somebody still writes, is left for the next time.
        """
        try:
            if not self._failed:
                for inode in self.unsettled:
                    with contextlib.suppress(OSError):
                        if not self.has_writer(inode):
                            self.record_stat(inode, self.backing.stat(inode))
                            self.record_checksums(inode, self.sum(inode))
                self.unsettled = []
                with self.change():
                    self.db.execute("UPDATE superblock SET clean = 1")
                self.commit()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        try:
            if self._holder:
                self._holder.release()
        finally:
            database.disconnect(self.db, self._log)
            self.backing.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, _: object, failure: BaseException | None, __: object) -> None:
        try:
            self.close()
        except (OSError, StoreError):
            if not isinstance(failure, (OSError, StoreError)):
                raise  # else what failed first is what there is to say

    # ------------------------------------------------------------------------------- transactions

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """One change of the metadata: all of what the block does, or nothing of it."""
        if self._failed:
            raise fail(errno.EROFS)
        with self._database():
            if not self.db.in_transaction:
                self.db.execute("BEGIN IMMEDIATE")
            dropped = len(self._dropped)
            try:
                with self.db:
                    try:
                        yield
                    except BaseException as e:
                        self._check_alive(e)
                        raise
            except BaseException as e:
                del self._dropped[dropped:]  # their rows are back
                self._check_alive(e)
                raise

    def _check_alive(self, why: BaseException) -> None:
        """SQLite may have rolled back the whole transaction: then nothing we told anyone is true.

        By SQLITE_IOERR, SQLITE_FULL and the like (https://www.sqlite.org/lang_transaction.html, "Response
        To Errors Within A Transaction"). Raises ReadOnlyError with the first reason there was.
        """
        if self.db.in_transaction:
            return
        if not self._failed:
            reason = _reason(why.__cause__ if isinstance(why, StoreError) else why)
            lost = f"what was changed since the last commit is lost: {reason}"
            self._failed = f"{self.path}: {lost}; {SEE_TO_IT}"
        raise ReadOnlyError(self._failed) from why

    def _check_room(self) -> None:
        """Refuse to let the changes that wait for room become more; those that free it go on."""
        if self._full:
            try:
                self._make_room()
            except DiskFullError:
                raise fail(errno.ENOSPC) from None

    def _make_room(self) -> None:
        """See that COMMIT cannot run out of disk space: SQLite would take the transaction back.

        It appends the changed pages to its log, each with a header of 24 bytes; none is written
        earlier (cache_spill is off), so that they are all among what the cache holds.
        """
        cached, _ = self.db.status(apsw.SQLITE_DBSTATUS_CACHE_USED)
        try:
            database.hold_room(
                self._log, os.fstat(self._log).st_size + cached + cached // 64 + 4096
            )
        except OSError as e:
            if e.errno not in FULL:
                raise
            self._full = True
            raise DiskFullError(self.path) from None
        self._full = False

    @property
    def uncommitted(self) -> bool:
        """Whether there is anything for `commit` to do, or to complain about."""
        waiting = self.db.in_transaction or self._settled or self._flushing or self._dropped
        return bool(waiting or self._failed)

    def to_flush(self) -> list[int]:
        """First step of a commit: the inodes whose extents must be durable before it.

        One that is written and settled again while they are flushed is clean after the next commit.
        """
        self._flushing |= self._settled
        self._settled.clear()
        return list((self._flushing | self._new).difference(self._dropped))

    @contextlib.contextmanager
    def flushing(self) -> Iterator[None]:
        """Around every flush of extents: when it fails the store takes no more changes.

        The kernel reports an error of writeback once and then takes the pages for written, so a second
        flush would succeed, and rows become clean over data that the disk never had (fsync(2), NOTES;
        https://wiki.postgresql.org/wiki/Fsync_Errors). ENOSPC and EDQUOT are no exception: they come
        from delayed allocation or a thin disk, with the data lost as for EIO. Raises ReadOnlyError, or
        StoreError where there was no descriptor to flush with, which can be tried again.
        """
        try:
            yield
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise StoreError(f"{self.path}: cannot commit: {_reason(e)}") from e
            self._failed = f"{self.path}: data could not be written: {_reason(e)}; {SEE_TO_IT}"
            raise ReadOnlyError(self._failed) from e

    def finish_commit(self) -> None:
        """Third step of a commit, after the extents of `to_flush` were made durable.

        Raises ReadOnlyError or, where trying again later can help, DiskFullError or StoreError.
        """
        if self._failed:
            raise ReadOnlyError(self._failed)
        done = [(i,) for i in self._flushing]
        try:
            if done:
                with self.change():
                    self.db.executemany("UPDATE inodes SET writing = 0 WHERE id = ?", done)
            if self.db.in_transaction:
                self._make_room()
                self.db.execute("COMMIT")
        except (apsw.Error, OSError) as e:
            self._check_alive(e)
            if isinstance(e, apsw.Error):
                raise of_database(self.path, e) from e
            raise StoreError(f"{self.path}: cannot commit: {_reason(e)}") from e
        # The commit is done: this only guards against a mistake to come
        with contextlib.suppress(OSError, apsw.Error):
            self.backing.record_given(given(self.db))
        self._flushing.clear()
        self._new.clear()
        self._marked.clear()
        self.to_remove.update(self._dropped)
        self._dropped.clear()

    def remove_dropped(self) -> None:
        """Last step of a commit: remove the backing files of dropped inodes. For any thread.

        What is interrupted, or fails, is left for the next commit.
        """
        for inode in list(self.to_remove):
            try:
                self.backing.remove(inode)
            except OSError as e:
                log.error("cannot remove the backing file of inode %d: %s", inode, e)
            else:
                self.to_remove.discard(inode)

    def commit(self) -> None:
        """Make every change so far durable. Blocks; raises StoreError."""
        with self.flushing():
            self.backing.flush(self.to_flush())
        self.finish_commit()
        self.remove_dropped()

    # ------------------------------------------------------------------------------------ reading

    def get(self, inode: int) -> Inode:
        """The inode; ENOENT if there is none of that number."""
        row = self._one(_GET, inode)
        if row is None:
            raise fail(errno.ENOENT)
        return Inode._make(row)

    def find(self, parent: int, name: bytes) -> Inode | None:
        """The inode that `name` names in the directory, or None."""
        row = self._one(_LOOKUP, parent, name)
        return None if row is None else Inode._make(row)

    def lookup(self, parent: int, name: bytes) -> Inode:
        """The inode that `name` names in the directory; ENOENT."""
        found = self.find(parent, name)
        if found is None:
            raise fail(errno.ENOENT)
        return found

    def entries(self, parent: int, after: int = 0) -> Iterator[Dentry]:
        """The directory's entries behind the position `after`, in their order.

        Rows are fetched as they are asked for; change nothing before the last one was.
        """
        with self._database():
            for row in self.db.execute(_LIST, (parent, after)):
                yield Dentry(row[0], row[1], Inode._make(row[2:]))

    def parent_of(self, directory: int) -> int:
        """The inode number of '..'; the root is its own parent."""
        if directory == schema.ROOT_INODE:
            return directory
        row = self._one("SELECT parent FROM dentries WHERE inode = ?", directory)
        if row is None:
            raise fail(errno.ENOENT)
        return int(row[0])

    def path_of(self, inode: int) -> bytes:
        """One path of the inode from the root ('/…'), for messages; ENOENT for an unlinked one."""
        with self._database():
            path = path_of(self.db, inode)
        if path is None:
            raise fail(errno.ENOENT)
        return path

    def readlink(self, inode: int) -> bytes:
        """The target of a symlink; EINVAL for anything else."""
        row = self._one("SELECT target FROM symlinks WHERE inode = ?", inode)
        if row is None:
            raise fail(errno.EINVAL)
        return bytes(row[0])

    def counts(self) -> tuple[int, int]:
        """Inodes, and bytes of all files' sizes."""
        row = self._one("SELECT count(*), ifnull(sum(size), 0) FROM inodes")
        return int(row[0]), int(row[1])

    # ------------------------------------------------------------------------------------- naming

    def make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Inode:
        """Make an inode of any type and name it; EEXIST, ENAMETOOLONG, ENOENT for a dead parent.

        A directory with the set-group-ID bit gives its group to what is made in it, and the bit to
        directories (inode(7)). A regular file gets its empty backing file and is open for writing;
        one that is executable passes for one with eligible text until what it holds is recorded.
        """
        self._check_room()
        _check_name(name)
        if stat.S_ISLNK(mode) and not 0 < len(target) <= SYMLINK_MAX:
            raise fail(errno.ENAMETOOLONG if target else errno.ENOENT)
        now = time.time_ns()
        regular = stat.S_ISREG(mode)
        with self.change():
            above = self.get(parent)
            if above.nlink == 0:
                raise fail(errno.ENOENT)
            if above.mode & stat.S_ISGID:
                gid = above.gid
                if stat.S_ISDIR(mode):
                    mode |= stat.S_ISGID
            self.db.execute(
                _NEW,
                (
                    None,  # the next number
                    mode,
                    uid,
                    gid,
                    2 if stat.S_ISDIR(mode) else 1,
                    len(target),
                    0,
                    rdev,
                    now,
                    now,
                    now,
                    now,
                    int(regular and bool(mode & 0o111)),
                    int(regular),
                ),
            )
            inode = self.db.last_insert_rowid()
            self._add_name(parent, name, inode)
            if target:
                self.db.execute("INSERT INTO symlinks VALUES (?, ?)", (inode, target))
            self._touch_directory(parent, now, int(stat.S_ISDIR(mode)))
            if regular:
                fd = self.backing.make(inode)
                try:
                    os.utime(fd, ns=(now, now))
                finally:
                    os.close(fd)
        if regular:
            self._new.add(inode)
        return self.get(inode)

    def reserve(self) -> int:
        """A number for an inode that `adopt` will make, never given before."""
        if not self._last:
            with self._database():
                self._last = given(self.db)
        self._last += 1
        return self._last

    def adopt(
        self,
        parent: int,
        name: bytes,
        row: Inode,
        *,
        target: bytes = b"",
        xattrs: dict[bytes, bytes] | None = None,
        checksums: Iterable[tuple[int, bytes]] = (),
        alignment: tuple[int, bytes] | None = None,
    ) -> None:
        """Name an inode that comes complete: `row.id` from `reserve`, its backing file written.

        For the import: the parent's times do not move, and a name that is there already (of anything
        but a directory) is replaced in the same change. nlink is taken from `row` as it is.
        """
        self._check_room()
        _check_name(name)
        with self.change():
            if self.find(parent, name):
                self.remove(parent, name)
            self.db.execute(_NEW, row)
            self._add_name(parent, name, row.id)
            if target:
                self.db.execute("INSERT INTO symlinks VALUES (?, ?)", (row.id, target))
            for xattr, value in (xattrs or {}).items():
                self.db.execute("INSERT INTO xattrs VALUES (?, ?, ?)", (row.id, xattr, value))
            if checksums:
                self.set_checksums(row.id, list(checksums))
            if alignment:
                self.set_alignment(row.id, *alignment)
            if stat.S_ISDIR(row.mode):
                self.db.execute("UPDATE inodes SET nlink = nlink + 1 WHERE id = ?", (parent,))
        if stat.S_ISREG(row.mode):
            self._new.add(row.id)

    def link(self, inode: int, parent: int, name: bytes) -> Inode:
        """Give an inode one more name; EEXIST, EPERM for directories.

        An inode without a name may get one (O_TMPFILE; the kernel refuses unlinked files itself).
        """
        self._check_room()
        _check_name(name)
        now = time.time_ns()
        with self.change():
            if stat.S_ISDIR(self.get(inode).mode):
                raise fail(errno.EPERM)
            if self.get(parent).nlink == 0:
                raise fail(errno.ENOENT)
            self._add_name(parent, name, inode)
            self.db.execute(
                "UPDATE inodes SET nlink = nlink + 1, ctime_ns = ? WHERE id = ?", (now, inode)
            )
            self._touch_directory(parent, now)
        return self.get(inode)

    def unlink(self, parent: int, name: bytes) -> Inode:
        """Remove a name of anything but a directory; returns the inode as it is now.

        With nlink 0 it stays readable until `drop`. ENOENT, EISDIR.
        """
        now = time.time_ns()
        with self.change():
            row = self.lookup(parent, name)
            if stat.S_ISDIR(row.mode):
                raise fail(errno.EISDIR)
            self._remove_name(parent, name, row, now)
            self._touch_directory(parent, now)
        return self.get(row.id)

    def remove(self, parent: int, name: bytes) -> None:
        """`unlink`, and `drop` with the last name: for a file that nobody has open."""
        with self.change():
            row = self.unlink(parent, name)
            if row.nlink == 0:
                self.drop(row.id)

    def rmdir(self, parent: int, name: bytes) -> Inode:
        """Remove an empty directory; returns the inode as it is now. ENOENT, ENOTDIR, ENOTEMPTY."""
        now = time.time_ns()
        with self.change():
            row = self.lookup(parent, name)
            if not stat.S_ISDIR(row.mode):
                raise fail(errno.ENOTDIR)
            self._check_empty(row.id)
            self._remove_name(parent, name, row, now)
            self._touch_directory(parent, now, -1)
        return self.get(row.id)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> Inode | None:
        """rename(2), renameat2(2) with RENAME_NOREPLACE or RENAME_EXCHANGE.

        Returns what `new_name` named before, as it is now (nlink 0: `drop` it when unused), or None.
        """
        _check_name(new_name)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == 3:
            raise fail(errno.EINVAL)
        now = time.time_ns()
        with self.change():
            old = self.lookup(parent, name)
            new = self.find(new_parent, new_name)
            if self.get(new_parent).nlink == 0:
                raise fail(errno.ENOENT)
            if flags & RENAME_EXCHANGE:
                if new is None:
                    raise fail(errno.ENOENT)
                self._exchange(parent, name, old, new_parent, new_name, new, now)
                return None
            if new is not None and flags & RENAME_NOREPLACE:
                raise fail(errno.EEXIST)
            if new is not None and new.id == old.id:
                return None
            if new is not None:
                self._make_way(old, new, new_parent, new_name, now)
            self.db.execute(
                "UPDATE dentries SET parent = ?, name = ? WHERE parent = ? AND name = ?",
                (new_parent, new_name, parent, name),
            )
            self.db.execute("UPDATE inodes SET ctime_ns = ? WHERE id = ?", (now, old.id))
            moved = int(stat.S_ISDIR(old.mode) and parent != new_parent)
            self._touch_directory(parent, now, -moved)
            self._touch_directory(new_parent, now, moved)
        return None if new is None else self.get(new.id)

    def _make_way(self, old: Inode, new: Inode, parent: int, name: bytes, now: int) -> None:
        directory = stat.S_ISDIR(new.mode)
        if stat.S_ISDIR(old.mode) and not directory:
            raise fail(errno.ENOTDIR)
        if directory:
            if not stat.S_ISDIR(old.mode):
                raise fail(errno.EISDIR)
            self._check_empty(new.id)
        self._remove_name(parent, name, new, now)
        self._touch_directory(parent, now, -int(directory))

    def _exchange(
        self,
        parent: int,
        name: bytes,
        old: Inode,
        new_parent: int,
        new_name: bytes,
        new: Inode,
        now: int,
    ) -> None:
        query = "UPDATE dentries SET inode = ? WHERE parent = ? AND name = ?"
        self.db.execute(query, (new.id, parent, name))
        self.db.execute(query, (old.id, new_parent, new_name))
        self.db.execute("UPDATE inodes SET ctime_ns = ? WHERE id IN (?, ?)", (now, old.id, new.id))
        moved = 0
        if parent != new_parent:
            moved = int(stat.S_ISDIR(old.mode)) - int(stat.S_ISDIR(new.mode))
        self._touch_directory(parent, now, -moved)
        self._touch_directory(new_parent, now, moved)

    def _add_name(self, parent: int, name: bytes, inode: int) -> None:
        try:
            self.db.execute(
                "INSERT INTO dentries (parent, name, inode) VALUES (?, ?, ?)", (parent, name, inode)
            )
        except apsw.ConstraintError:
            raise fail(errno.EEXIST) from None

    def _remove_name(self, parent: int, name: bytes, row: Inode, now: int) -> None:
        self.db.execute("DELETE FROM dentries WHERE parent = ? AND name = ?", (parent, name))
        left = 0 if stat.S_ISDIR(row.mode) else row.nlink - 1
        self.db.execute(
            "UPDATE inodes SET nlink = ?, ctime_ns = ? WHERE id = ?", (left, now, row.id)
        )

    def _touch_directory(self, directory: int, now: int, subdirectories: int = 0) -> None:
        self.db.execute(
            "UPDATE inodes SET mtime_ns = ?, ctime_ns = ?, nlink = nlink + ? WHERE id = ?",
            (now, now, subdirectories, directory),
        )

    def _check_empty(self, directory: int) -> None:
        query = "SELECT 1 FROM dentries WHERE parent = ? LIMIT 1"
        if self._one(query, directory):
            raise fail(errno.ENOTEMPTY)

    def drop(self, inode: int) -> None:
        """Remove an inode that has no name and that nobody uses; its backing file goes at `commit`."""
        with self.change():
            if stat.S_ISREG(self.get(inode).mode):
                self._dropped.append(inode)
            self._drop_rows(inode)

    def _drop_rows(self, inode: int) -> None:
        for table in ("extents", "xattrs", "symlinks", "alignments"):
            self.db.execute(f"DELETE FROM {table} WHERE inode = ?", (inode,))  # noqa: S608
        self.db.execute("DELETE FROM inodes WHERE id = ?", (inode,))

    # --------------------------------------------------------------------------------- attributes

    def set_attributes(self, inode: int, **columns: int) -> None:
        """Set columns of an inode, as the schema names them.

        The times of a regular file's backing file are the caller's business (`BackingFiles.set_times`).
        """
        assignments = ", ".join(f"{column} = ?" for column in columns)
        with self.change():
            self.db.execute(
                f"UPDATE inodes SET {assignments} WHERE id = ?",  # noqa: S608
                (*columns.values(), inode),
            )

    def xattr(self, inode: int, name: bytes) -> bytes:
        """The value of an extended attribute; ENODATA."""
        row = self._one("SELECT value FROM xattrs WHERE inode = ? AND name = ?", inode, name)
        if row is None:
            raise fail(errno.ENODATA)
        return bytes(row[0])

    def has_xattr(self, inode: int, name: bytes) -> bool:
        """Whether an inode has the extended attribute."""
        query = "SELECT 1 FROM xattrs WHERE inode = ? AND name = ?"
        return self._one(query, inode, name) is not None

    def xattrs(self, inode: int) -> dict[bytes, bytes]:
        """All extended attributes of an inode."""
        return dict(self._all("SELECT name, value FROM xattrs WHERE inode = ?", inode))

    def set_xattr(self, inode: int, name: bytes, value: bytes) -> None:
        """Set an extended attribute; moves ctime."""
        self._check_room()
        with self.change():
            self.db.execute("INSERT OR REPLACE INTO xattrs VALUES (?, ?, ?)", (inode, name, value))
            self.set_attributes(inode, ctime_ns=time.time_ns())

    def remove_xattr(self, inode: int, name: bytes) -> None:
        """Remove an extended attribute; moves ctime; ENODATA."""
        with self.change():
            self.xattr(inode, name)
            self.db.execute("DELETE FROM xattrs WHERE inode = ? AND name = ?", (inode, name))
            self.set_attributes(inode, ctime_ns=time.time_ns())

    # ------------------------------------------------------------------------------------ content

    def begin_writing(self, inode: int) -> bool:
        """Record that a regular file's content may change from now on.

        True: the file was clean on disk, so the caller must `commit` before it lets anyone write,
        or a crash would leave checksums that claim too much.
        """
        self._settled.discard(inode)
        self._flushing.discard(inode)
        if not self.get(inode).writing:
            with self.change():
                self.db.execute("UPDATE inodes SET writing = 1 WHERE id = ?", (inode,))
                self.db.execute("DELETE FROM alignments WHERE inode = ?", (inode,))
            if inode not in self._new:
                self._marked.add(inode)
        return inode in self._marked

    def is_settled(self, row: Inode) -> bool:
        """Whether checksums and `huge` are those of the content, committed or about to be."""
        return not row.writing or row.id in self._settled or row.id in self._flushing

    def has_writer(self, inode: int) -> bool:
        """Whether a process has the backing file open for writing, or mapped so; raises OSError."""
        with self.backing.opened(inode) as fd:
            return backing.has_writer(fd)

    def sum(self, inode: int) -> list[tuple[int, bytes]]:
        """Read a backing file through: its checksums, by extent number. For any thread; raises OSError."""
        with self.backing.opened(inode) as fd:
            return backing.checksums(fd, os.fstat(fd).st_size)

    def record_checksums(
        self, inode: int, checksums: list[tuple[int, bytes]], *, huge: bool | None = None
    ) -> None:
        """Record what a settled file holds, as found by `sum`; it is clean after a commit.

        Its times may have been set while it was summed: they stay.
        """
        with self.change():
            if huge is not None:
                self.set_attributes(inode, huge=int(huge))
            self.set_checksums(inode, checksums)
        self._settled.add(inode)

    def record_stat(self, inode: int, st: os.stat_result) -> None:
        """Record size, blocks and times of a file as its backing file has them."""
        row = as_written(self.get(inode), st)
        self.set_attributes(
            inode, size=row.size, blocks=row.blocks, mtime_ns=row.mtime_ns, ctime_ns=row.ctime_ns
        )

    def set_checksums(self, inode: int, checksums: list[tuple[int, bytes]]) -> None:
        """Replace the checksums of an inode's extents."""
        with self.change():
            self.db.execute("DELETE FROM extents WHERE inode = ?", (inode,))
            self.db.executemany(
                "INSERT INTO extents VALUES (?, ?, ?)", [(inode, n, c) for n, c in checksums]
            )

    def checksums(self, inode: int) -> dict[int, bytes]:
        """The recorded checksum of each extent that holds data, by extent number."""
        return dict(self._all("SELECT number, checksum FROM extents WHERE inode = ?", inode))

    def alignment(self, inode: int) -> tuple[int, bytes] | None:
        """(original size in bytes, record) of a file whose text the import aligned, or None."""
        row = self._one("SELECT original_size, record FROM alignments WHERE inode = ?", inode)
        return None if row is None else (int(row[0]), bytes(row[1]))

    def set_alignment(self, inode: int, original_size: int, record: bytes) -> None:
        """Record what the import changed of a file."""
        with self.change():
            self.db.execute(
                "INSERT OR REPLACE INTO alignments VALUES (?, ?, ?)", (inode, original_size, record)
            )


def _first_rows(db: apsw.Connection, mode: int, uid: int, gid: int) -> None:
    """What a new store's meta.db holds: the superblock, and the root directory."""
    schema.create(db)
    now = time.time_ns()
    root = Inode(
        id=schema.ROOT_INODE,
        mode=stat.S_IFDIR | mode,
        uid=uid,
        gid=gid,
        nlink=2,
        size=0,
        blocks=0,
        rdev=0,
        atime_ns=now,
        mtime_ns=now,
        ctime_ns=now,
        btime_ns=now,
        huge=0,
        writing=0,
    )
    db.execute(_NEW, root)
    db.execute("INSERT INTO superblock VALUES (1, ?, ?, 1)", (str(uuid.uuid4()), now))


def path_of(db: apsw.Connection, inode: int) -> bytes | None:
    """One path of the inode from the root, or None where it has none that leads there."""
    parts: list[bytes] = []
    seen = set()
    while inode != schema.ROOT_INODE:
        query = "SELECT parent, name FROM dentries WHERE inode = ? ORDER BY id"
        row = db.execute(query, (inode,)).fetchone()
        if row is None or inode in seen:
            return None
        seen.add(inode)
        inode = row[0]
        parts.append(row[1])
    return b"/" + b"/".join(reversed(parts))


def given(db: apsw.Connection) -> int:
    """The highest inode number that was given, by the metadata; 0: the metadata does not know."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'inodes'").fetchone()
    return int(row[0]) if row else 0


def _check_name(name: bytes) -> None:
    if len(name) > NAME_MAX:
        raise fail(errno.ENAMETOOLONG)
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise fail(errno.EINVAL)


def _failure(path: Path, what: str, e: OSError | apsw.Error) -> StoreError:
    """What kept a store as a whole from being made or opened, as the error to raise."""
    if isinstance(e, apsw.FullError) or (isinstance(e, OSError) and e.errno in FULL):
        return DiskFullError(path)
    return StoreError(f"{path}: {what}: {_reason(e)}")


def _reason(e: Any) -> str:
    return str(getattr(e, "strerror", None) or e)
