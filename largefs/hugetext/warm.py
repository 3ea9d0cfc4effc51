"""Warm-up: bring ranges of a file into the page cache in 2 MiB folios, so that faults on them map
by PMD.

Blocks until the data is read: run it in a thread. The interpreter lock is free meanwhile, for every
call that can fault is made through ctypes; no byte of a mapping is ever touched from Python, so
truncation and I/O errors come back as errno and never as SIGBUS. In the largefs daemon it may be
used on backing files only, never through the own mount.

Needs Linux 6.7, for PAGEMAP_SCAN says what became a PMD mapping; FUSE passthrough needs 6.9 anyway.
Sources: madvise(2), posix_fadvise(2), sync_file_range(2); do_sync_mmap_readahead() in mm/filemap.c,
which reads 2 MiB folios where the mapping has MADV_HUGEPAGE, whatever the system's THP switches
say.
"""

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from largefs.hugetext import mappings
from largefs.hugetext.mappings import PAGE, PMD

RETRIES = 2  # for blocks that came in small folios, after memory was compacted
CHUNK = 32 << 20  # what is mapped and populated between two looks at `cancelled`

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
MADV_COLLAPSE = 25
_SYNC_FILE_RANGE = 0x1 | 0x2 | 0x4  # wait before, write, wait after

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_int = ctypes.c_int
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, _int, _int, _int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


@dataclass(frozen=True, slots=True)
class Warmed:
    """What a warm-up did; all in bytes."""

    wanted: int = 0  # whole 2 MiB blocks of the ranges, below the file's size
    in_pmd: int = 0  # of those, now in 2 MiB folios
    already: int = 0  # of those, in 2 MiB folios before; nothing was read for them

    def __add__(self, other: "Warmed") -> "Warmed":
        return Warmed(
            self.wanted + other.wanted, self.in_pmd + other.in_pmd, self.already + other.already
        )


def never() -> bool:
    """The `cancelled` of a warm-up that nobody cancels."""
    return False


