"""A small, strict reader of ELF64 files, little endian, for x86-64 and aarch64.

It reads headers only, through a bounded `View`, and believes nothing: whatever the bytes, `read`
returns an `Elf` whose every range lies inside the file, or raises `NotElf` or `Malformed` with a
reason to show to the user. Field names and numbers are those of elf(5) and the System V ABI.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from largefs.hugetext.view import View

PAGE = 4096
"""Bytes; 2 MiB PMDs go with 4 KiB pages, on x86-64 always and on aarch64 where the kernel was built
so.
"""
PMD = 2 << 20

ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
MACHINES = {62: "x86-64", 183: "aarch64"}
PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_PHDR = 1, 2, 3, 4, 6
PF_X, PF_W = 1, 2
SHT_NULL, SHT_NOBITS = 0, 8
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
DT_SONAME, DT_FLAGS_1, DT_GNU_PRELINKED = 14, 0x6FFFFFFB, 0x6FFFFDF5
DF_1_PIE = 0x08000000
NT_GNU_BUILD_ID = 3
_PN_XNUM = 0xFFFF

EHDR, PHDR, SHDR = (
    struct.Struct("<16sHHIQQQIHHHHHH"),
    struct.Struct("<IIQQQQQQ"),
    struct.Struct("<IIQQQQIIQQ"),
)
_MAX_SEGMENTS, _MAX_SECTIONS = 1 << 17, 1 << 18
"""Bounds on the work that a hostile header can ask for: 7 and 16 MiB of tables. A kernel runs at
most 1170 segments.
"""
_MAX_DYNAMIC = _MAX_NOTES = 64 << 10


class NotElf(Exception):  # noqa: N818
    """Not an ELF64 file, little endian, for x86-64 or aarch64. The text says what it is instead."""


class Malformed(Exception):  # noqa: N818
    """An ELF file that contradicts itself or its own length. The text says where."""


class Segment(NamedTuple):
    """A program header: Elf64_Phdr, in the order of the file."""

    p_type: int
    p_flags: int
    p_offset: int
    p_vaddr: int
    p_paddr: int
    p_filesz: int
    p_memsz: int
    p_align: int


class Section(NamedTuple):
    """A section header: Elf64_Shdr, in the order of the file."""

    sh_name: int
    sh_type: int
    sh_flags: int
    sh_addr: int
    sh_offset: int
    sh_size: int
    sh_link: int
    sh_info: int
    sh_addralign: int
    sh_entsize: int


class Note(NamedTuple):
    """An entry of a PT_NOTE segment: the owner's name, the type the owner gave it, and its
    contents.
    """

    name: bytes
    type: int
    desc: bytes


@dataclass(frozen=True, slots=True)
class Elf:
    """The headers of one file. All offsets and sizes are in bytes."""

    size: int
    e_ident: bytes
    e_type: int
    e_machine: int
    e_phoff: int
    e_shoff: int
    e_shstrndx: int
    segments: tuple[Segment, ...]
    sections: tuple[Section, ...]
    dynamic: dict[int, int]
    """The dynamic section: the first value of each tag."""
    notes: tuple[Note, ...]

    @property
    def loads(self) -> list[Segment]:
        """The loadable segments, in the order of the file."""
        return [s for s in self.segments if s.p_type == PT_LOAD]

    @property
    def is_program(self) -> bool:
        """A position-independent executable (static ones too), not a shared object, when e_type is
        ET_DYN.

        Linkers have set DF_1_PIE since binutils 2.26 and lld 4; before that, a program has an
        interpreter and no name of its own (libc.so.6 and Qt's libraries have both).
        """
        if self.dynamic.get(DT_FLAGS_1, 0) & DF_1_PIE:
            return True
        return DT_SONAME not in self.dynamic and any(s.p_type == PT_INTERP for s in self.segments)

    @property
    def build_id(self) -> str | None:
        """The build id in hexadecimal, or None."""
        wanted = (n.desc.hex() for n in self.notes if n[:2] == (b"GNU", NT_GNU_BUILD_ID))
        return next(wanted, None)


def read(view: View) -> Elf:
    """Read the headers. Raises NotElf, Malformed, or what reading the file raises: OSError."""
    ident, e_type, e_machine, version, e_phoff, e_shoff, e_shstrndx, phnum, shnum = _header(view)
    phnum, shnum, e_shstrndx = _extended(view, e_shoff, phnum, shnum, e_shstrndx)
    if version != 1:
        raise Malformed(f"e_version is {version}, not 1")
    if phnum > _MAX_SEGMENTS or shnum > _MAX_SECTIONS:
        raise Malformed(f"{phnum} program headers and {shnum} section headers are too many")
    segments = tuple(
        map(Segment._make, PHDR.iter_unpack(_table(view, e_phoff, phnum, PHDR, "program")))
    )
    sections = tuple(
        map(Section._make, SHDR.iter_unpack(_table(view, e_shoff, shnum, SHDR, "section")))
    )
    for segment in segments:
        _check_segment(segment, view.size)
    for number, section in enumerate(sections):
        if section.sh_type not in (SHT_NULL, SHT_NOBITS):
            _inside(view.size, section.sh_offset, section.sh_size, f"section {number}")
    return Elf(
        view.size,
        ident,
        e_type,
        e_machine,
        e_phoff,
        e_shoff,
        e_shstrndx,
        segments,
        sections,
        _dynamic(view, segments),
        tuple(_notes(view, segments)),
    )


def _header(view: View) -> tuple[bytes, int, int, int, int, int, int, int, int]:
    raw = view.read(0, EHDR.size)
    if raw[:4] != b"\x7fELF":
        raise NotElf("not an ELF file")
    if len(raw) < EHDR.size:
        raise Malformed("the file ends inside its ELF header")
    if raw[4] != 2:
        raise NotElf("a 32-bit ELF file" if raw[4] == 1 else f"ELF class {raw[4]}")
    if raw[5] != 1:
        raise NotElf("a big-endian ELF file" if raw[5] == 2 else f"ELF data encoding {raw[5]}")
    if raw[6] != 1:
        raise Malformed(f"ELF version {raw[6]}, not 1")
    if raw[7] not in (0, 3):  # ELFOSABI_NONE, ELFOSABI_GNU
        raise NotElf(f"an ELF file for another system (OS ABI {raw[7]})")
    ident, e_type, machine, version, _, phoff, shoff, _, *rest = EHDR.unpack(raw)
    ehsize, phentsize, phnum, shentsize, shnum, shstrndx = rest
    if machine not in MACHINES:
        raise NotElf(f"an ELF file for another machine (e_machine {machine})")
    if ehsize != EHDR.size:
        raise Malformed(f"e_ehsize is {ehsize}, not {EHDR.size}")
    if phnum and phentsize != PHDR.size:
        raise Malformed(f"e_phentsize is {phentsize}, not {PHDR.size}")
    if (shnum or phnum == _PN_XNUM) and shentsize != SHDR.size:
        raise Malformed(f"e_shentsize is {shentsize}, not {SHDR.size}")
    return ident, e_type, machine, version, phoff, shoff, shstrndx, phnum, shnum


def _extended(
    view: View, shoff: int, phnum: int, shnum: int, shstrndx: int
) -> tuple[int, int, int]:
    """The counts, where section header 0 holds those that do not fit the ELF header (elf(5),
    e_phnum).
    """
    if phnum != _PN_XNUM and not (shnum == 0 and shoff) and shstrndx != 0xFFFF:
        return phnum, shnum, shstrndx
    first = Section._make(SHDR.unpack(_table(view, shoff, 1, SHDR, "section")))
    if phnum == _PN_XNUM:
        phnum = first.sh_info
    if shnum == 0:
        shnum = first.sh_size
    if shstrndx == 0xFFFF:
        shstrndx = first.sh_link
    return phnum, shnum, shstrndx


def _table(view: View, offset: int, count: int, entry: struct.Struct, what: str) -> bytes:
    if not count:
        return b""
    length = count * entry.size
    if offset < EHDR.size or offset + length > view.size:
        raise Malformed(f"the {what} headers do not lie inside the file")
    return _exactly(view, offset, length)


def _exactly(view: View, offset: int, length: int) -> bytes:
    raw = view.read(offset, length)
    if len(raw) != length:
        raise Malformed("the file became shorter while it was read")
    return raw


def _inside(size: int, offset: int, length: int, what: str) -> None:
    if length and offset + length > size:
        raise Malformed(f"{what} reaches beyond the end of the file")


def _check_segment(s: Segment, size: int) -> None:
    _inside(size, s.p_offset, s.p_filesz, f"the segment at address {s.p_vaddr:#x}")
    if s.p_type != PT_LOAD:
        return
    at = f"the loadable segment at address {s.p_vaddr:#x}"
    if s.p_filesz > s.p_memsz:
        raise Malformed(f"{at} is larger in the file than in memory")
    if s.p_vaddr + s.p_memsz > 1 << 64:
        raise Malformed(f"{at} reaches beyond the address space")
    align = s.p_align or 1
    if align & (align - 1):
        raise Malformed(f"{at} has p_align {align:#x}, not a power of two")
    if (s.p_vaddr - s.p_offset) % align:
        raise Malformed(f"{at} is not congruent with its offset modulo p_align")


def _dynamic(view: View, segments: tuple[Segment, ...]) -> dict[int, int]:
    tags: dict[int, int] = {}
    for s in segments:
        if s.p_type == PT_DYNAMIC:
            length = min(s.p_filesz, _MAX_DYNAMIC) // 16 * 16
            for tag, value in struct.iter_unpack("<QQ", _exactly(view, s.p_offset, length)):
                if tag == 0:
                    break
                tags.setdefault(tag, value)
            break
    return tags


def _notes(view: View, segments: tuple[Segment, ...]) -> list[Note]:
    """Notes up to the first that is broken: they are for show, and no reason to refuse a file."""
    notes: list[Note] = []
    budget = _MAX_NOTES
    for s in segments:
        if s.p_type != PT_NOTE or budget <= 0:
            continue
        raw = view.read(s.p_offset, min(s.p_filesz, budget))
        budget -= len(raw)
        pad = 8 if s.p_align == 8 else 4
        at = 0
        while at + 12 <= len(raw):
            namesz, descsz, kind = struct.unpack_from("<III", raw, at)
            desc = -(-(at + 12 + namesz) // pad) * pad
            if desc + descsz > len(raw):
                break
            name = raw[at + 12 : at + 12 + namesz].rstrip(b"\0")
            notes.append(Note(name, kind, raw[desc : desc + descsz]))
            at = -(-(desc + descsz) // pad) * pad
    return notes
