"""Make an ELF file's text eligible for 2 MiB pages without changing the program.

Two changes do it, and no address, symbol, relocation or build id is touched by either:

- raise p_align to 2 MiB where a segment's offset and address already agree modulo 2 MiB, so that
  the kernel and ld.so choose a base that is a multiple of 2 MiB;
- insert a hole before a segment where they do not agree, and add the hole's length to every later
  file offset that the headers hold.

`plan` decides. Where it doubts that the result would be the same program, it leaves the file as it
is and says why. An importer writes `chunks(view, plan.layout)`, as long as `plan.layout.size`, and
keeps `plan.record()`; an exporter writes `chunks(view, restore(record))` and has the original.
docs/alignment.md tells users what is done, and when not.
"""

from __future__ import annotations

import enum
import struct
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from largefs.hugetext.elf import (
    DT_GNU_PRELINKED,
    EHDR,
    ET_CORE,
    ET_DYN,
    ET_EXEC,
    ET_REL,
    PAGE,
    PHDR,
    PMD,
    PT_LOAD,
    PT_PHDR,
    SHDR,
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHT_NOBITS,
    SHT_NULL,
    Elf,
    Malformed,
    NotElf,
    Section,
    Segment,
    read,
)
from largefs.hugetext.eligible import Range, is_readonly, is_text, span, text_ranges, text_size
from largefs.hugetext.view import Layout, Patch, Piece, View, decode, encode, invert, reshape


class Mode(enum.Enum):
    """How much `plan` may do: the values are those of `largefs import --align`."""

    AUTO = "auto"
    HEADERS = "headers"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with one file. Sizes are in bytes."""

    layout: Layout
    """How to write the file: its pieces, the patches to its headers, its new size."""
    undo: Layout
    """How to get the original back from the file so written."""
    text: int
    """Text in whole mapped pages."""
    before: int
    """Eligible text of the file as it is."""
    ranges: tuple[Range, ...]
    """Eligible text of the file as planned."""
    reason: str
    """What is done and, after a semicolon, why no more is; or why nothing is."""

    @property
    def changed(self) -> bool:
        """Whether the written file differs from its source."""
        return bool(self.layout.patches)

    @property
    def after(self) -> int:
        """Eligible text of the file as planned, in bytes."""
        return sum(r.length for r in self.ranges)

    def record(self) -> bytes:
        """What to keep beside the written file, so that `restore` can undo the plan."""
        return encode(self.undo)


def restore(record: bytes) -> Layout:
    """What makes the original of an aligned file, by `Plan.record()`. Raises BadRecord."""
    return decode(record)


def plan(view: View, mode: Mode, signed: str = "") -> Plan:
    """Decide what to do with one file; raises nothing but OSError from reading the file.

    `signed` names what vouches for the file's bytes from outside, such as a security.ima attribute
    or a detached checksum that the program verifies: such a file is left as it is.
    """
    same = Layout.identity(view.size)
    try:
        elf = read(view)
    except (NotElf, Malformed) as error:
        return Plan(same, same, 0, 0, (), str(error))
    text, ranges = text_size(elf), tuple(text_ranges(elf, view.size))
    before = sum(r.length for r in ranges)
    try:
        layout, reason = _layout(view, elf, mode, signed)
    except _Leave as leave:
        return Plan(same, same, text, before, ranges, str(leave))
    aligned = tuple(text_ranges(read(reshape(view, layout)), layout.size))
    if sum(r.length for r in aligned) < before:
        return Plan(same, same, text, before, ranges, "odd offsets, but eligible as they are")
    return Plan(layout, invert(view, layout), text, before, aligned, reason)


def _layout(view: View, elf: Elf, mode: Mode, signed: str) -> tuple[Layout, str]:
    """The layout and what it does, in words; or _Leave."""
    if mode is Mode.OFF:
        raise _Leave("alignment is off")
    _refuse(view, elf, signed)
    moves, limit = _moves(view, elf, mode)
    patches, done = _patches(elf, moves)
    if not patches:
        raise _Leave(limit or "nothing to do: fixed addresses, or p_align of 2 MiB already")
    layout = Layout(view.size + moves.by[-1], moves.pieces(view.size), patches)
    return layout, f"{done}; {limit}" if limit else done


class _Leave(Exception):  # noqa: N818
    """Leave the file as it is; the text is the reason, for the user."""


_MODULE = b"~Module signature appended~\n"
"""include/linux/module_signature.h"""


def _refuse(view: View, elf: Elf, signed: str) -> None:
    """Raise _Leave for a file that must not be touched, or need not be."""
    if elf.e_type == ET_REL:
        raise _Leave("an object file or kernel module: it is never mapped to run")
    if elf.e_type not in (ET_EXEC, ET_DYN):
        raise _Leave("a core dump" if elf.e_type == ET_CORE else f"ELF type {elf.e_type}")
    if any(s.sh_type == SHT_NOBITS and s.sh_flags & SHF_EXECINSTR for s in elf.sections):
        raise _Leave("debugging information only: its text is in another file")
    if any(s.p_vaddr >= 1 << 63 for s in elf.loads):
        raise _Leave("a kernel image: it is never mapped to run")
    if not any(is_text(s) and _is_large(s) for s in elf.loads):
        raise _Leave("too small: no whole 2 MiB block in its text")
    if signed:
        raise _Leave(f"signed ({signed}): a change would break the signature")
    if DT_GNU_PRELINKED in elf.dynamic:
        raise _Leave("prelinked: the file holds a copy of its own headers")
    if elf.e_ident[8:10] == b"AI":  # the AppImage specification's magic, in e_ident's padding
        raise _Leave("an AppImage: it finds its filesystem by offset")
    end = max(end for _, end in _contents(elf))
    if view.size - end >= PAGE or any(view.read(end, view.size - end)):
        if view.read(view.size - len(_MODULE), len(_MODULE)) == _MODULE:
            raise _Leave("signed (module signature): a change would break the signature")
        raise _Leave(f"{view.size - end} bytes follow the program, which may find them by offset")
    _refuse_overlaps(elf)


def _refuse_overlaps(elf: Elf) -> None:
    """Raise _Leave where headers are so odd that a change could touch what it should not."""
    loads = [s for s in elf.loads if s.p_memsz]
    if elf.e_type == ET_DYN and span(loads[0]).start % PMD:
        raise _Leave("its first address is not a multiple of 2 MiB")
    if any(a.p_vaddr + a.p_memsz > b.p_vaddr for a, b in pairwise(loads)):
        raise _Leave("its segments overlap in memory, or are out of order")
    if _overlap([_bytes(s) for s in loads]):
        raise _Leave("its segments overlap in the file")
    tables = _tables(elf)
    if _overlap(tables):
        raise _Leave("its header tables overlap")
    # The first loadable segment holds the ELF header and the program headers, PT_PHDR the latter.
    others = [_bytes(s) for s in elf.segments if s.p_type not in (PT_LOAD, PT_PHDR)]
    others += [_bits(s) for s in elf.sections]
    if any(_meet(table, other) for table in tables for other in others):
        raise _Leave("its header tables overlap its contents")
    if elf.sections and any(_meet(tables[-1], _bytes(s)) for s in loads):
        raise _Leave("its section headers are part of a segment")


_Extent = tuple[int, int]
"""(start, end) in the file, empty if they are equal."""


def _tables(elf: Elf) -> list[_Extent]:
    """The ELF header, the program headers and, if there are any, the section headers."""
    tables = [(0, EHDR.size), (elf.e_phoff, elf.e_phoff + len(elf.segments) * PHDR.size)]
    if elf.sections:
        tables.append((elf.e_shoff, elf.e_shoff + len(elf.sections) * SHDR.size))
    return tables


def _bytes(segment: Segment) -> _Extent:
    return segment.p_offset, segment.p_offset + segment.p_filesz


def _bits(section: Section) -> _Extent:
    size = 0 if section.sh_type in (SHT_NULL, SHT_NOBITS) else section.sh_size
    return section.sh_offset, section.sh_offset + size


def _contents(elf: Elf) -> list[_Extent]:
    """Everything in the file that a header describes, headers included, in the file's order."""
    extents = _tables(elf) + [_bytes(s) for s in elf.segments] + [_bits(s) for s in elf.sections]
    return sorted((start, end) for start, end in extents if start < end)


