"""Every operation gives on a mount what it gives on the host's filesystem: result, errno, attributes.

A case is a function that gets an empty directory and yields what it saw. It is run on a directory of
the host and on a mount (by passthrough, and served by the daemon); the two lists must be equal.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounts import Mounts
from tests.users import NOBODY, become

Case = Callable[[str], Iterator[object]]
CASES: list[Case] = []

MIB = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT = 1, 2, 8, 16, 32


def case(function: Case) -> Case:
    CASES.append(function)
    return function


def outcome(function: Callable[..., object], *args: object, **kwargs: object) -> object:
    """What a call returns, or the errno it fails with."""
    try:
        result = function(*args, **kwargs)
    except OSError as e:
        return errno.errorcode[e.errno or 0]
    return result if isinstance(result, int | bytes | str | tuple) else None


def seen(path: str) -> tuple[object, ...]:
    """What lstat says, without what is the filesystem's own."""
    st = os.lstat(path)
    size = 0 if stat.S_ISDIR(st.st_mode) else st.st_size
    return oct(st.st_mode), st.st_nlink, st.st_uid, st.st_gid, size, st.st_rdev


def times_moved(path: str, action: Callable[[], object]) -> tuple[bool, bool]:
    """Whether an action moves mtime and ctime."""
    before = os.lstat(path)
    time.sleep(0.02)
    action()
    after = os.lstat(path)
    assert after.st_mtime_ns >= before.st_mtime_ns
    return after.st_mtime_ns != before.st_mtime_ns, after.st_ctime_ns != before.st_ctime_ns


def write(path: str, data: bytes = b"") -> str:
    with open(path, "wb") as f:
        f.write(data)
    return path


def create(path: str) -> None:
    write(path)


