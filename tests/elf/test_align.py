"""The planner on files made to measure: what it does, when it does nothing, and the way back."""

from __future__ import annotations

import re
import struct

import pytest

from largefs.hugetext import elf
from largefs.hugetext.align import Mode, Plan, plan, restore
from largefs.hugetext.eligible import Range, describe, text_ranges
from largefs.hugetext.view import (
    BadRecord,
    Layout,
    Patch,
    Piece,
    View,
    chunks,
    decode,
    encode,
    reshape,
)
from tests.elf.images import (
    MIB,
    NOISE,
    PIE,
    TEXT,
    R,
    W,
    X,
    bolt,
    gnu_ld_pie,
    image,
    lld,
    load,
    section,
)

BLOCK = 2 * MIB


def write(view: View, layout: Layout) -> bytes:
    """What an importer does with a layout."""
    out = bytearray(layout.size)
    for offset, data in chunks(view, layout, limit=1 << 16):
        out[offset : offset + len(data)] = data
    return bytes(out)


def check(data: bytes, mode: Mode = Mode.AUTO) -> tuple[Plan, bytes]:
    """Plan, write, and go back; then the plan and the aligned file, for more questions."""
    view = View.of_bytes(data)
    p = plan(view, mode)
    aligned = write(view, p.layout)
    assert reshape(view, p.layout).read(0, p.layout.size) == aligned
    undo = restore(p.record())
    assert write(View.of_bytes(aligned), undo) == data
    assert p.changed == (aligned != data)
    assert p.before == describe(view).eligible
    assert p.after == describe(View.of_bytes(aligned)).eligible >= p.before
    if p.changed:
        same_program(data, aligned)
        again = plan(View.of_bytes(aligned), mode)
        assert not again.changed, again.reason
    return p, aligned


def same_program(old: bytes, new: bytes) -> None:
    """Headers are equal but for offsets and p_align, and all else at all addresses."""
    a, b = elf.read(View.of_bytes(old)), elf.read(View.of_bytes(new))
    headers = 64 + len(a.segments) * 56
    assert (a.e_type, a.e_machine, a.dynamic, a.notes) == (
        b.e_type,
        b.e_machine,
        b.dynamic,
        b.notes,
    )
    for s, t in zip(a.segments, b.segments, strict=True):
        assert s == t._replace(p_offset=s.p_offset, p_align=s.p_align)
        skip = headers if s.p_offset == t.p_offset == 0 else 0
        assert (
            old[s.p_offset + skip : s.p_offset + s.p_filesz]
            == new[t.p_offset + skip : t.p_offset + t.p_filesz]
        )
        assert t.p_align in (s.p_align, BLOCK)
    for c, d in zip(a.sections, b.sections, strict=True):
        assert c == d._replace(sh_offset=c.sh_offset)
        if c.sh_type not in (0, 8):
            assert (
                old[c.sh_offset : c.sh_offset + c.sh_size]
                == new[d.sh_offset : d.sh_offset + d.sh_size]
            )


def test_a_pie_needs_only_its_headers() -> None:
    p, aligned = check(gnu_ld_pie())
    assert (p.before, p.after) == (0, BLOCK)
    assert p.reason == "raised p_align to 2 MiB"
    assert p.layout.pieces == (Piece(0, len(aligned), 0),)
    assert check(gnu_ld_pie(), Mode.HEADERS)[0] == p
    aligns = [s.p_align for s in elf.read(View.of_bytes(aligned)).loads]
    assert aligns == [4096, BLOCK, 4096, 4096]


def test_what_lld_links_must_move() -> None:
    for pie in (True, False):
        p, aligned = check(lld(pie=pie))
        assert (p.before, p.after) == (0, BLOCK)
        assert p.reason == "inserted holes of 4096 bytes and raised p_align to 2 MiB"
        assert len(aligned) == len(lld(pie=pie)) + 4096
        loads = elf.read(View.of_bytes(aligned)).loads
        assert [s.p_offset for s in loads] == [0, 0x22B0, 0x5022B0, 0x5033E0]


def test_headers_mode_says_that_more_is_possible() -> None:
    p, _ = check(lld(pie=True), Mode.HEADERS)
    assert not p.changed and "--align=auto" in p.reason


def test_fixed_addresses_need_no_p_align() -> None:
    fixed = image([load(R | X, 0, 0x400000, TEXT)], e_type=elf.ET_EXEC)
    p, _ = check(fixed)
    assert not p.changed and p.before == 2 * BLOCK and "nothing to do" in p.reason
    p, aligned = check(lld(pie=False, e_type=elf.ET_EXEC, base=0x200000))
    assert p.reason == "inserted holes of 4096 bytes"
    assert all(s.p_align == 4096 for s in elf.read(View.of_bytes(aligned)).loads)


