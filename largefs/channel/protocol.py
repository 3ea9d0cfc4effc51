"""The FUSE messages that the channel edits, reads or writes: pure functions of bytes.

Numbers and layouts are those of the kernel's include/uapi/linux/fuse.h, version 7.45; a name here is
the name there without its FUSE_ prefix. Every message is checked against its length before it is read.
"""

import struct
from dataclasses import dataclass
from typing import Final

# Opcodes (enum fuse_opcode).
INTERRUPT: Final = 36
FALLOCATE: Final = 43
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
TMPFILE: Final = 51
COPY_FILE_RANGE_64: Final = 53

# INIT flags, 64 bits: `flags` and, from bit 32 on, `flags2`.
DONT_MASK: Final = 1 << 6
AUTO_INVAL_DATA: Final = 1 << 12
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
WRITEBACK_CACHE: Final = 1 << 16
PARALLEL_DIROPS: Final = 1 << 18
POSIX_ACL: Final = 1 << 20
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
"""major, minor, max_readahead, flags, flags2"""
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHIIH22x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages, map_alignment, flags2, max_stack_depth, request_timeout, unused"""

MAX_MAX_PAGES: Final = 256
"""The kernel's limit where there is no fs.fuse.max_pages_limit (before Linux 6.13)."""
DEFAULT_PAGES: Final = 32
"""What a request may carry where max_pages is not negotiated (before Linux 4.20)."""


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


def edit_init(
    request: bytes, reply: bytes, wanted: Wanted, *, pages_limit: int, page_size: int
) -> tuple[bytes, Negotiated | None]:
    """libfuse's reply to INIT, edited, and what that settles.

    Returns the reply unchanged, and None, where it is an error, speaks another major version, or is
    of a form before 7.23 (Linux 3.15). `pages_limit` is fs.fuse.max_pages_limit, `page_size` in bytes.
    """
    head, body = OUT_HEADER.size, IN_HEADER.size
    if len(request) < body + 16 or len(reply) != head + _INIT_OUT.size:
        return reply, None
    _, error, _ = OUT_HEADER.unpack_from(reply)
    asked = request[body : body + _INIT_IN.size].ljust(_INIT_IN.size, b"\0")
    kernel_major, kernel_minor, _, offered, offered2 = _INIT_IN.unpack(asked)
    fields = list(_INIT_OUT.unpack_from(reply, head))
    if error or kernel_major != 7 or fields[0] != 7:
        return reply, None
    if offered & INIT_EXT:
        offered |= offered2 << 32
    flags = fields[3] | (fields[10] << 32 if fields[3] & INIT_EXT else 0)

    flags = _flags(flags, offered, wanted)
    if offered & MAX_PAGES:
        limit = pages_limit
        max_pages = max(1, min(-(-wanted.max_write // page_size), limit, 0xFFFF))
    else:
        max_pages = DEFAULT_PAGES
    max_write = max(4096, min(wanted.max_write, max_pages * page_size))

    fields[3] = flags & 0xFFFFFFFF
    fields[6] = max_write
    fields[8] = max_pages if offered & MAX_PAGES else 0
    fields[10] = flags >> 32
    if flags & PASSTHROUGH:
        fields[11] = wanted.max_stack_depth
    return reply[:head] + _INIT_OUT.pack(*fields), Negotiated(
        minor=min(kernel_minor, fields[1]),
        max_write=max_write,
        max_pages=max_pages,
        flags=flags,
        offered=offered,
        passthrough=bool(flags & PASSTHROUGH),
        large_folios=bool(flags & LARGE_FOLIOS),
    )


def _flags(flags: int, offered: int, wanted: Wanted) -> int:
    """The flags to answer: libfuse's, and of what the kernel offers that which serves largefs."""
    want = INIT_EXT | MAX_PAGES | PARALLEL_DIROPS | CACHE_SYMLINKS | NO_OPENDIR_SUPPORT
    want |= DIRECT_IO_ALLOW_MMAP
    if wanted.passthrough and not flags & WRITEBACK_CACHE:
        want |= PASSTHROUGH
    if wanted.large_folios:
        want |= LARGE_FOLIOS
    flags |= want & offered
    # The daemon owns the store alone, so cached pages are good until it says otherwise.
    if offered & EXPLICIT_INVAL_DATA:
        flags = flags & ~AUTO_INVAL_DATA | EXPLICIT_INVAL_DATA
    return flags
