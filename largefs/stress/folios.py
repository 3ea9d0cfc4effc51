"""Large folios, as /proc shows them: how much of a process is PMD-mapped, what holds a byte.

The second is for root only: it comes from ``/proc/self/pagemap`` and ``/proc/kpageflags``, whose
flag bits are in Documentation/admin-guide/mm/pagemap.rst and
include/uapi/linux/kernel-page-flags.h.
"""

from __future__ import annotations

import mmap
import os

from largefs.hugetext import mappings
from largefs.stress import syscalls
from largefs.stress.syscalls import PAGE, PMD

_FLAGS = {
    0: "locked",
    1: "error",
    2: "referenced",
    3: "uptodate",
    4: "dirty",
    8: "writeback",
    15: "head",
    16: "tail",
    22: "thp",
}
_HEAD, _TAIL = 1 << 15, 1 << 16


def pmd_mapped(pid: int | str = "self") -> int:
    """Bytes of files and shmem that PMD entries map in a process (``/proc/PID/smaps_rollup``)."""
    total = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as rollup:
            for line in rollup:
                if line.startswith((b"FilePmdMapped:", b"ShmemPmdMapped:")):
                    total += int(line.split()[1]) << 10
    except OSError:
        return 0
    return total


def pmd_blocks(pagemap: int, address: int, length: int, offset: int) -> set[int]:
    """2 MiB blocks of the file that PMD entries map in a mapping of it; none before Linux 6.7.

    ``pagemap`` is a descriptor of the process's /proc/PID/pagemap.
    """
    inside = range(-(-address // PMD) * PMD, (address + length) // PMD * PMD, PMD)
    blocks = mappings.present_blocks(pagemap, inside)
    return {(block.address - address + offset) // PMD for block in blocks if block.pmd}


def around(fd: int, offset: int) -> list[str]:
    """Lines that say which folio holds the byte at ``offset`` of a file, and its state."""
    start = offset // PMD * PMD
    try:
        address = syscalls.map_file(fd, PMD, 1, mmap.MAP_SHARED, start)
    except OSError as error:
        return [f"page cache: cannot map the file: {error.strerror}"]
    page = (offset - start) // PAGE
    try:
        syscalls.madvise(address + page * PAGE, PAGE, syscalls.MADV_POPULATE_READ)
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek((address + page * PAGE) // PAGE * 8)
            frame = int.from_bytes(pagemap.read(8), "little") & (1 << 55) - 1
        if not frame:
            return ["page cache: not visible (needs CAP_SYS_ADMIN)"]
        return [_describe(frame)]
    except OSError as error:
        return [f"page cache: cannot look at it: {error.strerror}"]
    finally:
        syscalls.unmap(address, PMD)


def _describe(frame: int) -> str:
    flags_file = os.open("/proc/kpageflags", os.O_RDONLY)

    def flags(number: int) -> int:
        return int.from_bytes(os.pread(flags_file, 8, number * 8), "little")

    try:
        head = frame
        while flags(head) & _TAIL:
            head -= 1
        pages = 1
        while flags(head) & _HEAD and flags(head + pages) & _TAIL:
            pages += 1
        names = [name for bit, name in _FLAGS.items() if flags(head) >> bit & 1]
    finally:
        os.close(flags_file)
    return (
        f"page cache: page {frame - head} of a folio of {pages * PAGE >> 10} KiB, {' '.join(names)}"
    )