def test_bolt_keeps_the_alignment_that_its_new_text_has() -> None:
    p, aligned = check(bolt())
    assert p.before == 2 * BLOCK and p.after == 3 * BLOCK
    assert p.reason.startswith("inserted holes of 4096, 2093056 bytes")
    assert [s.p_offset % BLOCK for s in elf.read(View.of_bytes(aligned)).loads][-1] == 0


def test_a_shared_object_that_the_kernel_places_is_eligible_already() -> None:
    shared = image([load(R | X, 0, 0, TEXT)])
    p, _ = check(shared)
    assert p.before == p.after == 2 * BLOCK
    assert p.reason == "raised p_align to 2 MiB"


def test_text_ranges() -> None:
    aligned = elf.read(View.of_bytes(check(lld(pie=True))[1]))
    assert text_ranges(aligned, aligned.size) == [Range(BLOCK, BLOCK)]
    assert text_ranges(aligned, 2 * BLOCK) == [Range(BLOCK, BLOCK)]
    assert text_ranges(aligned, 2 * BLOCK - 1) == []
    assert text_ranges(aligned, 0) == []


def test_the_last_partial_block_of_the_file_is_not_eligible() -> None:
    whole = image([load(R | X, 0, 0x400000, 2 * BLOCK)], e_type=elf.ET_EXEC)
    assert describe(View.of_bytes(whole)).eligible == 2 * BLOCK
    short = image([load(R | X, 0, 0x400000, 2 * BLOCK - 1)], e_type=elf.ET_EXEC)
    d = describe(View.of_bytes(short))
    assert (d.text, d.eligible) == (2 * BLOCK, BLOCK)
    assert d.rest == {"in the last, partial 2 MiB of the file": BLOCK}


def test_describe_accounts_for_every_page() -> None:
    d = describe(View.of_bytes(lld(pie=True)))
    assert d.kind == "position-independent program, x86-64"
    assert d.text == TEXT + 4096 and d.eligible == 0
    assert d.rest == {
        "before a segment's first whole 2 MiB block": BLOCK - 0x2000,
        "after a segment's last whole 2 MiB block": TEXT + 4096 - 2 * BLOCK + 0x2000,
        "the load address is not a multiple of 2 MiB (p_align)": BLOCK,
    }
    d = describe(View.of_bytes(lld(pie=False)))
    assert d.kind == "shared object, x86-64"
    assert d.rest["file offset and address differ modulo 2 MiB"] == BLOCK
    d = describe(View.of_bytes(b"#!/bin/sh\n"))
    assert d.kind == "not an ELF file" and d.text == d.eligible == 0


def appended(data: bytes) -> bytes:
    return gnu_ld_pie() + data


NOT_AT_ALL = {
    "script": (b"#!/bin/sh\nexit 0\n", "not an ELF file"),
    "empty": (b"", "not an ELF file"),
    "object": (image([load(R | X, 0, 0, TEXT)], e_type=elf.ET_REL), "object file or kernel module"),
    "core": (image([load(R | X, 0, 0, TEXT)], e_type=elf.ET_CORE), "core dump"),
    "other type": (image([load(R | X, 0, 0, TEXT)], e_type=0xFE00), "ELF type 65024"),
    "small text": (image([load(R | X, 0, 0, BLOCK + 4096 - 8192)]), "too small"),
    "no whole block": (image([load(R | X, 0x1000, 0x1000, 2 * BLOCK - 8192)]), "too small"),
    "unmappable": (image([load(R | X, 1, 0x400000, TEXT, align=1)], e_type=2), "too small"),
    "kernel": (image([load(R | X, 0x1000, 0xFFFF_FFFF_8100_0000, TEXT)], e_type=2), "kernel image"),
    "appended": (appended(b"payload"), "7 bytes follow the program"),
    "appended page of zeros": (appended(bytes(4096)), "4096 bytes follow the program"),
    "module signature": (
        appended(NOISE[:99] + b"~Module signature appended~\n"),
        "module signature",
    ),
    "AppImage": (gnu_ld_pie()[:8] + b"AI\2" + gnu_ld_pie()[11:], "AppImage"),
    "odd base": (image([load(R | X, 0, 0x1000, TEXT)]), "first address"),
    "overlap in memory": (image([load(R | X, 0, 0, TEXT), load(R, 0, 0x1000, 4096)]), "in memory"),
    "out of order": (image([load(R | X, 0, BLOCK, TEXT), load(R, 0, 0, 4096)]), "out of order"),
    "overlap in the file": (
        image([load(R | X, 0, 0, TEXT), load(R, 0, TEXT, 4096)]),
        "in the file",
    ),
    "tables overlap": (
        image([load(R | X, 0, 0, TEXT)], contents={32: (16).to_bytes(8, "little")}),
        "do not lie inside",
    ),
    "sections in a segment": (
        image(
            [load(R | X, 0, 0, TEXT)],
            [section(0, 0, 0, 0, 0)],
            contents={40: (0x2000).to_bytes(8, "little"), 0x2000: bytes(64)},
        ),
        "follow the program|part of a segment",
    ),
    "section over the headers": (
        image([load(R | X, 0, 0, TEXT)], [section(0, 0, 0, 0, 0), section(1, 2, 0, 100, 64)]),
        "overlap its contents",
    ),
    "debug file": (
        image([load(R | X, 0, 0, TEXT)], [section(8, 2 | 4, 0x1000, 0x1000, TEXT - 4096)]),
        "debugging information",
    ),
    "prelinked": (
        image(
            [load(R | X, 0, 0, TEXT), PIE],
            contents={PIE.p_offset: struct.pack("<QQQQ", 0x6FFFFDF5, 1, 0, 0)},
        ),
        "prelinked",
    ),
    "broken": (gnu_ld_pie()[: 4 * MIB], "section headers do not lie inside the file"),
}


