"""The FUSE messages that the channel edits, reads or writes: pure functions of bytes.

Numbers and layouts are those of the kernel's include/uapi/linux/fuse.h, version 7.45; a name here
is the name there without its FUSE_ prefix. Nothing is read beyond the end of a message.
"""

import errno
import struct
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

# Opcodes (enum fuse_opcode).
SETATTR: Final = 4
OPEN: Final = 14
WRITE: Final = 16
INTERRUPT: Final = 36
FALLOCATE: Final = 43
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
TMPFILE: Final = 51
COPY_FILE_RANGE_64: Final = 53

# INIT flags, 64 bits: `flags` and, from bit 32 on, `flags2`.
DONT_MASK: Final = 1 << 6
AUTO_INVAL_DATA: Final = 1 << 12
WRITEBACK_CACHE: Final = 1 << 16
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22
CACHE_SYMLINKS: Final = 1 << 23
NO_OPENDIR_SUPPORT: Final = 1 << 24
EXPLICIT_INVAL_DATA: Final = 1 << 25
HANDLE_KILLPRIV_V2: Final = 1 << 28
INIT_EXT: Final = 1 << 30
DIRECT_IO_ALLOW_MMAP: Final = 1 << 36
PASSTHROUGH: Final = 1 << 37
LARGE_FOLIOS: Final = 1 << 62  # kernel-patch/: large folios where an inode's blksize is a PMD

# Open flags (fuse_open_out.open_flags).
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_NONSEEKABLE: Final = 1 << 2
FOPEN_PASSTHROUGH: Final = 1 << 7

IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding"""
OUT_HEADER: Final = struct.Struct("=IiQ")
"""len, error, unique"""
_INIT_IN: Final = struct.Struct("=IIIII")
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHIIH22x")

_VERSION: Final = 7
"""The protocol's major version."""

MAX_MAX_PAGES: Final = 256
"""The kernel's limit where there is no fs.fuse.max_pages_limit (before Linux 6.13)."""
DEFAULT_PAGES: Final = 32
"""What a request may carry where max_pages is not negotiated (before Linux 4.20)."""


class InitIn(NamedTuple):
    """The body of INIT's request: struct fuse_init_in, the fields of _INIT_IN."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    flags2: int

    @classmethod
    def unpack(cls, body: bytes) -> "InitIn":
        """Read it; `body` has at least 16 bytes, which end before flags2, as kernels before 5.17 send."""
        return cls._make(_INIT_IN.unpack(body[: _INIT_IN.size].ljust(_INIT_IN.size, b"\0")))

    @property
    def flags64(self) -> int:
        """What the kernel offers: flags and, from bit 32 on, flags2."""
        return _flags64(self.flags, self.flags2)


class InitOut(NamedTuple):
    """The body of INIT's reply: struct fuse_init_out, the fields of _INIT_OUT."""

    major: int = _VERSION
    minor: int = 0
    max_readahead: int = 0
    flags: int = 0
    max_background: int = 0
    congestion_threshold: int = 0
    max_write: int = 0
    time_gran: int = 1
    max_pages: int = 0
    map_alignment: int = 0
    flags2: int = 0
    max_stack_depth: int = 0
    request_timeout: int = 0

    @classmethod
    def unpack(cls, body: bytes) -> "InitOut":
        """Read it; struct.error where it has another size, as before 7.23."""
        return cls._make(_INIT_OUT.unpack(body))

    def pack(self) -> bytes:
        """Return it as the kernel reads it."""
        return _INIT_OUT.pack(*self)

    @property
    def flags64(self) -> int:
        """What is asked for: flags and, from bit 32 on, flags2."""
        return _flags64(self.flags, self.flags2)

    def with_flags64(self, flags: int) -> "InitOut":
        """The same with other flags."""
        return self._replace(flags=flags & 0xFFFFFFFF, flags2=flags >> 32)


def _flags64(flags: int, flags2: int) -> int:
    return flags | flags2 << 32 if flags & INIT_EXT else flags