def read(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def renameat2(old: str, new: str, flags: int) -> None:
    at = -100  # AT_FDCWD
    if libc.renameat2(at, os.fsencode(old), at, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, mode, offset, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def linkat(fd: int, path: str) -> None:
    """Name what a descriptor refers to (linkat(2), AT_SYMLINK_FOLLOW; os.link() does not follow)."""
    if libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, os.fsencode(path), 0x400):
        raise OSError(ctypes.get_errno(), "linkat")


def as_nobody(function: Callable[..., object], *args: object) -> object:
    """The outcome of a call made by an unprivileged user, in a child process."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become(NOBODY)
            os.write(writing, repr(outcome(function, *args)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


@case
def names(d: str) -> Iterator[object]:
    write(d + "/a", b"x")
    yield seen(d + "/a")
    yield outcome(os.open, d + "/a", os.O_CREAT | os.O_EXCL)
    yield outcome(os.stat, d + "/missing")
    yield outcome(os.stat, d + "/a/b")
    yield outcome(os.mkdir, d + "/" + "n" * 256)
    yield outcome(os.stat, d + "/" + "n" * 256)
    yield outcome(os.mkdir, d + "/" + "n" * 255)
    yield outcome(os.mkdir, d + "/a")
    odd = os.fsencode(d) + b"/\xff\n*\x01"
    os.mkdir(odd)
    yield outcome(os.mkdir, d + "/.")
    yield sorted(os.listdir(os.fsencode(d)))
    yield outcome(os.mkdir, d + "/missing/x")


@case
def unlink_and_rmdir(d: str) -> Iterator[object]:
    os.makedirs(d + "/sub/inner")
    write(d + "/f")
    yield outcome(os.rmdir, d + "/sub")
    yield outcome(os.unlink, d + "/sub")
    yield outcome(os.rmdir, d + "/f")
    yield outcome(os.unlink, d + "/missing")
    yield outcome(os.rmdir, d + "/missing")
    yield seen(d + "/sub"), seen(d)
    os.rmdir(d + "/sub/inner")
    yield seen(d + "/sub")
    os.rmdir(d + "/sub")
    os.unlink(d + "/f")
    yield os.listdir(d), seen(d)


@case
def removed_while_open(d: str) -> Iterator[object]:
    fd = os.open(write(d + "/f", b"still here"), os.O_RDWR)
    os.unlink(d + "/f")
    yield os.pread(fd, 100, 0), os.fstat(fd).st_nlink
    os.pwrite(fd, b"and more", 10)
    os.ftruncate(fd, 15)
    os.fsync(fd)
    yield os.pread(fd, 100, 0), os.fstat(fd).st_size
    yield outcome(linkat, fd, d + "/again")
    os.close(fd)
    os.mkdir(d + "/gone")
    fd = os.open(d + "/gone", os.O_RDONLY)
    os.rmdir(d + "/gone")
    yield os.listdir(fd), outcome(os.mkdir, "x", dir_fd=fd), os.fstat(fd).st_nlink
    yield outcome(os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    os.close(fd)


@case
def hard_links(d: str) -> Iterator[object]:
    write(d + "/a", b"x")
    os.link(d + "/a", d + "/b")
    yield seen(d + "/a"), seen(d + "/b"), os.path.samefile(d + "/a", d + "/b")
    yield outcome(os.link, d + "/a", d + "/b")
    os.mkdir(d + "/dir")
    yield outcome(os.link, d + "/dir", d + "/c")
    os.symlink("a", d + "/s")
    os.link(d + "/s", d + "/s2", follow_symlinks=False)
    yield seen(d + "/s2")
    yield times_moved(d + "/a", lambda: os.link(d + "/b", d + "/c"))
    yield times_moved(d + "/a", lambda: os.unlink(d + "/c"))
    os.unlink(d + "/a")
    yield seen(d + "/b"), read(d + "/b")


@case
def symlinks(d: str) -> Iterator[object]:
    os.symlink("target", d + "/s")
    yield os.readlink(d + "/s"), seen(d + "/s"), outcome(os.stat, d + "/s")
    yield outcome(os.symlink, "t" * 4095, d + "/long"), outcome(os.symlink, "t" * 4096, d + "/x")
    yield outcome(os.symlink, "", d + "/empty"), outcome(os.symlink, "t", d + "/s")
    os.symlink("loop", d + "/loop")
    yield outcome(os.stat, d + "/loop"), outcome(os.readlink, d)
    write(d + "/target", b"seen through")
    yield read(d + "/s")
    os.chown(d + "/s", 12, 34, follow_symlinks=False)
    yield seen(d + "/s"), seen(d + "/target")


@case
def special_files(d: str) -> Iterator[object]:
    os.mkfifo(d + "/fifo", 0o640)
    os.mknod(d + "/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(d + "/disk", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
    os.mknod(d + "/plain", stat.S_IFREG | 0o600)
    s = socket.socket(socket.AF_UNIX)
    s.bind(d + "/sock")
    s.close()
    yield [seen(d + "/" + n) for n in sorted(os.listdir(d))]
    fd = os.open(d + "/plain", os.O_RDWR)
    os.write(fd, b"x")
    os.close(fd)
    yield seen(d + "/plain")


@case
def renaming(d: str) -> Iterator[object]:
    write(d + "/a", b"a")
    write(d + "/b", b"b")
    os.makedirs(d + "/x/inner")
    os.mkdir(d + "/y")
    yield outcome(os.rename, d + "/a", d + "/b"), read(d + "/b"), outcome(os.stat, d + "/a")
    yield outcome(os.rename, d + "/b", d + "/x"), outcome(os.rename, d + "/x", d + "/b")
    yield outcome(os.rename, d + "/y", d + "/x"), outcome(os.rename, d + "/x", d + "/x/inner/z")
    yield outcome(os.rename, d + "/x", d + "/y"), seen(d + "/y"), seen(d)
    yield outcome(os.rename, d + "/missing", d + "/b")
    os.mkdir(d + "/z")
    yield outcome(os.rename, d + "/y/inner", d + "/z/inner"), seen(d + "/y"), seen(d + "/z")
    os.link(d + "/b", d + "/b2")
    yield outcome(os.rename, d + "/b", d + "/b2"), seen(d + "/b"), seen(d + "/b2")
    write(d + "/moved")
    yield times_moved(d + "/z", lambda: os.rename(d + "/moved", d + "/z/moved"))
    yield outcome(os.rename, d + "/b", d + "/" + "n" * 256)


@case
def renaming_with_flags(d: str) -> Iterator[object]:
    write(d + "/a", b"a")
    os.mkdir(d + "/dir")
    write(d + "/dir/b", b"b")
    yield outcome(renameat2, d + "/a", d + "/dir", RENAME_NOREPLACE)
    yield outcome(renameat2, d + "/a", d + "/new", RENAME_NOREPLACE), os.path.exists(d + "/a")
    yield outcome(renameat2, d + "/new", d + "/dir", RENAME_EXCHANGE)
    yield read(d + "/dir"), os.listdir(d + "/new"), seen(d + "/new"), seen(d)
    os.mkdir(d + "/p")
    yield outcome(renameat2, d + "/new", d + "/p/none", RENAME_EXCHANGE)
    write(d + "/p/f")
    yield outcome(renameat2, d + "/new", d + "/p/f", RENAME_EXCHANGE), seen(d), seen(d + "/p")
    yield outcome(renameat2, d + "/dir", d + "/q", RENAME_EXCHANGE | RENAME_NOREPLACE)
    os.mkdir(d + "/sub")
    for name, new, flags in (
        ("a", "white", RENAME_WHITEOUT),
        ("b", "white", RENAME_WHITEOUT),
        ("c", "white", RENAME_WHITEOUT | RENAME_NOREPLACE),
        ("d", "whiter", RENAME_WHITEOUT | RENAME_NOREPLACE),
        ("e", "white", RENAME_WHITEOUT | RENAME_EXCHANGE),
        ("sub", "white", RENAME_WHITEOUT),
        ("sub", "whitest", RENAME_WHITEOUT),
    ):
        name = d + "/" + name
        if not os.path.isdir(name):
            write(name)
        yield outcome(renameat2, name, d + "/p/" + new, flags), seen(name), seen(d), seen(d + "/p")
    os.link(write(d + "/one"), d + "/same")
    yield (
        outcome(renameat2, d + "/one", d + "/same", RENAME_WHITEOUT),
        seen(d + "/one"),
        seen(d + "/same"),
    )


@case
def rename_over_an_open_file(d: str) -> Iterator[object]:
    fd = os.open(write(d + "/old", b"old"), os.O_RDONLY)
    write(d + "/new", b"newer")
    os.rename(d + "/new", d + "/old")
    yield os.pread(fd, 10, 0), os.fstat(fd).st_nlink, read(d + "/old"), os.listdir(d)
    os.close(fd)


@case
def attributes(d: str) -> Iterator[object]:
    write(d + "/f", b"12345")
    for mode in (0o4755, 0o2755, 0o1777, 0o000, 0o6777):
        os.chmod(d + "/f", mode)
        yield seen(d + "/f")
        os.chown(d + "/f", 1, 2)
        yield seen(d + "/f")
        os.chown(d + "/f", -1, 5)
        yield seen(d + "/f")
    os.mkdir(d + "/dir")
    os.chmod(d + "/dir", 0o7777)
    os.chown(d + "/dir", 3, 4)
    yield seen(d + "/dir")
    yield times_moved(d + "/f", lambda: os.chmod(d + "/f", 0o644))
    for ns in (0, 1, 10**9 - 1, 1234567890_123456789, -(10**9) - 5):
        os.utime(d + "/f", ns=(ns + 7, ns))
        st = os.stat(d + "/f")
        yield st.st_atime_ns, st.st_mtime_ns
    before = time.time()
    os.utime(d + "/f")
    yield abs(os.stat(d + "/f").st_mtime - before) < 5


@case
def set_id_bits_after_writing(d: str) -> Iterator[object]:
    f = write(d + "/f", b"12345")
    os.chown(f, NOBODY, NOBODY)

    def change(action: Callable[[int], object]) -> int:
        fd = os.open(f, os.O_RDWR)
        try:
            action(fd)
        finally:
            os.close(fd)
        return os.stat(f).st_mode

    for action in (
        lambda fd: os.pwrite(fd, b"x", 0),
        lambda fd: os.ftruncate(fd, 3),
    ):
        for mode in (0o6755, 0o6745):
            os.chmod(f, mode)
            yield as_nobody(change, action)
            os.chmod(f, mode)
            yield oct(change(action))
    os.chmod(f, 0o4755)
    yield as_nobody(lambda: os.stat(f).st_mode if os.truncate(f, 1) is None else 0)
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    for action in (
        lambda fd: os.pwrite(fd, b"x", 0),
        lambda fd: os.ftruncate(fd, 3),
        lambda fd: os.close(os.open(f, os.O_WRONLY | os.O_TRUNC)),
        lambda fd: os.fchown(fd, 5, 5),
        lambda fd: fallocate(fd, 0, 0, 100),
        lambda fd: None,
    ):
        os.setxattr(f, "security.capability", capability)
        os.chmod(f, 0o6755)
        yield change(action), os.listxattr(f)
    os.chown(f, NOBODY, NOBODY)
    os.chmod(f, 0o4755)
    fd = os.open(f, os.O_RDWR)  # handed to somebody with fewer rights
    yield as_nobody(os.pwrite, fd, b"x", 0), os.stat(f).st_mode
    os.close(fd)
    yield as_nobody(lambda: os.close(os.open(f, os.O_WRONLY | os.O_TRUNC))), os.stat(f).st_mode
    fd = os.open(f, os.O_RDWR)
    for mode in (0o4777, 0o6777):
        os.chmod(f, mode)  # and the handle is older
        yield as_nobody(os.pwrite, fd, b"x" * 4096, 0), oct(os.stat(f).st_mode)
        os.chmod(f, mode)
        yield os.pwrite(fd, b"x" * 4096, 0), oct(os.stat(f).st_mode)
        os.setxattr(f, "security.capability", capability)
        yield os.pwrite(fd, b"x" * 4096, 0), oct(os.stat(f).st_mode), os.listxattr(f)
    os.close(fd)


@case
def set_id_bits_after_chown_to_nobody_else(d: str) -> Iterator[object]:
    f = write(d + "/f")
    os.chown(f, NOBODY, NOBODY)
    os.mkdir(d + "/dir")
    for mode in (0o4755, 0o2755, 0o6777):
        for path in (f, d + "/dir"):
            os.chmod(path, mode)
            yield outcome(os.chown, path, -1, -1), oct(os.stat(path).st_mode)
        os.chmod(f, mode)
        yield as_nobody(os.chown, f, -1, -1), oct(os.stat(f).st_mode)
        fd = os.open(f, os.O_RDWR)  # a writer makes no difference
        os.chmod(f, mode)
        yield outcome(os.chown, f, -1, -1), oct(os.stat(f).st_mode)
        os.close(fd)


@case
def groups_of_new_files(d: str) -> Iterator[object]:
    os.mkdir(d + "/shared")
    os.chown(d + "/shared", 0, 77)
    os.chmod(d + "/shared", 0o2775)
    write(d + "/shared/f")
    os.mkdir(d + "/shared/sub")
    os.symlink("x", d + "/shared/s")
    yield [seen(d + "/shared/" + n) for n in ("f", "sub", "s")]
    old = os.umask(0o027)
    try:
        write(d + "/u")
        os.mkdir(d + "/ud", 0o777)
        os.mkfifo(d + "/fifo", 0o666)
    finally:
        os.umask(old)
    yield seen(d + "/u"), seen(d + "/ud"), seen(d + "/fifo")


@case
def access(d: str) -> Iterator[object]:
    os.chmod(d, 0o755)
    write(d + "/secret", b"x")
    os.chmod(d + "/secret", 0o600)
    yield as_nobody(read, d + "/secret"), as_nobody(create, d + "/new")
    yield as_nobody(os.unlink, d + "/secret"), as_nobody(os.chmod, d + "/secret", 0o777)
    os.mkdir(d + "/tmp")
    os.chmod(d + "/tmp", 0o1777)
    write(d + "/tmp/mine")
    yield as_nobody(os.unlink, d + "/tmp/mine"), as_nobody(create, d + "/tmp/theirs")
    yield as_nobody(os.rename, d + "/tmp/mine", d + "/tmp/x"), seen(d + "/tmp/theirs")
    yield as_nobody(os.chown, d + "/tmp/theirs", 0, 0)
    os.mkdir(d + "/closed", 0o700)
    yield as_nobody(os.listdir, d + "/closed"), as_nobody(os.stat, d + "/closed/x")
    yield as_nobody(os.access, d + "/secret", os.R_OK)


@case
def extended_attributes(d: str) -> Iterator[object]:
    f = write(d + "/f")
    yield os.listxattr(f), outcome(os.getxattr, f, "user.none")
    os.setxattr(f, "user.a", b"1")
    os.setxattr(f, "user.empty", b"")
    os.setxattr(f, "trusted.t", b"\0\xff")
    yield sorted(os.listxattr(f)), [os.getxattr(f, n) for n in sorted(os.listxattr(f))]
    yield outcome(os.setxattr, f, "user.a", b"2", os.XATTR_CREATE)
    yield outcome(os.setxattr, f, "user.b", b"2", os.XATTR_REPLACE)
    yield outcome(os.setxattr, f, "user.a", b"2", os.XATTR_REPLACE), os.getxattr(f, "user.a")
    yield outcome(os.removexattr, f, "user.none"), outcome(os.removexattr, f, "user.a")
    yield outcome(os.setxattr, f, "nonsense.x", b""), outcome(os.setxattr, f, "user.", b"")
    yield times_moved(f, lambda: os.setxattr(f, "user.c", b"x"))
    yield as_nobody(os.setxattr, f, "user.d", b"x")
    yield as_nobody(lambda: tuple(sorted(os.listxattr(f)))), as_nobody(os.getxattr, f, "trusted.t")
    yield as_nobody(os.removexattr, f, "trusted.t"), sorted(os.listxattr(f))
    os.symlink("f", d + "/s")
    yield outcome(os.setxattr, d + "/s", "user.x", b"1", follow_symlinks=False)
    os.setxattr(d, "user.dir", b"yes")
    yield os.listxattr(d)


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)


NO_ID = 0xFFFFFFFF
ACCESS_ACL = acl((1, 7, NO_ID), (2, 5, NOBODY), (4, 4, NO_ID), (16, 5, NO_ID), (32, 0, NO_ID))


@case
def acls(d: str) -> Iterator[object]:
    os.chmod(d, 0o755)
    f = write(d + "/f", b"secret")
    os.chmod(f, 0o600)
    yield as_nobody(read, f)
    os.setxattr(f, "system.posix_acl_access", ACCESS_ACL)
    yield as_nobody(read, f), seen(f), os.listxattr(f)
    os.chmod(f, 0o700)
    yield as_nobody(read, f), os.getxattr(f, "system.posix_acl_access")
    os.setxattr(f, "system.posix_acl_access", acl((1, 6, NO_ID), (4, 0, NO_ID), (32, 0, NO_ID)))
    yield seen(f), os.listxattr(f)
    yield outcome(os.setxattr, f, "system.posix_acl_access", b"junk")
    os.mkdir(d + "/dir")
    for path in (f, d + "/dir"):
        for gid in (0, NOBODY):
            os.chown(path, NOBODY, gid)
            for by in (as_nobody, outcome):
                os.chmod(path, 0o2755)
                yield by(os.setxattr, path, "system.posix_acl_access", ACCESS_ACL), seen(path)
        os.removexattr(path, "system.posix_acl_access")
        os.chown(path, 0, 0)
    os.setxattr(d + "/dir", "system.posix_acl_default", ACCESS_ACL)
    os.mkdir(d + "/dir/sub")
    write(d + "/dir/f", b"x")
    for n in ("sub", "f"):
        path = d + "/dir/" + n
        found = {x: os.getxattr(path, x) for x in sorted(os.listxattr(path))}
        yield seen(path), found
    yield as_nobody(read, d + "/dir/f"), seen(d + "/dir")
    for kind in ("access", "default"):
        for path in (f, d + "/dir"):
            yield outcome(os.removexattr, path, f"system.posix_acl_{kind}"), seen(path)


@case
def reading_and_writing(d: str) -> Iterator[object]:
    data = bytes(range(256)) * 20000  # 5 MB
    f = write(d + "/f", data)
    yield read(f) == data, os.stat(f).st_size
    fd = os.open(f, os.O_RDWR)
    yield os.pread(fd, 10, len(data) - 5), os.pread(fd, 10, len(data)), os.pread(fd, 1, 10**15)
    yield os.pwrite(fd, b"!", len(data) + 3 * MIB), os.fstat(fd).st_size
    yield os.pread(fd, 5, len(data)), outcome(os.pwrite, fd, b"x", 1 << 62)
    os.close(fd)
    fd = os.open(f, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"end")
    yield os.fstat(fd).st_size, outcome(os.read, fd, 1)
    os.close(fd)
    yield read(f)[-6:], outcome(os.open, d, os.O_WRONLY), outcome(os.open, f, os.O_DIRECTORY)
    fd = os.open(f, os.O_WRONLY | os.O_TRUNC)
    yield os.fstat(fd).st_size, os.stat(f).st_size
    os.close(fd)
    yield times_moved(f, lambda: write(f, b"again")), times_moved(f, lambda: os.truncate(f, 3))


@case
def truncation(d: str) -> Iterator[object]:
    f = write(d + "/f", b"x" * (5 * MIB + 123))
    for size in (4 * MIB + 1, 2 * MIB, 2 * MIB - 1, 4096, 1, 0, 3 * MIB):
        os.truncate(f, size)
        content = read(f)
        yield os.stat(f).st_size, len(content), content.count(b"x")
    yield outcome(os.truncate, f, -1), outcome(os.truncate, f, 1 << 62), outcome(os.truncate, d, 0)
    fd = os.open(f, os.O_RDONLY)
    yield outcome(os.ftruncate, fd, 1)
    os.close(fd)
    yield os.stat(f).st_size


@case
def holes_and_allocation(d: str) -> Iterator[object]:
    f = write(d + "/f", b"x" * (6 * MIB))
    fd = os.open(f, os.O_RDWR)

    def state() -> tuple[object, ...]:
        content = os.pread(fd, 20 * MIB, 0)
        return len(content), content.count(b"x"), os.fstat(fd).st_size

    yield outcome(fallocate, fd, PUNCH_HOLE | KEEP_SIZE, 1 * MIB, 3 * MIB), state()
    yield outcome(os.lseek, fd, 0, os.SEEK_HOLE), outcome(os.lseek, fd, MIB, os.SEEK_DATA)
    yield outcome(os.lseek, fd, 7 * MIB, os.SEEK_DATA), outcome(os.lseek, fd, 5 * MIB, os.SEEK_HOLE)
    yield outcome(fallocate, fd, 0, 0, 8 * MIB), state()
    yield outcome(fallocate, fd, KEEP_SIZE, 8 * MIB, 2 * MIB), state()
    yield outcome(fallocate, fd, ZERO, 5 * MIB, 100), state()
    yield outcome(fallocate, fd, PUNCH_HOLE, 0, 1), outcome(fallocate, fd, 0, -1, 1)
    yield times_moved(f, lambda: fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 5 * MIB, 4096))
    os.close(fd)


@case
def copying_in_the_kernel(d: str) -> Iterator[object]:
    write(d + "/a", bytes(range(256)) * 16384)
    a, b = os.open(d + "/a", os.O_RDONLY), os.open(d + "/b", os.O_RDWR | os.O_CREAT)
    done = 0
    while done < 3 * MIB:
        done += os.copy_file_range(a, b, 3 * MIB - done, 5 + done, 77 + done)
    yield done, os.fstat(b).st_size, os.pread(b, 10, 70), os.pread(b, 10, 3 * MIB + 70)
    yield outcome(os.copy_file_range, a, b, 100, 10**9, 0)
    os.lseek(b, 0, os.SEEK_SET)
    yield os.sendfile(b, a, 7, 1000), os.pread(b, 4, 0)
    os.close(a)
    os.close(b)


@case
def mappings(d: str) -> Iterator[object]:
    f = write(d + "/f", b"." * (3 * MIB))
    fd = os.open(f, os.O_RDWR)
    shared = mmap.mmap(fd, 3 * MIB)
    private = mmap.mmap(fd, 3 * MIB, flags=mmap.MAP_PRIVATE)
    shared[2 * MIB] = ord("S")
    private[1 * MIB] = ord("P")
    yield os.pread(fd, 1, 2 * MIB), os.pread(fd, 1, 1 * MIB), private[2 * MIB]
    os.pwrite(fd, b"W", 100)
    yield shared[100]
    shared.flush()
    os.ftruncate(fd, 2 * MIB + 10)
    os.ftruncate(fd, 3 * MIB)
    yield shared[2 * MIB], shared[2 * MIB + 10]
    shared[5:6] = b"M"
    shared.close()
    private.close()
    os.close(fd)
    yield read(f)[:8], read(f)[100:101]


@case
def mapping_outlives_the_descriptor(d: str) -> Iterator[object]:
    f = write(d + "/f", b"." * 8192)
    fd = os.open(f, os.O_RDWR)
    shared = mmap.mmap(fd, 8192)
    os.close(fd)
    os.utime(f, ns=(0, 0))
    shared[0] = ord("a")
    yield read(f)[:2], os.stat(f).st_size
    shared.flush()
    yield os.stat(f).st_mtime_ns != 0
    os.truncate(f, 4096)
    yield os.stat(f).st_size
    shared[1] = ord("b")
    yield read(f)[:3]
    shared.close()
    yield read(f)[:3]


@case
def file_without_a_name(d: str) -> Iterator[object]:
    fd = os.open(d, os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"temporary")
    yield os.listdir(d), os.fstat(fd).st_nlink, os.pread(fd, 20, 0)
    linkat(fd, d + "/named")
    yield seen(d + "/named"), read(d + "/named")
    os.close(fd)
    yield seen(d + "/named"), read(d + "/named")
    yield times_moved(d, lambda: os.close(os.open(d, os.O_TMPFILE | os.O_RDWR)))


@case
def locks(d: str) -> Iterator[object]:
    f = write(d + "/f", b"x")
    a, b = os.open(f, os.O_RDWR), os.open(f, os.O_RDWR)
    fcntl.flock(a, fcntl.LOCK_EX)
    yield outcome(fcntl.flock, b, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(a, fcntl.LOCK_UN)
    yield outcome(fcntl.flock, b, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(a, fcntl.LOCK_EX, 1)
    child = "import fcntl,sys; fcntl.lockf(open(sys.argv[1],'r+'), fcntl.LOCK_EX|fcntl.LOCK_NB)"
    yield subprocess.run([sys.executable, "-c", child, f], capture_output=True).returncode
    os.close(a)
    os.close(b)


@case
def directories(d: str) -> Iterator[object]:
    for i in range(3000):
        os.mkdir(f"{d}/{i:04}") if i % 3 else write(f"{d}/{i:04}")
    yield sorted(os.listdir(d)) == [f"{i:04}" for i in range(3000)], seen(d)
    with os.scandir(d) as entries:
        yield sum(e.is_dir(follow_symlinks=False) for e in entries)
    fd = os.open(d, os.O_RDONLY | os.O_DIRECTORY)
    for i in range(0, 3000, 3):
        os.unlink(f"{d}/{i:04}")
    yield len(os.listdir(fd)), len(os.listdir(d))
    os.close(fd)
    yield times_moved(d, lambda: os.mkdir(d + "/new")), times_moved(d, lambda: os.rmdir(d + "/new"))
    yield len(os.listdir(d)), subprocess.check_output(["ls", "-a", d]).split()[:2]


@case
def durability_calls(d: str) -> Iterator[object]:
    fd = os.open(write(d + "/f", b"x" * MIB), os.O_RDWR)
    os.pwrite(fd, b"y", 5)
    yield outcome(os.fsync, fd), outcome(os.fdatasync, fd)
    directory = os.open(d, os.O_RDONLY)
    yield outcome(os.fsync, directory)
    os.close(directory)
    os.close(fd)
    yield os.statvfs(d).f_namemax, os.pathconf(d, "PC_NAME_MAX")


@case
def execution(d: str) -> Iterator[object]:
    f = f"./{d}/true"
    write(f, read("/bin/true"))
    yield outcome(subprocess.call, [f])
    os.chmod(f, 0o755)
    yield outcome(subprocess.call, [f])
    fd = os.open(f, os.O_WRONLY)
    yield outcome(subprocess.call, [f])
    os.close(fd)
    yield outcome(subprocess.call, [f])
    write(d + "/script", b"#!/bin/sh\nexit 7\n")
    os.chmod(d + "/script", 0o755)
    yield outcome(subprocess.call, [f"./{d}/script"])
    sleeper = f"./{d}/sleep"
    write(sleeper, read("/bin/sleep"))
    os.chmod(sleeper, 0o755)
    running = subprocess.Popen([sleeper, "60"])
    try:
        time.sleep(0.1)
        yield outcome(os.open, sleeper, os.O_WRONLY), outcome(os.truncate, sleeper, 0)
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize("options", ["", "route=none"], ids=["passthrough", "daemon"])
def test_parity(
    mounts: Mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    host = tmp_path / "host"
    host.mkdir()
    mount = mounts.make(*filter(None, [options]))
    differences = []
    for function in CASES:
        results = []
        for place in (host, mount.path):
            monkeypatch.chdir(place)  # relative paths: another user cannot pass the ones above
            os.mkdir(function.__name__, 0o755)
            results.append(list(function(function.__name__)))
        for number, (expected, found) in enumerate(zip(*results, strict=True)):
            if found != expected:
                differences.append(f"{function.__name__}, {number}: {expected} but {found}")
    monkeypatch.chdir("/")
    assert not differences, "\n".join(differences)


def test_known_limit_no_collapse_and_insert(mounts: Mounts) -> None:
    """fuse_file_fallocate() in fs/fuse/file.c refuses these modes before a server sees them."""
    fd = os.open(write(f"{mounts.make().path}/f", b"x" * MIB), os.O_RDWR)
    for mode in (COLLAPSE, INSERT):
        assert outcome(fallocate, fd, mode, 0, 4096) == "ENOTSUP"
    os.close(fd)


def test_times_beyond_the_limits(mounts: Mounts) -> None:
    path = mounts.make().path
    write(f"{path}/f")
    os.mkdir(path / "d")
    last = 2**63 - 1
    for name in ("f", "d"):
        os.utime(path / name, ns=(last + 1, 2**34 * 10**9))
        st = os.stat(path / name)
        assert (st.st_atime_ns, st.st_mtime_ns) == (last, last)
    os.utime(path / "f", ns=(0, -(2**62)))  # 1823: before ext4 begins; `check` must find no fault
    assert os.stat(path / "f").st_mtime_ns <= -(2**31) * 10**9