def _meet(a: _Extent, b: _Extent) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


def _overlap(extents: list[_Extent]) -> bool:
    return any(_meet(a, b) for a, b in pairwise(sorted(e for e in extents if e[0] < e[1])))


_MAX_PADDING = 16 << 20
"""Bytes that no header describes and that may still be padding: some linkers pad to 2 MiB."""


def _is_data(view: View, start: int, end: int) -> bool:
    """Whether bytes that no header describes may be data: any but zeros, or lld's traps (0xcc)."""
    return set(view.read(start, end - start)) not in ({0}, {0xCC})


# Moving


@dataclass(frozen=True, slots=True)
class _Moves:
    """What stands from offset `at[i]` up to `at[i + 1]` moves up by `by[i]`; both ascend from 0."""

    at: list[int]
    by: list[int]

    def __call__(self, offset: int) -> int:
        """By how much what stands at `offset` moves."""
        return self.by[bisect_right(self.at, offset) - 1]

    def pieces(self, size: int) -> tuple[Piece, ...]:
        """The whole of a file of `size` bytes, cut where a hole goes."""
        ends = [*self.at[1:], size]
        parts = zip(self.at, ends, self.by, strict=True)
        return tuple(Piece(at, end - at, at + by) for at, end, by in parts)


_STAY = _Moves([0], [0])


def _is_large(segment: Segment) -> bool:
    """Holds a whole 2 MiB block that is never written: worth a 2 MiB page."""
    low, high = span(segment).blocks
    return is_readonly(segment) and low < high


def _agrees(segment: Segment, offset: int) -> bool:
    """Whether the segment's address and an offset agree modulo 2 MiB."""
    return (segment.p_vaddr - offset) % PMD == 0


