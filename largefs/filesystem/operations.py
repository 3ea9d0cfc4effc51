"""The filesystem as the kernel calls it: every FUSE operation, over a store.

Guarantees
    No exception but FUSEError leaves a handler, and none leaves forget, from which pyfuse3 takes not
    even that one: what was not foreseen is logged and becomes EIO.
    Sizes and times in replies are true when they are sent, and attributes that could change without
    the kernel's knowledge are sent with a timeout of 0.
    The kernel checks access (default_permissions); the handlers keep the rest of POSIX: link counts,
    times, set-ID bits, ACL inheritance.
"""

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FUSEError,
    InodeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from largefs.filesystem import acl, hints
from largefs.filesystem.attributes import entry, entry_in_writing, missing
from largefs.filesystem.commits import Commits
from largefs.filesystem.files import (
    Files,
    drop_privilege_bits,
    handle,
    inode_of,
    is_writable,
    write_back,
)
from largefs.filesystem.hints import Hints
from largefs.filesystem.verify import Verify
from largefs.filesystem.warmup import Warmup
from largefs.store import Inode, Store, StoreError
from largefs.store.backing import FALLOC_FL_KEEP_SIZE, fallocate, write_full
from largefs.store.errors import fail
from largefs.store.store import NAME_MAX, RENAME_EXCHANGE, RENAME_WHITEOUT

log = logging.getLogger(__name__)

INLINE: Final = 64 * 1024
"""Bytes: writes up to this size go to the page cache without a thread, which would cost more."""

DOT_ENTRIES: Final = 2
"""readdir() positions 1 and 2 are behind '.' and '..'; an entry's own is its id and 2."""

CAPABILITY: Final = b"security.capability"

P = ParamSpec("P")
T = TypeVar("T")
Method = Callable[Concatenate["Filesystem", P], Coroutine[Any, Any, T]]


