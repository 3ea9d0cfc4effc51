"""What every file must hold: the oracle.

An ``Inode`` is the exact bytes and size of a file. Bytes at and beyond the size are always zero in
the model, for that is what a mapping of the last page must show, and what a file extended again
must hold. A private mapping that was written has copies of its pages. Handles and mappings are
known by numbers that the generator gave, and each belongs to one worker.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

from largefs.stress.syscalls import PAGE, PMD, address_of, memcmp, memset, move


class Inode:
    """The exact content of one file, up to ``capacity`` bytes."""

    def __init__(self, number: int, capacity: int) -> None:
        self.number = number
        self.capacity = capacity
        self.size = 0
        self.mode = 0o644
        self.memory = mmap.mmap(-1, capacity + PMD)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = address_of(self.memory)

    def write(self, offset: int, source: int, length: int) -> None:
        """Take ``length`` bytes from the address ``source``."""
        move(self.address + offset, source, length)
        if length:
            self.size = max(self.size, offset + length)

    def zero(self, offset: int, length: int) -> None:
        """Zero what of the range lies below the size."""
        length = min(length, self.size - offset)
        if length > 0:
            memset(self.address + offset, 0, length)

    def truncate(self, size: int) -> None:
        """Set the size; what is cut off is gone for ever."""
        self.zero(size, self.size - size)
        self.size = size

    def collapse(self, offset: int, length: int) -> None:
        """FALLOC_FL_COLLAPSE_RANGE."""
        moved = self.size - offset - length
        move(self.address + offset, self.address + offset + length, moved)
        self.truncate(self.size - length)

    def insert(self, offset: int, length: int) -> None:
        """FALLOC_FL_INSERT_RANGE."""
        move(self.address + offset + length, self.address + offset, self.size - offset)
        self.size += length
        self.zero(offset, length)

    def is_zero(self, start: int, end: int) -> bool:
        """Whether all bytes in [start, end) are zero."""
        if start >= end:
            return True
        # a range is zero when its first byte is, and each byte equals the one before
        return self.memory[start] == 0 and (
            end - start == 1
            or memcmp(self.address + start, self.address + start + 1, end - start - 1) == 0
        )

    @property
    def mapped_end(self) -> int:
        """End of the last page that holds a byte: a mapping gives SIGBUS from here on."""
        return -(-self.size // PAGE) * PAGE


@dataclass
class Handle:
    """An open file of one worker."""

    worker: int
    inode: Inode
    append: bool = False
    writable: bool = True
    direct: bool = False  # O_DIRECT: offsets, lengths and memory must be aligned


@dataclass
class Mapping:
    """A mapping of one worker; offset and length are bytes of the file.

    What is written to a private mapping is in ``copies``: pages by their number in the file. Linux
    takes a page's copy away when a truncation cuts the whole page off (truncate_pagecache() in
    mm/truncate.c), and leaves it alone when the page is punched or zeroed. When ranges of the file
    are collapsed or inserted, each filesystem does it in its own way: what the mapping shows then
    is ``unknown``.
    """

    worker: int
    inode: Inode
    offset: int
    length: int
    writable: bool
    shared: bool = True
    copies: dict[int, bytearray] = field(default_factory=dict)
    unknown: bool = False

    def content(self, offset: int, length: int) -> bytearray:
        """What bytes of the file look like through this mapping."""
        found = bytearray(self.inode.memory[offset : offset + length])
        for page in self._copied(offset, length):
            start, end = max(offset, page * PAGE), min(offset + length, (page + 1) * PAGE)
            copy = self.copies[page]
            found[start - offset : end - offset] = copy[start - page * PAGE : end - page * PAGE]
        return found

    def store(self, offset: int, data: bytes) -> None:
        """Write to the private mapping: the pages are copied, the file stays as it is."""
        for page in range(offset // PAGE, -(-(offset + len(data)) // PAGE)):
            base = page * PAGE
            if page not in self.copies:
                self.copies[page] = bytearray(self.inode.memory[base : base + PAGE])
            start, end = max(offset, base), min(offset + len(data), base + PAGE)
            self.copies[page][start - base : end - base] = data[start - offset : end - offset]

    def forget(self, offset: int, length: int) -> None:
        """The copies of whole pages in the range are gone; the mapping shows the file again."""
        for page in self._copied(offset, length):
            del self.copies[page]

    def _copied(self, offset: int, length: int) -> list[int]:
        first, last = offset // PAGE, -(-(offset + length) // PAGE)
        return [page for page in self.copies if first <= page < last]


@dataclass
class Program:
    """A running program and the content of its file, which is fixed while it runs."""

    worker: int
    inode: Inode
    sums: bytes  # what it must answer


@dataclass
class Model:
    """All that exists: names, open files, mappings, running programs."""

    names: dict[str, Inode] = field(default_factory=dict)
    handles: dict[int, Handle] = field(default_factory=dict)
    mappings: dict[int, Mapping] = field(default_factory=dict)
    programs: dict[int, Program] = field(default_factory=dict)
    inodes_made: int = 0

    def create(self, name: str, capacity: int) -> Inode:
        """A new empty file, in the place of whatever had the name."""
        self.inodes_made += 1
        inode = self.names[name] = Inode(self.inodes_made, capacity)
        return inode

    def truncated(self, inode: Inode) -> None:
        """After a change of a file's size: no private copy is left of what was cut off."""
        for mapping in self.mappings.values():
            if mapping.inode is inode and mapping.copies:
                mapping.forget(inode.mapped_end, inode.capacity)

    def moved(self, inode: Inode) -> None:
        """After ranges of a file were moved about, nothing is known of the private copies."""
        for mapping in self.mappings.values():
            mapping.unknown |= mapping.inode is inode and bool(mapping.copies)

    def name_of(self, inode: Inode) -> str:
        """The file's name, or a description when it has none any more."""
        for name, other in self.names.items():
            if other is inode:
                return name
        return f"(unlinked, inode {inode.number} of the model)"