def _moves(view: View, elf: Elf, mode: Mode) -> tuple[_Moves, str]:
    """Where to insert holes so that all large text becomes congruent; and why not, or not all."""
    text = [s for s in elf.loads if is_text(s) and _is_large(s)]
    if all(_agrees(s, s.p_offset) for s in text):
        return _STAY, ""
    if mode is Mode.HEADERS:
        return _STAY, "text is not at congruent offsets: --align=auto may move it"
    moves = _wanted(elf)
    cuts = moves.at[1:]
    end = unknown = 0
    for low, high in _contents(elf):
        if bisect_right(cuts, low) != bisect_right(cuts, high - 1):
            return _STAY, "text cannot move: something reaches across a segment's start"
        if cuts and low > end >= cuts[0]:
            unknown += low - end
            if unknown > _MAX_PADDING or _is_data(view, end, low):
                return _STAY, f"text cannot move: no header says what the bytes at {end} are"
        end = max(end, high)
    if all(_agrees(s, s.p_offset + moves(s.p_offset)) for s in text):
        return moves, ""
    return moves, "text that begins with the ELF header cannot move"


def _wanted(elf: Elf) -> _Moves:
    """The smallest holes before segments that give each the offset it needs."""
    moves = _Moves([0], [0])
    for s in sorted((s for s in elf.loads if s.p_filesz), key=lambda s: s.p_offset):
        residue, modulus = 0, max(s.p_align, PAGE)
        if _is_large(s) and (is_text(s) or _agrees(s, s.p_offset)):
            residue, modulus = s.p_vaddr - s.p_offset, max(s.p_align, PMD)
        hole = (residue - moves.by[-1]) % modulus
        if hole and s.p_offset:
            moves.at.append(s.p_offset)
            moves.by.append(moves.by[-1] + hole)
    return moves


# Headers


def _patches(elf: Elf, moves: _Moves) -> tuple[tuple[Patch, ...], str]:
    """The header tables that differ after `moves`, and what was done, in words."""
    segments, sections = _moved_headers(elf, moves)
    moved = segments
    if elf.e_type == ET_DYN:
        segments = [_raised(s) for s in segments]
    phoff, shoff = elf.e_phoff + moves(elf.e_phoff), elf.e_shoff
    if elf.sections:
        shoff += moves(shoff)
    patches = []
    if (phoff, shoff) != (elf.e_phoff, elf.e_shoff):
        patches.append(Patch(_PHOFF, struct.pack("<QQ", phoff, shoff)))
    if segments != list(elf.segments):
        patches.append(Patch(phoff, b"".join(PHDR.pack(*s) for s in segments)))
    if sections != list(elf.sections):
        patches.append(Patch(shoff, b"".join(SHDR.pack(*s) for s in sections)))
    done = []
    if any(moves.by):
        holes = (f"{high - low}" for low, high in pairwise(moves.by))
        done.append(f"inserted holes of {', '.join(holes)} bytes")
    if segments != moved:
        done.append("raised p_align to 2 MiB")
    return tuple(patches), " and ".join(done)


_PHOFF = 32
"""Offset of e_phoff in the ELF header, and e_shoff follows it."""


def _moved_headers(elf: Elf, moves: _Moves) -> tuple[list[Segment], list[Section]]:
    """Segments and sections with their offsets after `moves`.

    What has bytes in the file moves with them. What has none (.bss, .tbss) only pretends to an
    offset, which goes on being consistent with that of the segment around it; an empty segment
    stays, for its p_align.
    """
    loads = sorted((s for s in elf.loads if s.p_memsz), key=lambda s: s.p_vaddr)
    starts = [s.p_vaddr for s in loads]

    def empty(offset: int, address: int) -> int:
        if offset > elf.size:
            return 0
        load = loads[max(0, bisect_right(starts, address) - 1)]
        if offset - load.p_offset == address - load.p_vaddr:
            return moves(load.p_offset) if load.p_filesz else 0
        return moves(offset)

    def segment(s: Segment) -> int:
        if s.p_filesz:
            return moves(s.p_offset)
        return 0 if s.p_type == PT_LOAD else empty(s.p_offset, s.p_vaddr)

    def section(s: Section) -> int:
        if s.sh_type == SHT_NULL:
            return 0
        start, end = _bits(s)
        if start < end or not s.sh_flags & SHF_ALLOC:
            return moves(start) if start <= elf.size else 0
        return empty(s.sh_offset, s.sh_addr)

    return (
        [s._replace(p_offset=s.p_offset + segment(s)) for s in elf.segments],
        [s._replace(sh_offset=s.sh_offset + section(s)) for s in elf.sections],
    )


def _raised(s: Segment) -> Segment:
    """The segment with p_align of 2 MiB, where it is large and its offset allows that."""
    if s.p_type == PT_LOAD and _is_large(s) and _agrees(s, s.p_offset):
        return s._replace(p_align=max(s.p_align, PMD))
    return s