def handler(method: Method[P, T]) -> Method[P, T]:
    """Let nothing but FUSEError leave an operation: anything else ends the mount for everyone."""

    @functools.wraps(method)
    async def guarded(self: "Filesystem", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except FUSEError:
            raise
        except OSError as e:
            if e.errno is None or e.errno in (errno.EIO, errno.EBADF, errno.EFAULT):
                log.exception("%s%r failed", method.__name__, args[:2])
            raise FUSEError(e.errno or errno.EIO) from None
        except StoreError as e:
            log.error("%s", e)
            raise FUSEError(e.errno) from None
        except Exception:
            log.exception("%s%r failed", method.__name__, args[:2])
            raise FUSEError(errno.EIO) from None

    return guarded


class Filesystem(pyfuse3.Operations):
    """pyfuse3's Operations, and those that the channel adds, over an open store."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(
        self,
        store: Store,
        files: Files,
        commits: Commits,
        hints: Hints,
        warmup: Warmup,
        verify: Verify,
        *,
        opendir_needed: bool,
    ) -> None:
        super().__init__()
        self._store = store
        self._files = files
        self._commits = commits
        self._hints = hints
        self._warmup = warmup
        self._verify = verify
        self._opendir_needed = opendir_needed
        self._lookups: dict[int, int] = {}  # what the kernel holds, to be given back by forget
        self._capability_removed: dict[int, int] = {}  # inode -> the task, until its next setattr

    # ---------------------------------------------------------------------------------- replies

    def _attributes(self, row: Inode) -> EntryAttributes:
        if row.id in self._files.writing:
            return entry_in_writing(row, self._files.stat_in_writing(row.id))
        return entry(row)

    def _entry(self, row: Inode) -> EntryAttributes:
        """Attributes in a reply that also makes the kernel hold the inode."""
        attributes = self._attributes(row)
        self._lookups[row.id] = self._lookups.get(row.id, 0) + 1
        return attributes

    # ----------------------------------------------------------------------------- names, inodes

    @handler
    async def lookup(self, parent: InodeT, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name; '.' and '..' come from NFS exports."""
        if name == b".":
            return self._entry(self._store.get(parent))
        if name == b"..":
            return self._entry(self._store.get(self._store.parent_of(parent)))
        row = self._store.find(parent, name)
        if row is None:
            if len(name) > NAME_MAX:
                raise fail(errno.ENAMETOOLONG)
            return missing()
        return self._entry(row)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """The kernel holds these inodes so many times less. It takes no answer, so no error either.

        What could not be dropped is found when the store is opened again.
        """
        for inode, count in inode_list:
            left = self._lookups.get(inode, 0) - count
            if left > 0:
                self._lookups[inode] = left
                continue
            self._lookups.pop(inode, None)
            self._capability_removed.pop(inode, None)
            try:
                self._drop_if_unused(inode)
            except Exception:
                log.exception("inode %d: not dropped", inode)

    def _drop_if_unused(self, inode: int) -> None:
        if inode in self._lookups or self._files.is_open(inode):
            return
        try:
            if self._store.get(inode).nlink:
                return
            self._files.forget(inode)
            self._store.drop(inode)
        except FileNotFoundError:
            return

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """stat(2)."""
        return self._attributes(self._store.get(inode))

    @handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """chmod, chown, utimensat and truncate."""
        row = self._store.get(inode)
        if fields.update_size:
            await self._truncate(row, attr.st_size, fh)
            row = self._store.get(inode)
        columns: dict[str, int] = {}
        if fields.update_mode:
            columns["mode"] = stat.S_IFMT(row.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            columns["uid"] = attr.st_uid
        if fields.update_gid:
            columns["gid"] = attr.st_gid
        if fields.update_atime:
            columns["atime_ns"] = _clamp(attr.st_atime_ns)
        if fields.update_mtime:
            columns["mtime_ns"] = _clamp(attr.st_mtime_ns)
        with self._store.change():
            if self._must_kill_privileges(row, fields, ctx):
                self.kill_privileges(inode)
            columns["ctime_ns"] = time.time_ns()
            if "mode" in columns:
                acl.follow_mode(self._store, inode, columns["mode"])
            if fields.update_mtime and stat.S_ISREG(row.mode):
                backing = self._store.backing
                backing.set_times(inode, columns.get("atime_ns", row.atime_ns), columns["mtime_ns"])
                columns["mtime_ns"] = backing.stat(inode).st_mtime_ns  # that one has limits too
            self._store.set_attributes(inode, **columns)
        return self._attributes(self._store.get(inode))

    def _must_kill_privileges(self, row: Inode, fields: SetattrFields, ctx: RequestContext) -> bool:
        """Whether a SETATTR takes privileges away: that of chown(2), and one that names nothing.

        The latter is all we hear of chown(path, -1, -1), and of a write that the kernel passes through
        to a file with privileges (file_remove_privs(); fuse_setattr() strikes out what it is about).
        Root's write takes only the capability, by a REMOVEXATTR of its own; the SETATTR after it, of the
        same task under the same inode lock, takes nothing. Without a capability root's write sends
        neither. Not told apart: root's chown(path, -1, -1) of a file with a capability in writing.
        """
        only_capability = self._capability_removed.pop(row.id, None) == ctx.pid
        if stat.S_ISDIR(row.mode) or fields.update_mode:
            return False
        if fields.update_uid or fields.update_gid:
            return True
        if fields.update_size or fields.update_atime or fields.update_mtime:
            return False
        return bool(ctx.uid) or not only_capability or row.id not in self._files.writing

    async def _truncate(self, row: Inode, size: int, fh: FileHandleT | None) -> None:
        if not stat.S_ISREG(row.mode):
            raise fail(errno.EISDIR if stat.S_ISDIR(row.mode) else errno.EINVAL)
        if fh is not None and is_writable(fh):
            os.ftruncate(self._files.write_fd(fh), size)
        else:
            await self._files.change(row.id, lambda fd: os.ftruncate(fd, size))
        self._remove_capability(row.id)

    def kill_privileges(self, inode: int) -> None:
        """Clear what a file's old content was trusted with: set-ID bits and capabilities.

        The channel calls it where the kernel asks for it (FUSE_HANDLE_KILLPRIV_V2): at a write or
        truncation by somebody without CAP_FSETID.
        """
        row = self._store.get(inode)
        if (mode := drop_privilege_bits(row)) != row.mode:
            self._store.set_attributes(inode, mode=mode, ctime_ns=time.time_ns())
        self._remove_capability(inode)

    def _remove_capability(self, inode: int) -> None:
        if self._store.has_xattr(inode, CAPABILITY):
            self._store.remove_xattr(inode, CAPABILITY)

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> bytes:
        """readlink(2)."""
        return self._store.readlink(inode)

    def _make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        ctx: RequestContext,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Inode:
        with self._store.change():
            inherited = acl.inherited(self._store, parent, mode, ctx.umask)
            row = self._store.make(
                parent, name, inherited.mode, ctx.uid, ctx.gid, rdev=rdev, target=target
            )
            for xattr, value in inherited.xattrs.items():
                self._store.set_xattr(row.id, xattr, value)
        return row

    @handler
    async def mknod(
        self, parent_inode: InodeT, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """mknod(2), of regular files too (an NFS server makes them so)."""
        row = self._make(parent_inode, name, mode, ctx, rdev=rdev)
        if stat.S_ISREG(mode):
            self._store.record_checksums(row.id, [], huge=False)
            row = self._store.get(row.id)
        return self._entry(row)

    @handler
    async def mkdir(
        self, parent_inode: InodeT, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """mkdir(2)."""
        return self._entry(self._make(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode), ctx))

    @handler
    async def symlink(
        self, parent_inode: InodeT, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """symlink(2)."""
        return self._entry(
            self._make(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target=bytes(target))
        )

    @handler
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """link(2)."""
        return self._entry(self._store.link(inode, new_parent_inode, new_name))

    @handler
    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """unlink(2); the inode lives on while it is used."""
        self._drop_if_unused(self._store.unlink(parent_inode, name).id)

    @handler
    async def rmdir(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """rmdir(2); the inode lives on while it is used."""
        self._drop_if_unused(self._store.rmdir(parent_inode, name).id)

    @handler
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: bytes,
        parent_inode_new: InodeT,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """rename(2), renameat2(2).

        A file that replaces another is flushed first, so that after a crash the name holds the old
        content or the new, never an empty file. RENAME_WHITEOUT leaves a character device 0:0 under the
        old name, at once: overlayfs's sign for what is not there.
        """
        whiteout = flags & RENAME_WHITEOUT
        if whiteout and flags & RENAME_EXCHANGE:
            raise fail(errno.EINVAL)
        row = self._store.lookup(parent_inode_old, name_old)
        if row.writing and self._store.find(parent_inode_new, name_new):
            with self._store.flushing():
                await trio.to_thread.run_sync(self._store.backing.flush, [row.id])
        old, new = (parent_inode_old, name_old), (parent_inode_new, name_new)
        with self._store.change():
            replaced = self._store.rename(*old, *new, flags & ~RENAME_WHITEOUT)
            if whiteout and self._store.find(*old) is None:  # else both named the same inode
                self._make(*old, stat.S_IFCHR, ctx)
        if replaced is not None:
            self._drop_if_unused(replaced.id)

    # -------------------------------------------------------------------------------- directories

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Not needed where READDIR carries the inode: ENOSYS, and the kernel never asks again.

        It then also caches directories for as long as nothing changes (FUSE_NO_OPENDIR_SUPPORT).
        """
        if not self._opendir_needed:
            raise fail(errno.ENOSYS)
        return FileHandleT(inode)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """List a directory with its attributes: one query, read as far as the reply has room."""
        if start_id == 0:
            here = entry(self._store.get(fh))
            if not pyfuse3.readdir_reply(token, b".", here, 1):
                return
        if start_id <= 1:
            above = entry(self._store.get(self._store.parent_of(fh)))
            if not pyfuse3.readdir_reply(token, b"..", above, 2):
                return
        for position, name, row in self._store.entries(fh, max(0, start_id - DOT_ENTRIES)):
            attributes = self._attributes(row)
            if not pyfuse3.readdir_reply(token, name, attributes, position + DOT_ENTRIES):
                return
            self._lookups[row.id] = self._lookups.get(row.id, 0) + 1

    @handler
    async def releasedir(self, fh: FileHandleT) -> None:
        """Nothing is kept for an open directory."""

    @handler
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """fsync(2) of a directory: its names become durable, and what was removed gives its room back."""
        await self._commits.commit()
        await self._commits.remove_dropped()

    # -------------------------------------------------------------------------------------- files

    @handler
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        """open(2); the kernel passes O_TRUNC here (FUSE_ATOMIC_O_TRUNC)."""
        truncate = bool(flags & os.O_TRUNC)
        writable = truncate or flags & os.O_ACCMODE != os.O_RDONLY
        file = await self._files.open(inode, writable=writable)
        fh = handle(inode, writable=writable)
        try:
            if truncate:
                if ctx.uid and not self._files.told_of_privileges:
                    self.kill_privileges(inode)
                self._remove_capability(inode)
                os.ftruncate(self._files.write_fd(fh), 0)
            if not writable:
                await self._before_reading(self._store.get(inode), file.fd, flags, ctx.pid)
        except BaseException:
            self._files.release(fh)
            raise
        self._files.announce(file, fh)
        return FileInfo(fh=fh, keep_cache=True)

    async def _before_reading(self, row: Inode, fd: int, flags: int, pid: int) -> None:
        await self._verify.on_open(row)
        await self._warmup.on_open(row, fd, flags, pid)

    @handler
    async def create(
        self, parent_inode: InodeT, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """open(2) with O_CREAT of a name that is not there."""
        row = self._make(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode), ctx)
        try:
            return await self._open_new(row)
        except BaseException:  # as EMFILE: then no file must be left behind
            self._drop_if_unused(self._store.unlink(parent_inode, name).id)
            raise

    async def _open_new(self, row: Inode) -> tuple[FileInfo, EntryAttributes]:
        file = await self._files.open(row.id, writable=True, new=True)
        fh = handle(row.id, writable=True)
        self._files.announce(file, fh)
        return FileInfo(fh=fh, keep_cache=True), self._entry(row)

    @handler
    async def tmpfile(
        self, parent_inode: InodeT, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """open(2) with O_TMPFILE: a file without a name, which linkat(2) may name later."""
        with self._store.change():
            above = self._store.get(parent_inode)
            name = b".tmpfile-%d" % time.monotonic_ns()
            row = self._make(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode), ctx)
            row = self._store.unlink(parent_inode, name)
            self._store.set_attributes(  # nothing happened to the directory
                parent_inode, mtime_ns=above.mtime_ns, ctime_ns=above.ctime_ns
            )
        try:
            return await self._open_new(row)
        except BaseException:
            self._drop_if_unused(row.id)
            raise

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Read where the kernel does not do it itself: from memory at once, from disk in a thread."""
        fd = self._files.fd(fh)
        buffer = memoryview(bytearray(size))
        try:
            got = os.preadv(fd, [buffer], off, os.RWF_NOWAIT)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            got = 0
        while got < size:
            n = await trio.to_thread.run_sync(os.preadv, fd, [buffer[got:]], off + got)
            if n == 0:
                break
            got += n
        return cast(bytes, buffer[:got])  # pyfuse3 takes any buffer; a copy would cost more

    @handler
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write where the kernel does not do it itself."""
        fd = self._files.write_fd(fh)
        self._remove_capability(inode_of(fh))
        if len(buf) <= INLINE:
            write_full(fd, buf, off)
        else:
            await trio.to_thread.run_sync(write_full, fd, buf, off)
        return len(buf)

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        """close(2) of one descriptor: nothing is held back, so the kernel need not ask again."""
        raise fail(errno.ENOSYS)

    @handler
    async def release(self, fh: FileHandleT) -> None:
        """The last descriptor of an open file was closed."""
        self._files.release(fh)
        self._drop_if_unused(inode_of(fh))

    @handler
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """fsync(2): the extents, then the metadata."""
        with self._store.flushing():
            await trio.to_thread.run_sync(os.fsync, self._files.fd(fh))
        await self._commits.commit()

    @handler
    async def fallocate(self, fh: FileHandleT, mode: int, offset: int, length: int) -> None:
        """fallocate(2), in all modes that the backing filesystem has."""
        fd = self._files.write_fd(fh)
        await trio.to_thread.run_sync(fallocate, fd, mode, offset, length)
        if mode & ~FALLOC_FL_KEEP_SIZE:
            os.utime(fd, ns=(self._store.get(inode_of(fh)).atime_ns, time.time_ns()))

    @handler
    async def lseek(self, fh: FileHandleT, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA and SEEK_HOLE.

        The kernel asks without first writing back what a mapping dirtied in its own cache
        (fuse_lseek() in fs/fuse/file.c): we have it do so, lest data is said to be a hole.
        """
        inode = inode_of(fh)
        if inode in self._files.writing and not self._files.passthrough:
            await trio.to_thread.run_sync(write_back, inode)
        return os.lseek(self._files.fd(fh), offset, whence)

    @handler
    async def copy_file_range(
        self,
        fh_in: FileHandleT,
        offset_in: int,
        fh_out: FileHandleT,
        offset_out: int,
        length: int,
        flags: int,
    ) -> int:
        """copy_file_range(2): the backing filesystem copies or shares."""
        return await trio.to_thread.run_sync(
            os.copy_file_range,
            self._files.fd(fh_in),
            self._files.write_fd(fh_out),
            length,
            offset_in,
            offset_out,
        )

    # ------------------------------------------------------------------------- attributes, the rest

    @handler
    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        """getxattr(2); user.largefs.* are made up on the spot."""
        if name.startswith(hints.PREFIX):
            return await self._hints.value(self._store.get(inode), name)
        return self._store.xattr(inode, name)

    @handler
    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """setxattr(2). An access ACL also sets the permission bits."""
        _check_namespace(name)
        with self._store.change():
            if name == acl.ACCESS and not acl.set_access(
                self._store, inode, value, ctx.uid, _groups(ctx)
            ):
                return
            self._store.set_xattr(inode, name, value)

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[bytes]:
        """listxattr(2); user.largefs.* are not listed, so that no copy takes them along.

        Nor is trusted.* to ordinary users, for whom the kernel itself refuses to get it
        (xattr_permission()).
        """
        return [
            name
            for name in self._store.xattrs(inode)
            if not (ctx.uid and name.startswith(b"trusted."))
        ]

    @handler
    async def removexattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        """removexattr(2). To remove an ACL that is not there is no error."""
        _check_namespace(name)
        if name in (acl.ACCESS, acl.DEFAULT) and not self._store.has_xattr(inode, name):
            return
        self._store.remove_xattr(inode, name)
        if name == CAPABILITY:
            self._capability_removed[inode] = ctx.pid

    @handler
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """statvfs(3): the room of the filesystem that holds the store."""
        below = os.fstatvfs(self._store.backing.fd)
        s = StatvfsData()
        for field in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
        ):
            setattr(s, field, getattr(below, field))
        s.f_namemax = NAME_MAX
        return s


def _clamp(ns: int) -> int:
    """A time within what the store can hold, as timestamp_truncate() in fs/inode.c does it."""
    return max(-(2**63), min(ns, 2**63 - 1))


def _groups(ctx: RequestContext) -> set[int]:
    """The groups that the caller is in; without the supplementary ones if it is of another PID namespace."""
    try:
        return {ctx.gid, *pyfuse3.get_sup_groups(ctx.pid)}
    except OSError:
        return {ctx.gid}


def _check_namespace(name: bytes) -> None:
    """Refuse names that are ours or nobody's, as xattr_resolve_name() in fs/xattr.c does."""
    if name.startswith(hints.PREFIX):
        raise fail(errno.EPERM)
    if name in (acl.ACCESS, acl.DEFAULT):
        return
    for namespace in (b"user.", b"trusted.", b"security."):
        if name.startswith(namespace):
            if name == namespace:
                raise fail(errno.EINVAL)
            return
    raise fail(errno.EOPNOTSUPP)