def warm_file(
    path: str | bytes | os.PathLike[str],
    ranges: Iterable[tuple[int, int]] | None = None,
    cancelled: Callable[[], bool] = never,
) -> Warmed:
    """Warm (offset, length) ranges of a file, by default all of it.

    OSError: as warm_range(), and EINVAL for what is no regular file, ELOOP for a symbolic link.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        done = Warmed()
        for offset, length in [(0, st.st_size)] if ranges is None else ranges:
            done += warm_range(fd, offset, length, cancelled)
        return done
    finally:
        os.close(fd)


def warm_range(fd: int, offset: int, length: int, cancelled: Callable[[], bool] = never) -> Warmed:
    """Warm the whole 2 MiB blocks of [offset, offset + length) that lie below the file's size.

    Blocks that already are in 2 MiB folios stay as they are. Blocks cached in small folios are
    written back, dropped and read again; pages that a process has mapped cannot be dropped and stay
    small. `cancelled` is asked every 32 MiB; a warm-up that was cancelled, or overtaken by
    truncation, says less in `wanted`. Memory too fragmented or a filesystem without large folios is
    no error: `in_pmd` is smaller. OSError: EIO if the file cannot be read, ENODEV if it cannot be
    mapped, ENOMEM, EOPNOTSUPP on a kernel before 6.7.
    """
    done = Warmed()
    position = -(-offset // PMD) * PMD
    stop = (offset + length) // PMD * PMD
    while not cancelled():
        end = min(position + CHUNK, stop, os.fstat(fd).st_size // PMD * PMD)
        if position >= end:
            break
        try:
            done += _warm_chunk(fd, position, end - position)
        except OSError as e:
            # A populated page beyond a new end of file gives EFAULT, as an I/O error does: the size
            # tells which.
            if e.errno != errno.EFAULT:
                raise
            if os.fstat(fd).st_size >= end:
                raise OSError(errno.EIO, "cannot read the file into the page cache") from e
            continue
        position = end
    return done


def _warm_chunk(fd: int, offset: int, length: int) -> Warmed:
    with mapped(fd, offset, length) as start:
        pagemap = mappings.open_pagemap("self")
        try:
            kept = _keep_pmd_folios(fd, offset, start, length, pagemap)
            with suppress(OSError):  # EINVAL where the kernel has no THP: small pages are warm, too
                madvise(start, length, _MADV_HUGEPAGE)
            madvise(start, length, _MADV_POPULATE_READ)
            in_pmd = _pmd_blocks(pagemap, start, length)
            for _ in range(RETRIES):
                missing = [a for a in range(start, start + length, PMD) if a not in in_pmd]
                if not missing:
                    break
                _make_room(len(missing))
                for address in missing:
                    _drop(fd, offset + address - start, address)
                    madvise(address, PMD, _MADV_POPULATE_READ)
                before, in_pmd = in_pmd, _pmd_blocks(pagemap, start, length)
                if in_pmd == before:
                    break
            for address in range(start, start + length, PMD):
                # What could not be dropped may still be collapsed: on tmpfs, always; on other
                # filesystems by Linux 7.2, or an earlier one with CONFIG_READ_ONLY_THP_FOR_FS.
                if address not in in_pmd:
                    with suppress(OSError):
                        madvise(address, PMD, MADV_COLLAPSE)
                        in_pmd.add(address)
        finally:
            os.close(pagemap)
    return Warmed(length, len(in_pmd) * PMD, kept)


def _make_room(blocks: int) -> None:
    """Have the kernel free so many pieces of 2 MiB, by compacting memory.

    Readahead takes a 2 MiB folio only if one is free, and else reads small pages
    (readahead_gfp_mask(), __GFP_NORETRY). A fault on anonymous memory with MADV_HUGEPAGE compacts
    (transhuge's `defrag` setting of madvise, the default); what it got is free again at once.
    """
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    length = (blocks + 1) * PMD
    with suppress(OSError):
        area = _map(None, length, mmap.PROT_READ | mmap.PROT_WRITE, anonymous, -1, 0)
        try:
            start = -(-area // PMD) * PMD
            madvise(start, blocks * PMD, _MADV_HUGEPAGE)
            madvise(start, blocks * PMD, _MADV_POPULATE_WRITE)
        finally:
            _libc.munmap(area, length)


def _keep_pmd_folios(fd: int, offset: int, start: int, length: int, pagemap: int) -> int:
    """Drop the cached blocks that are not in PMD folios; return the bytes of those that are."""
    resident = ctypes.create_string_buffer(length // PAGE)
    _check(_libc.mincore(start, length, resident))
    pages = PMD // PAGE
    cached = []
    for i in range(length // PMD):
        first = resident.raw.find(b"\1", i * pages, (i + 1) * pages)
        if first >= 0:
            cached.append(start + i * PMD)
            # A fault on a page of a PMD folio maps the whole folio by PMD: that tells which they
            # are.
            madvise(start + first * PAGE, PAGE, _MADV_POPULATE_READ)
    kept = _pmd_blocks(pagemap, start, length) if cached else set()
    for address in cached:
        if address not in kept:
            _drop(fd, offset + address - start, address)
    return len(kept) * PMD


def _drop(fd: int, offset: int, address: int) -> None:
    """Drop a block from the page cache; `address` is where we have mapped it.

    Mapped or dirty pages are not dropped: unmap ours, write back. An error of writing back is
    fsync's to tell.
    """
    madvise(address, PMD, _MADV_DONTNEED)
    _libc.sync_file_range(fd, offset, PMD, _SYNC_FILE_RANGE)
    os.posix_fadvise(fd, offset, PMD, os.POSIX_FADV_DONTNEED)


def _pmd_blocks(pagemap: int, start: int, length: int) -> set[int]:
    """Addresses of the blocks of our mapping that are mapped by PMD."""
    blocks = mappings.present_blocks(pagemap, range(start, start + length, PMD))
    return {block.address for block in blocks if _known(block.pmd)}


def _known(pmd: bool | None) -> bool:
    if pmd is None:
        raise OSError(errno.EOPNOTSUPP, "warm-up needs Linux 6.7 or later (PAGEMAP_SCAN)")
    return pmd


@contextmanager
def mapped(fd: int, offset: int, length: int, protection: int = mmap.PROT_READ) -> Iterator[int]:
    """Address of a shared mapping, congruent to its offset; `offset` is a multiple of 2 MiB."""
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    area = _map(None, length + PMD, 0, anonymous, -1, 0)
    try:
        start = -(-area // PMD) * PMD
        yield _map(start, length, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset)
    finally:
        _libc.munmap(area, length + PMD)


def _map(at: int | None, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    address = _libc.mmap(at, length, protection, flags, fd, offset)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(address)


def madvise(address: int, length: int, advice: int) -> None:
    """Advise the kernel, without the interpreter lock. Raises OSError."""
    _check(_libc.madvise(address, length, advice))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
