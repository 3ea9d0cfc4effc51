"""Backing files: one sparse file per regular inode, at the same offsets, under `extents/`.

The file of inode 0x1a2b is `extents/2b/1a2b`. It can be opened by the kernel (FUSE passthrough), copied
out with cp(1), and checked extent by extent.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

EXTENT_SIZE = 2 * 1024 * 1024
"""Bytes of one extent: what a PMD maps on x86-64, and on aarch64 with 4 KiB pages."""

SEEK_DATA, SEEK_HOLE = os.SEEK_DATA, os.SEEK_HOLE

FALLOC_FL_KEEP_SIZE = 0x01  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.syncfs.argtypes = [ctypes.c_int]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with all its modes, which os.posix_fallocate() lacks; raises OSError."""
    if _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, end) in bytes of each stretch of data below `size`; holes are what is between.

    Where the filesystem knows no holes the file is one stretch (lseek(2), SEEK_DATA).
    """
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise
        end = min(os.lseek(fd, start, SEEK_HOLE), size)
        if start >= size:
            return
        yield start, end
        position = end


def extents_with_data(fd: int, size: int) -> Iterator[int]:
    """Yield the numbers of the extents below `size` that hold any data, in order."""
    done = -1
    for start, end in data_ranges(fd, size):
        for number in range(max(start // EXTENT_SIZE, done + 1), (end - 1) // EXTENT_SIZE + 1):
            yield number
            done = number


def checksum(data: bytes | bytearray | memoryview) -> bytes:
    """The checksum of an extent's bytes: xxh3-128, canonical form."""
    return xxhash.xxh3_128_digest(data)


def checksums(fd: int, size: int) -> list[tuple[int, bytes]]:
    """Read a backing file of `size` bytes: (number, checksum) of each extent with data."""
    result: list[tuple[int, bytes]] = []
    buffer: memoryview | None = None
    for number in extents_with_data(fd, size):
        offset = number * EXTENT_SIZE
        length = min(EXTENT_SIZE, size - offset)
        if buffer is None:
            buffer = memoryview(bytearray(min(EXTENT_SIZE, size)))
        view = buffer[:length]
        got = read_full(fd, view, offset)
        if got < length:
            view[got:] = bytes(length - got)
        result.append((number, checksum(view)))
    return result


