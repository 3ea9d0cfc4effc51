"""The reader against pyelftools on a real file, and against headers that lie."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from largefs.hugetext import elf
from largefs.hugetext.eligible import text_ranges
from largefs.hugetext.view import View
from tests.elf.images import MIB, PIE, R, W, X, gnu_ld_pie, image, lld, load, section


@pytest.mark.parametrize("name", ["bash", "gdb", "ld.so"])
def test_agrees_with_pyelftools(name: str) -> None:
    path = shutil.which(name) or pytest.skip(f"no {name} here")
    with open(path, "rb") as file:
        ours = elf.read(View.of_file(file.fileno()))
        theirs = ELFFile(file)
        assert [s._asdict() for s in ours.segments] == [
            raw_segment(theirs, i) for i in range(theirs.num_segments())
        ]
        assert [s.sh_offset for s in ours.sections] == [
            s["sh_offset"] for s in theirs.iter_sections()
        ]
        assert ours.e_shstrndx == theirs.header["e_shstrndx"]
        build_id = next(
            note["n_desc"]
            for segment in theirs.iter_segments("PT_NOTE")
            for note in segment.iter_notes()
            if note["n_type"] == "NT_GNU_BUILD_ID"
        )
        assert ours.build_id == build_id


def raw_segment(file: ELFFile, number: int) -> dict[str, int]:
    """The header with p_type as the number it is in the file."""
    header = dict(file.get_segment(number).header)
    at = file.header["e_phoff"] + number * 56
    file.stream.seek(at)
    header["p_type"] = struct.unpack("<I", file.stream.read(4))[0]
    return header


def test_reads_headers_only() -> None:
    """A file of 1 TiB costs its headers and the dynamic section."""
    data = lld(pie=True)
    asked = 0

    def pread(length: int, offset: int) -> bytes:
        nonlocal asked
        asked += length
        return data[offset : offset + length]

    elf.read(View(1 << 40, pread))
    assert asked < 4096


def test_extended_numbering() -> None:
    """More headers than 16 bits count: the real numbers are in section header 0."""
    segments = [load(R, 0, 0, 64)] + [PIE._replace(p_type=0x60000000, p_filesz=0)] * 70_000
    sections = [section(0, 0, 0, 0, 0)] + [section(1, 0, 0, 64, 1)] * 70_000
    data = image(segments, sections)
    assert struct.unpack_from("<HHH", data, 56) == (0xFFFF, 64, 0)
    read = elf.read(View.of_bytes(data))
    assert len(read.segments) == len(read.sections) == 70_001


def test_a_number_that_asks_for_too_much() -> None:
    data = bytearray(image([load(R, 0, 0, 64)], [section(0, 0, 0, 0, 1 << 40)]))
    struct.pack_into("<H", data, 60, 0)
    with pytest.raises(elf.Malformed, match="too many"):
        elf.read(View.of_bytes(data))


GOOD = lld(pie=True)


@pytest.mark.parametrize(
    ("at", "value", "exception", "reason"),
    [
        (0, b"#!/b", elf.NotElf, "not an ELF file"),
        (4, b"\1", elf.NotElf, "32-bit"),
        (4, b"\7", elf.NotElf, "class 7"),
        (5, b"\2", elf.NotElf, "big-endian"),
        (5, b"\0", elf.NotElf, "data encoding 0"),
        (7, b"\x09", elf.NotElf, "OS ABI 9"),
        (18, b"\x08\0", elf.NotElf, "e_machine 8"),
        (6, b"\2", elf.Malformed, "ELF version"),
        (20, b"\2", elf.Malformed, "e_version"),
        (52, b"\x41", elf.Malformed, "e_ehsize"),
        (54, b"\x39", elf.Malformed, "e_phentsize"),
        (58, b"\x3f", elf.Malformed, "e_shentsize"),
        (32, bytes(8), elf.Malformed, "program headers do not lie"),
        (32, b"\xff" * 8, elf.Malformed, "program headers do not lie"),
        (40, b"\xff" * 8, elf.Malformed, "section headers do not lie"),
        (60, b"\xff\xff", elf.Malformed, "section headers do not lie"),
        (64 + 56 + 32, b"\xff" * 8, elf.Malformed, "beyond the end"),
        (64 + 56 + 8, b"\xb1", elf.Malformed, "not congruent"),
        (64 + 56 + 16, b"\xff" * 8, elf.Malformed, "address space"),
        (64 + 56 + 40, bytes(8), elf.Malformed, "larger in the file than in memory"),
        (64 + 56 + 48, b"\x03", elf.Malformed, "not a power of two"),
    ],
)
def test_refuses(at: int, value: bytes, exception: type[Exception], reason: str) -> None:
    bad = GOOD[:at] + value + GOOD[at + len(value) :]
    with pytest.raises(exception, match=reason):
        elf.read(View.of_bytes(bad))


def test_every_truncation_has_a_reason() -> None:
    for length in [*range(64 + 7 * 56 + 1), *range(len(GOOD) - 1, len(GOOD) - 513, -1)]:
        with pytest.raises((elf.NotElf, elf.Malformed)):
            elf.read(View.of_bytes(GOOD[:length]))


def test_a_file_that_shrinks_while_it_is_read() -> None:
    view = View(len(GOOD), View.of_bytes(GOOD[:100]).pread)
    with pytest.raises(elf.Malformed, match="became shorter"):
        elf.read(view)


def test_tells_programs_from_libraries() -> None:
    assert elf.read(View.of_bytes(gnu_ld_pie())).is_program
    assert not elf.read(View.of_bytes(lld(pie=False))).is_program


@pytest.mark.parametrize(
    ("flags", "program"),
    [(["-pie"], True), (["-static-pie"], True), (["-shared"], False)],
)
def test_tells_what_gcc_links(flags: list[str], program: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "a.c", tmp_path / "a"
    source.write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-fPIC", *flags, "-o", out, source], check=True)
    fd = os.open(out, os.O_RDONLY)
    try:
        assert elf.read(View.of_file(fd)).is_program == program
    finally:
        os.close(fd)


def test_a_broken_note_ends_the_notes_and_nothing_else() -> None:
    note = struct.pack("<III", 4, 20, 3) + b"GNU\0" + bytes(range(20))
    bad = struct.pack("<III", 4, 1 << 31, 3) + b"GNU\0"
    segments = [load(R | X, 0, 0, 4096), elf.Segment(4, R, 1024, 0, 0, 52, 52, 4)]
    read = elf.read(View.of_bytes(image(segments, contents={1024: note + bad})))
    assert read.notes == (elf.Note(b"GNU", 3, bytes(range(20))),)
    assert read.build_id == bytes(range(20)).hex()


def test_writable_data_is_no_text() -> None:
    read = elf.read(View.of_bytes(image([load(R | W | X, 0, 0, 4 * MIB)], e_type=elf.ET_EXEC)))
    assert text_ranges(read, read.size) == []
