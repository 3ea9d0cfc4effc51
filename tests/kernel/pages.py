"""What /proc says of a process's text and of a file's folios: smaps, pagemap, kpageflags, vmstat.

Counted here from /proc alone, with nothing of largefs, so that the tests can judge it.
"""

import ctypes
import mmap
import os
import random
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
PMD = 2 << 20

_KPF_COMPOUND_HEAD, _KPF_COMPOUND_TAIL = 1 << 15, 1 << 16  # linux/kernel-page-flags.h
_PRESENT = 1 << 63  # Documentation/admin-guide/mm/pagemap.rst

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


@dataclass
class Mapping:
    """One line of /proc/PID/smaps, addresses and sizes in bytes."""

    start: int
    end: int
    permissions: str
    offset: int
    path: str
    pmd_mapped: int = 0


@dataclass
class Coverage:
    """Bytes of a process's text that are PMD-mapped, and of touched blocks that could be."""

    pmd_mapped: int
    touched: int

    @property
    def ratio(self) -> float:
        """From 0 to 1; 0 when nothing was touched."""
        return self.pmd_mapped / self.touched if self.touched else 0.0


def mappings(pid: int, path: Path) -> list[Mapping]:
    """The process's mappings of a file."""
    found: list[Mapping] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ \d+\s*(.*)", line)
        if head:
            start, end, permissions, offset, name = head.groups()
            found.append(Mapping(int(start, 16), int(end, 16), permissions, int(offset, 16), name))
        elif line.startswith(("FilePmdMapped:", "ShmemPmdMapped:")):
            found[-1].pmd_mapped += int(line.split()[1]) * 1024
    return [m for m in found if m.path == str(path)]


def coverage(pid: int, path: Path) -> Coverage:
    """PMD-mapped text of `path` in a process, against its touched eligible blocks."""
    size = path.stat().st_size
    total = Coverage(0, 0)
    for m in mappings(pid, path):
        if "x" not in m.permissions:
            continue
        total.pmd_mapped += m.pmd_mapped
        if (m.start - m.offset) % PMD:
            continue
        for block in range(-(-m.start // PMD) * PMD, m.end - PMD + 1, PMD):
            below_end = block - m.start + m.offset + PMD <= size
            if below_end and any(e & _PRESENT for e in _pagemap(pid, block, PMD)):
                total.touched += PMD
    return total


def large_folios(path: Path) -> list[int]:
    """Sizes, in pages, of the folios of more than one page that hold the file in the page cache.

    Looks only at pages that are cached already, and reads nothing.
    """
    size = path.stat().st_size
    if not size:
        return []
    with path.open("rb") as f:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, f.fileno(), 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        resident = (ctypes.c_ubyte * -(-size // PAGE))()
        if _libc.mincore(address, size, resident):
            raise OSError(ctypes.get_errno(), "mincore")
        for n, r in enumerate(resident):
            if r & 1:
                ctypes.c_ubyte.from_address(address + n * PAGE).value  # noqa: B018 - fault it in
        flags = list(_kpageflags(_pagemap(os.getpid(), address, size)))
    finally:
        _libc.munmap(address, size)
    sizes: list[int] = []
    for flag in flags:
        if flag & _KPF_COMPOUND_HEAD:
            sizes.append(1)
        elif flag & _KPF_COMPOUND_TAIL and sizes:
            sizes[-1] += 1
    return sizes


def vmstat(counter: str) -> int:
    """A counter of /proc/vmstat; raises KeyError if this kernel has no such counter."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return int(dict(line.split() for line in lines)[counter])


def drop_caches() -> None:
    """Forget all clean pages and inodes of the machine."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def pattern(size: int) -> bytes:
    """Bytes of which no page is like another, and always the same."""
    return random.Random(size).randbytes(size)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate(2) with a mode, which the os module lacks; returns 0 or an errno."""
    return ctypes.get_errno() if _libc.fallocate(fd, mode, offset, length) else 0


def _pagemap(pid: int, start: int, length: int) -> list[int]:
    count = -(-length // PAGE)
    with open(f"/proc/{pid}/pagemap", "rb") as f:
        f.seek(start // PAGE * 8)
        return list(struct.unpack(f"={count}Q", f.read(count * 8)))


def _kpageflags(entries: list[int]) -> Iterator[int]:
    with open("/proc/kpageflags", "rb", buffering=0) as f:
        for entry in entries:
            if entry & _PRESENT:
                f.seek((entry & ((1 << 55) - 1)) * 8)
                yield struct.unpack("=Q", f.read(8))[0]
