"""ELF files made to measure: only what the reader and the planner look at, with random contents."""

from __future__ import annotations

import random
from collections.abc import Iterable

from largefs.hugetext.elf import EHDR, ET_DYN, PHDR, PT_LOAD, SHDR, Section, Segment

R, X, W = 4, 1, 2
MIB = 1 << 20
NOISE = random.Random(2019).randbytes(16 * MIB)


def load(flags: int, offset: int, vaddr: int, filesz: int, **other: int) -> Segment:
    """A loadable segment; memsz as filesz and p_align of 4 KiB unless told."""
    memsz, align = other.get("memsz", filesz), other.get("align", 4096)
    return Segment(PT_LOAD, flags, offset, vaddr, vaddr, filesz, memsz, align)


def section(sh_type: int, flags: int, addr: int, offset: int, size: int) -> Section:
    """A section with no name."""
    return Section(0, sh_type, flags, addr, offset, size, 0, 0, 1, 0)


def image(
    segments: Iterable[Segment],
    sections: Iterable[Section] = (),
    *,
    e_type: int = ET_DYN,
    machine: int = 62,
    ident: bytes = b"\x7fELF\2\1\1" + bytes(9),
    size: int | None = None,
    contents: dict[int, bytes] | None = None,
) -> bytes:
    """The file: noise wherever a header says there is something, zeros elsewhere, then `contents`.

    Program headers come first; section headers last, aligned to 8 bytes. `size` cuts the file or
    adds zeros.
    """
    segments, sections = list(segments), list(sections)
    places = [(s.p_offset, s.p_filesz) for s in segments]
    places += [(s.sh_offset, s.sh_size) for s in sections if s.sh_type not in (0, 8)]
    end = max([EHDR.size + len(segments) * PHDR.size, *(o + n for o, n in places)])
    shoff = -(-end // 8) * 8 if sections else 0
    out = bytearray(shoff + len(sections) * SHDR.size if sections else end)
    for offset, length in places:
        start = offset % 65521
        noise = NOISE[start : start + length]
        out[offset : offset + len(noise)] = noise
    phnum, shnum = len(segments), len(sections)
    if phnum >= 0xFFFF or shnum >= 0xFF00:  # extended numbering: section header 0 has the counts
        sections[0] = sections[0]._replace(sh_size=shnum, sh_info=phnum)
        phnum, shnum = min(phnum, 0xFFFF), 0
    header = (ident, e_type, machine, 1, 0x1000, 64, shoff, 0, 64, 56, phnum, 64, shnum, 0)
    out[0 : EHDR.size] = EHDR.pack(*header)
    tables = [(64, PHDR, segments), (shoff, SHDR, sections)]
    for at, entry, rows in tables:
        for i, row in enumerate(rows):
            out[at + i * entry.size : at + (i + 1) * entry.size] = entry.pack(*row)
    for at, data in (contents or {}).items():
        out[at : at + len(data)] = data
    if size is not None:
        out = out[:size] + bytes(size - len(out[:size]))
    return bytes(out)


TEXT = 5 * MIB
"""Bytes of text in the files below; they hold one or two whole blocks."""


def gnu_ld_pie() -> bytes:
    """As GNU ld lays out a PIE today: offsets equal addresses, but for the data."""
    return image(
        [
            load(R, 0, 0, 0x1E3D8),
            load(R | X, 0x1F000, 0x1F000, TEXT),
            load(R, 0x520000, 0x520000, 0x10000),
            load(R | W, 0x530DB8, 0x531DB8, 0x5000, memsz=0x8000),
            Segment(0x6474E551, R | W, 0, 0, 0, 0, 0, 16),  # PT_GNU_STACK
            PIE,
        ],
        [
            section(0, 0, 0, 0, 0),
            section(1, 2 | 4, 0x1F000, 0x1F000, TEXT),
            section(1, 2 | 1, 0x531DB8, 0x530DB8, 0x5000),
            section(8, 2 | 1, 0x536DB8, 0x535DB8, 0x3000),
            section(1, 0, 0, 0x535DB8, 0x27),
        ],
        contents={PIE.p_offset: FLAGS_1_PIE},
    )


def lld(*, pie: bool, e_type: int = ET_DYN, base: int = 0) -> bytes:
    """As lld lays out a program or a library: each segment a page further up in memory."""
    return image(
        [
            load(R, 0, base, 0x12A4),
            load(R | X, 0x12B0, base + 0x22B0, TEXT),
            load(R | W, 0x5012B0, base + 0x5032B0, 0x1130, memsz=0x1D50),
            load(R | W, 0x5023E0, base + 0x5053E0, 0x20, memsz=0x2030),
            Segment(7, R, 0x5012B0, base + 0x5032B0, 0, 0x10, 0x90, 8),  # PT_TLS
            Segment(0x6474E551, R | W, 0, 0, 0, 0, 0, 0),
            PIE if pie else PIE._replace(p_filesz=0),
        ],
        [
            section(0, 0, 0, 0, 0),
            section(1, 2, base + 0x1000, 0x1000, 0x2A4),
            section(1, 2 | 4, base + 0x22B0, 0x12B0, TEXT),
            section(1, 2 | 1, base + 0x5032B0, 0x5012B0, 0x1130),
            section(1, 2 | 1, base + 0x5053E0, 0x5023E0, 0x20),
            section(8, 2 | 1, base + 0x505400, 0x502400, 0x2010),
            section(1, 0, 0, 0x502400, 0x31),
            section(3, 0, 0, 0x502431, 0x64),
        ],
        e_type=e_type,
        contents={PIE.p_offset: FLAGS_1_PIE} if pie else {},
    )


def bolt() -> bytes:
    """As BOLT leaves a library of lld's: its new text follows at a multiple of 2 MiB."""
    return image(
        [
            load(R, 0, 0, 0x12A4),
            load(R | X, 0x12B0, 0x22B0, TEXT),
            load(R | W, 0x5012B0, 0x5032B0, 0x1130, memsz=0x1D50),
            load(R | X, 0x600000, 0x600000, TEXT, align=0x200000),
        ],
        [
            section(0, 0, 0, 0, 0),
            section(1, 2 | 4, 0x22B0, 0x12B0, TEXT),
            section(1, 2 | 4, 0x600000, 0x600000, TEXT),
            section(3, 0, 0, 0x600000 + TEXT, 0x64),
        ],
    )


FLAGS_1_PIE = (0x6FFFFFFB).to_bytes(8, "little") + (0x08000000).to_bytes(8, "little") + bytes(16)
PIE = Segment(2, R | W, 0x800, 0x800, 0x800, 32, 32, 8)
"""A PT_DYNAMIC that holds FLAGS_1_PIE."""