def read_full(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from the file; returns the bytes read, fewer only at the end of the file."""
    got = 0
    while got < len(view):
        n = os.preadv(fd, [view[got:]], offset + got)
        if n == 0:
            break
        got += n
    return got


def write_full(fd: int, view: memoryview | bytes, offset: int) -> None:
    """Write all of `view`; raises OSError (ENOSPC and so on) with an unknown part written."""
    view = memoryview(view)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


class BackingFiles:
    """The directory `extents/` of a store."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._given = -1

    @staticmethod
    def create(path: Path) -> None:
        """Make an empty `extents/`."""
        path.mkdir(mode=0o700)
        for i in range(256):
            (path / f"{i:02x}").mkdir(mode=0o700)

    def close(self) -> None:
        """Close the directory; backing files stay open."""
        os.close(self.fd)

    @staticmethod
    def name(inode: int) -> str:
        """The path of an inode's backing file, relative to `extents/`."""
        return f"{inode & 0xFF:02x}/{inode:x}"

    def open(self, inode: int, flags: int) -> int:
        """open(2) of an existing backing file; raises OSError."""
        return os.open(self.name(inode), flags | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.fd)

    @contextmanager
    def opened(self, inode: int) -> Iterator[int]:
        """A backing file, open for reading while the block runs; raises OSError."""
        fd = self.open(inode, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def make(self, inode: int) -> int:
        """Make an inode's empty backing file and open it O_RDWR.

        A file of that name can only be what is left of an inode that never came to be: a store whose
        next number was given before is not opened (see `given`).
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        return os.open(self.name(inode), flags | os.O_CLOEXEC, 0o600, dir_fd=self.fd)

    def remove(self, inode: int) -> None:
        """Remove an inode's backing file, if it is there."""
        try:
            os.unlink(self.name(inode), dir_fd=self.fd)
        except FileNotFoundError:
            pass

    def stat(self, inode: int) -> os.stat_result:
        """stat(2) of an inode's backing file; raises OSError."""
        return os.stat(self.name(inode), dir_fd=self.fd, follow_symlinks=False)

    @property
    def given(self) -> int:
        """The highest inode number that a commit has given, as the file `given` says; 0 without it.

        It tells a meta.db that was restored from a backup: that knows of lower numbers only. Then a
        backing file without an inode is no leftover of a crash.
        """
        try:
            with open(os.open("given", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)) as f:
                return int(f.read())
        except (FileNotFoundError, ValueError):  # of a store that lost power before it was on disk
            return 0

    def record_given(self, inode: int) -> None:
        """Record the highest number, after the commit that has given it. Not flushed.

        A backup is older than the seconds that a loss of power can take. Raises OSError.
        """
        if inode == self._given:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        fd = os.open("given", flags, 0o600, dir_fd=self.fd)
        try:
            write_full(fd, b"%020d\n" % inode, 0)  # in place: it is never missing or short
        finally:
            os.close(fd)
        self._given = inode

    def set_times(self, inode: int, atime_ns: int, mtime_ns: int) -> None:
        """Move the times of a backing file, which hold the truth while it is written."""
        os.utime(self.name(inode), ns=(atime_ns, mtime_ns), dir_fd=self.fd, follow_symlinks=False)

    def mtime_as_kept(self, mtime_ns: int) -> int:
        """What the backing filesystem makes of an mtime: it may know no year 1850, or only whole seconds.

        Tried on a file without a name; where there is none to be had, the time as it is.
        """
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        except OSError:
            return mtime_ns
        try:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
            return os.fstat(fd).st_mtime_ns
        finally:
            os.close(fd)

    def numbers(self) -> Iterator[int]:
        """Yield the inode of every backing file; names that are none of ours are passed over."""
        for bucket in range(256):
            try:
                fd = os.open(f"{bucket:02x}", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd)
            except FileNotFoundError:
                continue  # `largefs check` says so
            try:
                names = os.listdir(fd)
            finally:
                os.close(fd)
            for name in names:
                try:
                    inode = int(name, 16)
                except ValueError:
                    continue
                if self.name(inode) == f"{bucket:02x}/{name}":
                    yield inode

    def flush(self, inodes: list[int]) -> None:
        """Make the data, size and existence of these backing files durable; raises OSError."""
        if len(inodes) > 16:
            self.flush_all()
            return
        for inode in inodes:
            with suppress(FileNotFoundError), self.opened(inode) as fd:  # removed meanwhile
                os.fsync(fd)
        for bucket in {inode & 0xFF for inode in inodes}:
            fd = os.open(f"{bucket:02x}", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def flush_all(self) -> None:
        """Make the whole backing filesystem durable: syncfs(2); raises OSError."""
        if _libc.syncfs(self.fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def has_writer(fd: int) -> bool:
    """Whether anyone has this backing file open for writing, `fd` being open for reading only.

    With passthrough a shared mapping holds the backing file, not the FUSE file, so it can outlive the
    handle's release; and both can outlive the daemon. A read lease is refused while any writer exists
    (fcntl(2), F_SETLEASE), which tells. This process's own descriptors for writing must be closed.
    Where this process may take no lease (the file is another user's, and CAP_LEASE is missing) the answer
    is yes; where the filesystem has none (network filesystems), no.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as e:
        return e.errno in (errno.EAGAIN, errno.EACCES, errno.EPERM)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def prefer_extents(fd: int) -> None:
    """Ask the backing filesystem to allocate this empty file in aligned units of EXTENT_SIZE.

    On XFS the extent-size hint (ioctl_xfs_fsgetxattr(2)); elsewhere no such hint is known and
    nothing is done.
    """
    fmt = "IIIII8x"  # struct fsxattr: xflags, extsize, nextents, projid, cowextsize, pad
    get, put = 0x801C581F, 0x401C5820  # FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR
    extsize_flag = 0x800  # FS_XFLAG_EXTSIZE
    try:
        raw = fcntl.ioctl(fd, get, bytes(struct.calcsize(fmt)))
        xflags, _, nextents, projid, cowextsize = struct.unpack(fmt, raw)
        fcntl.ioctl(
            fd,
            put,
            struct.pack(fmt, xflags | extsize_flag, EXTENT_SIZE, nextents, projid, cowextsize),
        )
    except OSError:
        pass


def allocate_extents(fd: int, start: int, end: int) -> None:
    """Allocate the whole extents around [start, end) without changing the size, where possible."""
    first = start // EXTENT_SIZE * EXTENT_SIZE
    last = -(-end // EXTENT_SIZE) * EXTENT_SIZE
    try:
        fallocate(fd, FALLOC_FL_KEEP_SIZE, first, last - first)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise
        # EOPNOTSUPP and the like: the file is written without it


def start_writing(fd: int) -> None:
    """Have the kernel start to write dirty pages of a file to disk, without waiting for it."""
    _libc.sync_file_range(fd, 0, 0, 2)  # SYNC_FILE_RANGE_WRITE; a failure is fsync's to report