@dataclass(frozen=True)
class Wanted:
    """What the filesystem would like of the kernel; it gets what the kernel has."""

    max_write: int = 4 << 20
    """Bytes in one READ or WRITE. The kernel allows fs.fuse.max_pages_limit pages (sysctl)."""
    passthrough: bool = True
    max_stack_depth: int = 1
    """1 or 2: how many stacked filesystems this mount counts for (FILESYSTEM_MAX_STACK_DEPTH)."""
    large_folios: bool = False
    """The opt-in of kernel-patch/."""
    kill_privileges: bool = False
    """The filesystem, not the kernel, clears setuid, setgid and security.capability of a file that
    is written, truncated or given away (HANDLE_KILLPRIV_V2). Without it the kernel does, but at
    open with O_TRUNC, and so asks for security.capability before every write(2), passed through or
    not: on Linux 6.18 a write of 4 KiB to a backing file takes 47 µs instead of 1. Set it only if
    the filesystem
      - has a method kill_privileges(inode) (operations.py), called where the kernel asks for it,
        which it does if the caller lacks CAP_FSETID;
      - clears security.capability in write and setattr of size whoever calls;
      - clears all three in setattr of uid and gid, and in a setattr of nothing at all: that is what
        the kernel sends for chown(path, -1, -1), and before it writes to a backing file.
    """
    dont_mask: bool = False
    """The filesystem applies RequestContext.umask to new files itself: as it must, with POSIX ACLs,
    where a directory's default ACL takes the umask's place. Otherwise the kernel does.
    """


@dataclass(frozen=True)
class Negotiated:
    """What INIT settled. The kernel does what `flags` says; it does not answer."""

    minor: int
    """The protocol's minor version, the lower of kernel's and libfuse's (the major one is 7)."""
    max_write: int
    """Bytes in one READ or WRITE."""
    max_pages: int
    """Pages in one request."""
    flags: int
    """As sent to the kernel, 64 bits."""
    offered: int
    """As offered by the kernel, 64 bits."""
    passthrough: bool
    large_folios: bool
    kill_privileges: bool = False


