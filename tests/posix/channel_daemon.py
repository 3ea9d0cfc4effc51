"""A small pyfuse3 filesystem over one flat directory, for the tests of the channel.

    python channel_daemon.py OPTIONS-AS-JSON SOURCE MOUNTPOINT

Prints a JSON line when INIT is settled and, with "trace", one for each READ and WRITE; ends when
unmounted. Node ids are 1 for the root and the source's inode numbers for its files.
"""

import ctypes
import errno
import json
import os
import stat
import sys
from typing import Any

from largefs.channel import Channel, Unavailable, Wanted, load

options: dict[str, Any] = json.loads(sys.argv[1])
source = sys.argv[2]
libc = ctypes.CDLL(None, use_errno=True)
try:
    if options.get("absent"):
        raise Unavailable("as asked")
    channel: Channel | None = load()
except Unavailable:
    channel = None

import pyfuse3  # noqa: E402  (after load)
import trio  # noqa: E402


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


class Flat(pyfuse3.Operations):
    """Every file of `source`; a handle is a file descriptor, and 0 for the directory."""

    enable_writeback_cache = options.get("writeback", False)

    def __init__(self) -> None:
        super().__init__()
        self.path: dict[int, str] = {}
        self.backing: dict[int, int] = {}

    def attributes(self, st: os.stat_result, inode: int = 0) -> pyfuse3.EntryAttributes:
        e = pyfuse3.EntryAttributes()
        e.st_ino = inode or st.st_ino
        for name in ("mode", "nlink", "uid", "gid", "size", "blocks", "blksize"):
            setattr(e, f"st_{name}", getattr(st, f"st_{name}"))
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(e, name, getattr(st, name))
        e.entry_timeout = e.attr_timeout = options.get("timeout", 1.0)
        return e

    def at(self, inode: int) -> str:
        return source if inode == pyfuse3.ROOT_INODE else self.path[inode]

    async def getattr(self, inode, ctx=None):
        return self.attributes(
            os.stat(self.at(inode), follow_symlinks="/proc/" in self.at(inode)), inode
        )

    async def lookup(self, parent, name, ctx=None):
        path = os.path.join(source, os.fsdecode(name))
        try:
            st = os.lstat(path)
        except OSError as e:
            raise pyfuse3.FUSEError(e.errno) from e
        self.path[st.st_ino] = path
        return self.attributes(st)

    def kill_privileges(self, inode):
        st = os.stat(self.at(inode))
        os.chmod(self.at(inode), stat.S_IMODE(st.st_mode) & ~(stat.S_ISUID | stat.S_ISGID))

    async def setattr(self, inode, attr, fields, fh, ctx):
        if fields.update_size:
            os.truncate(self.at(inode), attr.st_size)
        if fields.update_mode:
            os.chmod(self.at(inode), stat.S_IMODE(attr.st_mode))
        return await self.getattr(inode)

    def opened(self, fd: int, direct: bool = False) -> pyfuse3.FileInfo:
        if channel and channel.negotiated and channel.negotiated.passthrough:
            inode = os.fstat(fd).st_ino
            if inode not in self.backing:
                self.backing[inode] = channel.backing_open(fd)
            channel.pass_through(fd, self.backing[inode])
        return pyfuse3.FileInfo(fh=fd, direct_io=direct, keep_cache=True)

    async def open(self, inode, flags, ctx):
        fd = os.open(self.at(inode), os.O_RDWR | flags & os.O_TRUNC)
        told = channel and channel.negotiated and channel.negotiated.kill_privileges
        if flags & os.O_TRUNC and ctx.uid and not told:
            self.kill_privileges(inode)
        privileged = os.fstat(fd).st_mode & (stat.S_ISUID | stat.S_ISGID)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        return self.opened(fd, direct=bool(writes and privileged))

    async def create(self, parent, name, mode, flags, ctx):
        path = os.path.join(source, os.fsdecode(name))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | flags & os.O_EXCL, mode)
        st = os.fstat(fd)
        self.path[st.st_ino] = path
        return self.opened(fd), self.attributes(st)

    async def release(self, fh):
        os.close(fh)

    async def read(self, fh, off, size):
        if options.get("trace"):
            say(read=size, at=off)
        return os.pread(fh, size, off)

    async def write(self, fh, off, buf):
        if options.get("trace"):
            say(write=len(buf), at=off)
        return os.pwrite(fh, buf, off)

    async def fsync(self, fh, datasync):
        os.fsync(fh)

    async def flush(self, fh):
        pass

    async def fallocate(self, fh, mode, offset, length):
        if offset == options.get("bug_at"):
            raise ValueError("a bug in a handler")
        if libc.fallocate(fh, mode, ctypes.c_long(offset), ctypes.c_long(length)):
            raise pyfuse3.FUSEError(ctypes.get_errno())

    async def lseek(self, fh, offset, whence):
        try:
            return os.lseek(fh, offset, whence)
        except OSError as e:
            raise pyfuse3.FUSEError(e.errno) from e

    async def copy_file_range(self, fh_in, offset_in, fh_out, offset_out, length, flags):
        return os.copy_file_range(fh_in, fh_out, length, offset_in, offset_out)

    async def tmpfile(self, parent, mode, flags, ctx):
        fd = os.open(source, os.O_TMPFILE | os.O_RDWR, mode)
        st = os.fstat(fd)
        self.path[st.st_ino] = f"/proc/self/fd/{fd}"
        return self.opened(fd), self.attributes(st)

    async def unlink(self, parent, name, ctx):
        os.unlink(os.path.join(source, os.fsdecode(name)))

    async def opendir(self, inode, ctx):
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def readdir(self, fh, start_id, token):
        assert fh == pyfuse3.ROOT_INODE or channel is None, fh
        for i, name in enumerate(sorted(os.listdir(source))):
            if i < start_id:
                continue
            st = os.lstat(os.path.join(source, name))
            self.path[st.st_ino] = os.path.join(source, name)
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self.attributes(st), i + 1):
                break

    async def fsyncdir(self, fh, datasync):
        assert fh == pyfuse3.ROOT_INODE or channel is None, fh

    async def getxattr(self, inode, name, ctx):
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    async def statfs(self, ctx):
        s = os.statvfs(source)
        data = pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(data, f"f_{name}", getattr(s, f"f_{name}"))
        data.f_namemax = 255
        return data


async def main() -> None:
    operations = Flat()
    if channel and options.get("want", True):
        channel.want(Wanted(**options.get("wanted", {"passthrough": False})))
    pyfuse3.init(operations, sys.argv[3], {"default_permissions", "allow_other", "fsname=flat"})
    try:
        async with trio.open_nursery() as nursery:
            if channel:
                nursery.start_soon(channel.serve, operations)
            nursery.start_soon(settled)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)


async def settled() -> None:
    while channel and options.get("want", True) and not channel.negotiated:
        await trio.sleep(0.01)
    n = channel and channel.negotiated
    say(negotiated=n and vars(n))


trio.run(main)