@pytest.mark.parametrize("case", NOT_AT_ALL)
def test_when_not_to(case: str) -> None:
    data, reason = NOT_AT_ALL[case]
    p, aligned = check(data)
    assert not p.changed and aligned == data
    assert re.search(reason, p.reason), p.reason


def test_off_and_signed() -> None:
    view = View.of_bytes(lld(pie=True))
    assert plan(view, Mode.OFF).reason == "alignment is off"
    p = plan(view, Mode.AUTO, signed="security.ima")
    assert not p.changed and p.reason.startswith("signed (security.ima)")


def test_padding_is_not_appended_data() -> None:
    p, _ = check(gnu_ld_pie() + bytes(7))
    assert p.changed


def with_gap(filling: bytes) -> bytes:
    """lld's layout, with a page between the text and the data that no header describes."""
    segments = [load(R, 0, 0, 0x12A4), load(R | X, 0x12B0, 0x22B0, TEXT - 0x2B0)]
    segments.append(load(R | W, 0x503000, 0x505000, 0x1000))
    return image(segments, contents={0x501000: filling})


def test_unknown_bytes_between_segments_stay_where_they_are() -> None:
    assert check(with_gap(b""))[0].changed
    assert check(with_gap(b"\xcc" * 0x2000))[0].changed
    p, _ = check(with_gap(b"offset 0x501000"))
    assert not p.changed and "no header says what the bytes" in p.reason


def test_what_reaches_across_a_segments_start_keeps_it_there() -> None:
    segments = [load(R, 0, 0, 0x12A4), load(R | X, 0x12B0, 0x22B0, TEXT)]
    sections = [section(0, 0, 0, 0, 0), section(1, 0, 0, 0x1200, 0x1000)]
    p, _ = check(image(segments, sections))
    assert not p.changed and "reaches across" in p.reason


def test_text_with_the_elf_header_in_it_cannot_move() -> None:
    p, _ = check(image([load(R | X, 0, 0x401000, TEXT)], e_type=elf.ET_EXEC))
    assert not p.changed and "ELF header cannot move" in p.reason


def test_a_segment_of_bss_alone_stays() -> None:
    segments = [
        load(R, 0, 0, 0x12A4),
        load(R | X, 0x12B0, 0x22B0, TEXT),
        load(R | W, 0, 0x600000, 0, memsz=0x100000, align=BLOCK),
    ]
    p, aligned = check(image(segments))
    assert p.changed and elf.read(View.of_bytes(aligned)).loads[2] == segments[2]


def test_larger_alignment_of_a_later_segment_is_kept() -> None:
    segments = [
        load(R, 0, 0, 0x12A4),
        load(R | X, 0x12B0, 0x22B0, TEXT),
        load(R | W, 0x510000, 0x520000, 0x1000, align=0x10000),
    ]
    p, aligned = check(image(segments))
    assert p.reason.startswith("inserted holes of 4096, 61440 bytes")
    assert elf.read(View.of_bytes(aligned)).loads[2].p_align == 0x10000


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\2" + encode(Layout.identity(9))[1:],
        encode(Layout.identity(9))[:-1],
        encode(Layout.identity(9)) + b"\0",
        encode(Layout(8, (Piece(0, 9, 0),))),
        encode(Layout(9, (Piece(0, 9, 0), Piece(0, 9, 0)))),
        encode(Layout(9, (), (Patch(8, b"ab"),))),
        b"\1" + bytes(64),
    ],
)
def test_bad_records(record: bytes) -> None:
    with pytest.raises(BadRecord):
        decode(record)


def test_records_are_small() -> None:
    assert len(plan(View.of_bytes(lld(pie=True)), Mode.AUTO).record()) < 600