def edit_init(
    request: bytes, reply: bytes, wanted: Wanted, *, pages_limit: int, page_size: int
) -> tuple[bytes, Negotiated | None]:
    """Edit libfuse's reply to INIT; return it with what it settles.

    Returns the reply unchanged, and None, where it is an error, speaks another major version, or is
    of a form before 7.23 (Linux 3.15). `pages_limit` is fs.fuse.max_pages_limit; `page_size` is in
    bytes.
    """
    head, body = OUT_HEADER.size, IN_HEADER.size
    if len(request) < body + 16 or len(reply) != head + _INIT_OUT.size:
        return reply, None
    _, error, _ = OUT_HEADER.unpack_from(reply)
    asked, answer = InitIn.unpack(request[body:]), InitOut.unpack(reply[head:])
    if error or asked.major != _VERSION or answer.major != _VERSION:
        return reply, None
    offered = asked.flags64

    flags = _flags(answer.flags64, offered, wanted)
    if offered & MAX_PAGES:
        limit = pages_limit
        max_pages = max(1, min(-(-wanted.max_write // page_size), limit, 0xFFFF))
    else:
        max_pages = DEFAULT_PAGES
    max_write = max(4096, min(wanted.max_write, max_pages * page_size))

    answer = answer.with_flags64(flags)._replace(
        max_write=max_write, max_pages=max_pages if offered & MAX_PAGES else 0
    )
    if flags & PASSTHROUGH:
        answer = answer._replace(max_stack_depth=wanted.max_stack_depth)
    return reply[:head] + answer.pack(), Negotiated(
        minor=min(asked.minor, answer.minor),
        max_write=max_write,
        max_pages=max_pages,
        flags=flags,
        offered=offered,
        passthrough=bool(flags & PASSTHROUGH),
        large_folios=bool(flags & LARGE_FOLIOS),
        kill_privileges=bool(flags & HANDLE_KILLPRIV_V2),
    )


def _flags(flags: int, offered: int, wanted: Wanted) -> int:
    """Return the flags to answer: libfuse's, and those on offer that serve largefs.

    Some that one may look for are not added. READDIRPLUS_AUTO: it saves the attributes of a
    directory's later entries, which largefs has at hand, for a LOOKUP of each that is stat'ed; and
    pyfuse3 has no plain readdir. POSIX_ACL: libfuse sets it, if Operations.enable_acl says so.
    SETXATTR_EXT and SECURITY_CTX: they change the form of messages that libfuse reads.
    """
    want = INIT_EXT | MAX_PAGES | PARALLEL_DIROPS | CACHE_SYMLINKS | NO_OPENDIR_SUPPORT
    want |= DIRECT_IO_ALLOW_MMAP
    if wanted.passthrough and not flags & WRITEBACK_CACHE:
        want |= PASSTHROUGH  # the kernel ignores it beside the writeback cache
    if wanted.large_folios:
        want |= LARGE_FOLIOS
    if wanted.kill_privileges:
        want |= HANDLE_KILLPRIV_V2
    if wanted.dont_mask:
        want |= DONT_MASK
    flags |= want & offered
    # The daemon owns the store alone, so cached pages are good until it says otherwise.
    if offered & EXPLICIT_INVAL_DATA:
        flags = flags & ~AUTO_INVAL_DATA | EXPLICIT_INVAL_DATA
    return flags


class Context(NamedTuple):
    """Who asks: the fields of pyfuse3.RequestContext, which Python code cannot make."""

    uid: int
    gid: int
    pid: int
    umask: int


class Request(NamedTuple):
    """A request from the kernel that pyfuse3 does not know."""

    opcode: int
    unique: int
    nodeid: int
    context: Context
    body: bytes


def parse(message: bytes) -> Request | None:
    """Split a message into its header and body; None if there is no whole header."""
    if len(message) < IN_HEADER.size:
        return None
    length, opcode, unique, nodeid, uid, gid, pid, _, _ = IN_HEADER.unpack_from(message)
    body = message[IN_HEADER.size : max(length, IN_HEADER.size)]
    return Request(opcode, unique, nodeid, Context(uid, gid, pid, 0), body)


def reply(unique: int, body: bytes) -> bytes:
    """Return the message that answers a request with success."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def failure(unique: int, code: int) -> bytes:
    """Return the message that answers a request with an errno, 1 to 511 (fuse_dev_do_write())."""
    return OUT_HEADER.pack(OUT_HEADER.size, -code if 0 < code < 512 else -errno.EIO, unique)


FALLOCATE_IN: Final = struct.Struct("=QqqI4x")
"""fh, offset, length, mode"""
LSEEK_IN: Final = struct.Struct("=QqI4x")
"""fh, offset, whence"""
LSEEK_OUT: Final = struct.Struct("=q")
"""offset"""
COPY_FILE_RANGE_IN: Final = struct.Struct("=QqQQqQQ")
"""fh_in, off_in, nodeid_out, fh_out, off_out, len, flags"""
WRITE_OUT: Final = struct.Struct("=I4x")
"""size: the answer to COPY_FILE_RANGE, which is why one copies less than 4 GiB"""
COPY_FILE_RANGE_OUT: Final = struct.Struct("=Q")
"""bytes_copied: the answer to COPY_FILE_RANGE_64"""
CREATE_IN: Final = struct.Struct("=IIII")
"""flags, mode, umask, open_flags: also TMPFILE's; the name that follows is "/" there"""
_ENTRY_OUT: Final = struct.Struct("=QQQQII" + "QQQQQQIIIIIIIIII")
"""nodeid, generation, entry_valid, attr_valid, their nanoseconds; struct fuse_attr"""
_OPEN_OUT: Final = struct.Struct("=QIi")
"""fh, open_flags, backing_id"""

_NANOSECONDS: Final = 1_000_000_000


def _timeout(seconds: float) -> tuple[int, int]:
    """Return a timeout as seconds and nanoseconds, bounded as libfuse bounds it."""
    whole = int(min(max(seconds, 0), 2**63))
    return whole, int(min(max(seconds - whole, 0), 0.999999999) * _NANOSECONDS)


def create_out(info: Any, entry: Any, backing_id: int) -> bytes:
    """Return the answer to TMPFILE, from a pyfuse3.FileInfo and a pyfuse3.EntryAttributes.

    `backing_id` of 0 means that there is no backing file.
    """
    entry_valid, entry_nsec = _timeout(entry.entry_timeout)
    attr_valid, attr_nsec = _timeout(entry.attr_timeout)
    times = [
        divmod(t, _NANOSECONDS) for t in (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns)
    ]
    flags = FOPEN_DIRECT_IO if info.direct_io else 0
    if backing_id:
        flags |= FOPEN_PASSTHROUGH  # which goes with no flag but FOPEN_DIRECT_IO
    else:
        flags |= FOPEN_KEEP_CACHE if info.keep_cache else 0
        flags |= FOPEN_NONSEEKABLE if info.nonseekable else 0
    return _ENTRY_OUT.pack(
        entry.st_ino,
        entry.generation,
        entry_valid,
        attr_valid,
        entry_nsec,
        attr_nsec,
        entry.st_ino,
        entry.st_size,
        entry.st_blocks,
        *(seconds % 2**64 for seconds, _ in times),
        *(nanoseconds for _, nanoseconds in times),
        entry.st_mode,
        entry.st_nlink,
        entry.st_uid,
        entry.st_gid,
        entry.st_rdev,
        entry.st_blksize,
        0,
    ) + _OPEN_OUT.pack(info.fh, flags, backing_id)
