"""What every file must hold: the oracle.

An ``Inode`` is the exact bytes and size of a file. Bytes at and beyond the size are always zero in
the model, for that is what a mapping of the last page must show, and what a file extended again
must hold. Handles and mappings are known by numbers that the generator gave, and each belongs to
one worker.
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


@dataclass
class Mapping:
    """A mapping of one worker; offset and length are bytes of the file."""

    worker: int
    inode: Inode
    offset: int
    length: int
    writable: bool


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

    def name_of(self, inode: Inode) -> str:
        """The file's name, or a description when it has none any more."""
        for name, other in self.names.items():
            if other is inode:
                return name
        return f"(unlinked, inode {inode.number} of the model)"
