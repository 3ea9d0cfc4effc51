"""The system calls that Python's os module lacks, by ctypes. They raise OSError with the errno.

Addresses are plain integers; lengths and offsets are bytes. Copies come in two kinds: ``move`` is
an ordinary memmove by this process, which dies of SIGBUS where the page cannot be had, and
``pwrite_from`` and ``pread_into`` let the kernel do the access on behalf of a file,
which gives EFAULT or a short count instead.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable

PAGE = mmap.PAGESIZE
PMD = 2 << 20

MADV_PAGEOUT = 21
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
MADV_COLLAPSE = 25
MAP_FIXED = 0x10
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2

# linux/falloc.h
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
COLLAPSE_RANGE = 0x08
ZERO_RANGE = 0x10
INSERT_RANGE = 0x20

_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_libc = ctypes.CDLL(None, use_errno=True)
_pointer, _size, _int, _offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
_MAP_FAILED = ctypes.c_void_p(-1).value

memcmp = _libc.memcmp
memcmp.argtypes = (_pointer, _pointer, _size)
memset = _libc.memset
memset.argtypes = (_pointer, _int, _size)
memset.restype = _pointer
move = _libc.memmove
move.argtypes = (_pointer, _pointer, _size)
move.restype = _pointer

_mmap = _libc.mmap
_mmap.argtypes = (_pointer, _size, _int, _int, _int, _offset)
_mmap.restype = _pointer
_munmap = _libc.munmap
_munmap.argtypes = (_pointer, _size)
_mremap = _libc.mremap
_mremap.argtypes = (_pointer, _size, _size, _int, _pointer)
_mremap.restype = _pointer
_madvise = _libc.madvise
_madvise.argtypes = (_pointer, _size, _int)
_msync = _libc.msync
_msync.argtypes = (_pointer, _size, _int)
_fallocate = _libc.fallocate
_fallocate.argtypes = (_int, _int, _offset, _offset)
_pread = _libc.pread
_pread.argtypes = (_int, _pointer, _size, _offset)
_pread.restype = ctypes.c_ssize_t
_pwrite = _libc.pwrite
_pwrite.argtypes = (_int, _pointer, _size, _offset)
_pwrite.restype = ctypes.c_ssize_t
_statx = _libc.statx
_statx.argtypes = (_int, ctypes.c_char_p, _int, ctypes.c_uint, _pointer)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_process_vm_readv = _libc.process_vm_readv
_process_vm_readv.argtypes = (
    _int,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_process_vm_readv.restype = ctypes.c_ssize_t


def fork() -> int:
    """fork(2) of a child that leaves it to its parent to end it when somebody wants the tool to end."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_END)
    try:
        pid = os.fork()
        if pid == 0:
            for number in _TO_END:
                signal.signal(number, signal.SIG_IGN)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def address_of(buffer: mmap.mmap) -> int:
    """Address of a Python mapping; the mapping cannot be closed or resized after."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def map_file(fd: int, length: int, prot: int, flags: int, offset: int) -> int:
    """mmap(2) at an address congruent to the file offset modulo 2 MiB, so that a PMD can map it."""
    return _placed(
        length, offset, lambda address: _map(address, length, prot, flags | MAP_FIXED, fd, offset)
    )


def remap(address: int, length: int, new_length: int, offset: int) -> int:
    """mremap(2) to another address, congruent to the file offset as well; returns that."""
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
    return _placed(
        new_length, offset, lambda to: _address(_mremap(address, length, new_length, flags, to))
    )


def _placed(length: int, offset: int, place: Callable[[int], object]) -> int:
    """Reserve address space, let ``place`` put a mapping at its congruent address; that address."""
    reserved = _map(None, length + PMD, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    address = reserved + (offset - reserved) % PMD
    try:
        place(address)
    except OSError:
        unmap(reserved, length + PMD)
        raise
    end, reserved_end = address + -(-length // PAGE) * PAGE, reserved + length + PMD
    if address > reserved:
        unmap(reserved, address - reserved)
    if reserved_end > end:
        unmap(end, reserved_end - end)
    return address


def _map(address: int | None, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    return _address(_mmap(address, length, prot, flags, fd, offset))


def _address(result: int | None) -> int:
    """What mmap(2) or mremap(2) returned, unless that is MAP_FAILED."""
    if result is None or result == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def unmap(address: int, length: int) -> None:
    """munmap(2)."""
    _checked(_munmap(address, length))


def madvise(address: int, length: int, advice: int) -> None:
    """Give advice on a range."""
    _checked(_madvise(address, length, advice))


def msync(address: int, length: int) -> None:
    """Write a range back, and wait for it."""
    _checked(_msync(address, length, 4))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change a range of a file; ``mode`` is of linux/falloc.h."""
    _checked(_fallocate(fd, mode, offset, length))


def pread_into(fd: int, address: int, length: int, offset: int) -> int:
    """pread(2) to an address."""
    return _checked(_pread(fd, address, length, offset))


def pwrite_from(fd: int, address: int, length: int, offset: int) -> int:
    """pwrite(2) from an address."""
    return _checked(_pwrite(fd, address, length, offset))


def read_memory(pid: int, remote: int, local: int, length: int) -> int:
    """Bytes read by process_vm_readv(2); fewer where the remote pages cannot be had."""
    here, there = _IoVec(local, length), _IoVec(remote, length)
    return _checked(_process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0))


def statx_size(path: str, fresh: bool) -> int:
    """Size by statx(2); with ``fresh``, a network or FUSE filesystem must ask its server."""
    buffer = ctypes.create_string_buffer(256)
    flags = 0x2000 if fresh else 0  # AT_STATX_FORCE_SYNC
    _checked(_statx(-100, os.fsencode(path), flags, 0x200, buffer))  # AT_FDCWD, STATX_SIZE
    return int.from_bytes(buffer.raw[40:48], "little")  # stx_size


class Arena:
    """Shared memory that is also a file, so that the kernel can copy between it and a mapping."""

    def __init__(self, size: int, content: bytes = b"") -> None:
        self.size = size
        self.fd = os.memfd_create("largefs-stress")
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)
        self.memory[: len(content)] = content
        self.address = address_of(self.memory)

    def close(self) -> None:
        """Give up the file; the memory goes with the last reference."""
        os.close(self.fd)


def first_difference(a: int, b: int, length: int) -> int | None:
    """Offset of the first byte in which two pieces of memory differ; None when they are equal."""
    if memcmp(a, b, length) == 0:
        return None
    low, high = 0, length  # [0, low) is equal, [0, high) is not
    while high - low > 1:
        middle = (low + high) // 2
        if memcmp(a + low, b + low, middle - low) == 0:
            low = middle
        else:
            high = middle
    return low
