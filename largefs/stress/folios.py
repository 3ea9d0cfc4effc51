"""The page cache around an offset of a file; root only.

From ``/proc/self/pagemap`` and ``/proc/kpageflags``.

Flag bits: Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/kernel-page-flags.h.
"""

from __future__ import annotations

import mmap
import os

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
