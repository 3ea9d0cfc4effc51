"""Which text of an ELF file a PMD mapping can cover, and why the rest cannot be.

Eligible text (docs/alignment.md) is: whole 2 MiB-aligned blocks of an executable mapping, whose
file offset is congruent to the address modulo 2 MiB, wholly below the file's size. The addresses of
a fixed program are known; those of any other depend on the load bias, of which only the residue
modulo 2 MiB matters (`bias`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from largefs.hugetext.elf import (
    ET_DYN,
    ET_EXEC,
    MACHINES,
    PAGE,
    PF_W,
    PF_X,
    PMD,
    Elf,
    Malformed,
    NotElf,
    Segment,
    read,
)
from largefs.hugetext.view import View


class Range(NamedTuple):
    """Bytes `offset` to `offset + length` of a file."""

    offset: int
    length: int


class Span(NamedTuple):
    """The mapping of one loadable segment, before the load bias is added: whole pages, in bytes."""

    start: int
    end: int
    offset: int
    """File offset of `start`."""

    @property
    def blocks(self) -> tuple[int, int]:
        """Start and end of its whole 2 MiB-aligned blocks, for a bias of 0 modulo 2 MiB."""
        low, high = self.start + -self.start % PMD, self.end - self.end % PMD
        return low, max(low, high)


def span(segment: Segment) -> Span:
    """What the kernel and ld.so map of a segment: every page that holds a byte of its contents."""
    start = segment.p_vaddr - segment.p_vaddr % PAGE
    end = segment.p_vaddr + segment.p_filesz
    return Span(start, end + -end % PAGE, segment.p_offset - segment.p_vaddr % PAGE)


def is_readonly(segment: Segment) -> bool:
    """Mapped from the file and never written: a writable segment's pages become private copies.

    A segment whose offset and address differ within a page cannot be mapped at all.
    """
    mapped = segment.p_filesz > 0 and (segment.p_vaddr - segment.p_offset) % PAGE == 0
    return mapped and not segment.p_flags & PF_W


def is_text(segment: Segment) -> bool:
    """Mapped from the file, executable, and not writable."""
    return is_readonly(segment) and bool(segment.p_flags & PF_X)


def bias(elf: Elf) -> int | None:
    """The load bias modulo 2 MiB, a multiple of the page size; None where it may be anything.

    A fixed program has none. The kernel (5.10+, fs/binfmt_elf.c, maximum_alignment) and glibc's
    ld.so (2.35+, elf/dl-load.c) align the first mapping to the largest p_align. Without it a
    program's base is random; but a shared object goes where mmap puts it, and for a file of a
    filesystem with thp_get_unmapped_area (FUSE, ext4, xfs) the kernel lets address and file offset
    of a mapping of 2 MiB or more agree modulo 2 MiB.
    """
    if elf.e_type == ET_EXEC:
        return 0
    loads = elf.loads
    if elf.e_type != ET_DYN or not loads:
        return None
    first = span(loads[0])
    if max(s.p_align for s in loads) >= PMD:
        return -first.start % PMD
    if elf.is_program or span(loads[-1]).end - first.start < PMD:
        return None
    return (first.offset - first.start) % PMD


def text_ranges(elf: Elf, size: int) -> list[Range]:
    """The eligible text of a file of `size` bytes, as ranges of the file in ascending order."""
    return [Range(p.offset, p.length) for p in _parts(elf, size) if p.why == ELIGIBLE]


def text_size(elf: Elf) -> int:
    """Bytes of text in whole mapped pages: what /proc/PID/smaps shows as Size, eligible or not."""
    return sum(s.end - s.start for s in map(span, filter(is_text, elf.loads)))


ELIGIBLE = "eligible"
HEAD = "before a segment's first whole 2 MiB block"
TAIL = "after a segment's last whole 2 MiB block"
SMALL = "in a segment that holds no whole 2 MiB block"
MOVED = "file offset and address differ modulo 2 MiB"
BASE = "the load address is not a multiple of 2 MiB (p_align)"
LAST = "in the last, partial 2 MiB of the file"


class _Part(NamedTuple):
    offset: int
    length: int
    why: str


def _parts(elf: Elf, size: int) -> list[_Part]:
    """All mapped text, each byte once, with the reason why a PMD mapping can or cannot cover it."""
    residue = bias(elf)
    parts = []
    for segment in filter(is_text, elf.loads):
        start, end, offset = s = span(segment)
        if residue:
            s = Span(start + residue, end + residue, offset)
        low, high = s.blocks
        low, high = low - s.start + offset, high - s.start + offset  # as file offsets
        last = offset + end - start
        if low == high:
            parts.append(_Part(offset, last - offset, SMALL))
            continue
        parts += [_Part(offset, low - offset, HEAD), _Part(high, last - high, TAIL)]
        whole = max(low, high if high <= size else high - PMD)
        if residue is None:
            why = BASE
        else:
            why = MOVED if low % PMD else ELIGIBLE
        parts += [_Part(low, whole - low, why), _Part(whole, high - whole, LAST)]
    return sorted(part for part in parts if part.length)


@dataclass(frozen=True, slots=True)
class Description:
    """The text of one file, for `largefs report`. Sizes are in bytes, of whole mapped pages."""

    kind: str
    """What the file is, such as "shared object, x86-64", or why it is not read."""
    text: int
    eligible: int
    rest: dict[str, int]
    """Why the rest of the text is not eligible, and how much of it: sums up to `text - eligible`.
    """
    build_id: str | None


def describe(view: View) -> Description:
    """Say what there is to say of any file; never raises but for OSError in reading it."""
    try:
        elf = read(view)
    except (NotElf, Malformed) as error:
        return Description(str(error), 0, 0, {}, None)
    amount: dict[str, int] = {}
    for part in _parts(elf, view.size):
        amount[part.why] = amount.get(part.why, 0) + part.length
    eligible = amount.pop(ELIGIBLE, 0)
    kind = f"{_kind(elf)}, {MACHINES[elf.e_machine]}"
    return Description(kind, eligible + sum(amount.values()), eligible, amount, elf.build_id)


def _kind(elf: Elf) -> str:
    if elf.e_type == ET_EXEC:
        return "program at fixed addresses"
    if elf.e_type == ET_DYN:
        return "position-independent program" if elf.is_program else "shared object"
    return f"ELF file of type {elf.e_type}"
