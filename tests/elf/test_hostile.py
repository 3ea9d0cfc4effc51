"""Any bytes at all: the reader refuses in words, the planner harms nothing, the way back is exact.

Hypothesis makes layouts from the vocabulary of real linkers; good files have their headers mutated.
What once went wrong is kept in `cases/`. LARGEFS_FUZZ_SECONDS=600 makes it a longer round.
"""

from __future__ import annotations

import os
import random
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from largefs.hugetext import elf
from largefs.hugetext.align import Mode, plan, restore
from largefs.hugetext.eligible import describe
from largefs.hugetext.view import BadRecord, View, decode, reshape
from tests.elf.images import MIB, PIE, TEXT, R, W, X, bolt, gnu_ld_pie, image, lld, load, section

CASES = sorted((Path(__file__).parent / "cases").glob("*"))
INTERESTING = [0, 1, 2, 63, 64, 4095, 4096, 0x1FFFFF, 2 * MIB, 5 * MIB, 2**31, 2**32 - 1, 2**32]
INTERESTING += [2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 1]


def survives(view: View) -> None:
    """What must hold for any bytes whatever."""
    describe(view)
    try:
        before = elf.read(view)
    except (elf.NotElf, elf.Malformed) as error:
        assert str(error)
        before = None
    for mode in Mode:
        p = plan(view, mode)
        assert p.reason and 0 <= p.before <= p.after <= p.text
        if mode is Mode.OFF or before is None:
            assert not p.changed
        covered = 0
        for source, length, destination in p.layout.pieces:
            assert source == covered and destination >= source
            covered += length
        assert covered == view.size  # every byte is kept, once, in order
        aligned = reshape(view, p.layout)
        original = reshape(aligned, restore(p.record()))
        assert original.size == view.size
        heads = min(view.size, 1 << 16)
        assert original.read(0, heads) == view.read(0, heads)
        for source, length, _ in p.layout.pieces:
            for at in (source, max(source, source + length - 4096)):
                assert original.read(at, 4096) == view.read(at, 4096)
        if p.changed:
            after = elf.read(aligned)
            assert before is not None
            for s, t in zip(before.segments, after.segments, strict=True):
                assert s == t._replace(p_offset=s.p_offset, p_align=s.p_align)
                if s.p_type != elf.PT_LOAD or s.p_filesz == 0:
                    continue
                assert (t.p_vaddr - t.p_offset) % max(t.p_align, 1) == 0
                table = before.e_phoff + 56 * len(before.segments)  # may be part of the segment
                skip = max(0, table - s.p_offset)
                length = min(s.p_filesz, 1 << 14) - skip
                old, new = s.p_offset + skip, t.p_offset + skip
                assert view.read(old, length) == aligned.read(new, length)


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_what_once_went_wrong(case: Path) -> None:
    survives(View.of_bytes(case.read_bytes()))


offsets = st.builds(
    lambda page, low: page * 4096 + low,
    st.integers(0, 2 * TEXT // 4096),
    st.sampled_from([0, 0, 0x2B0, 0xDB8]),
)


@dataclass(frozen=True)
class Made:
    """What a generated file is made of; short to print, unlike the file."""

    segments: list[elf.Segment]
    sections: list[elf.Section]
    e_type: int
    tail: bytes

    def data(self) -> bytes:
        return image(self.segments, self.sections, e_type=self.e_type) + self.tail


@st.composite
def layouts(draw: st.DrawFn) -> Made:
    """Segments one after the other, mostly sane, as some linker might place them."""
    segments = []
    offset = draw(st.sampled_from([0, 0, 0, 64, 4096]))
    address = draw(st.sampled_from([0, 0, 0, 0x1000, 2 * MIB, 4 * MIB])) + offset % 4096
    for _ in range(draw(st.integers(1, 5))):
        flags = draw(st.sampled_from([R, R | X, R | X, R | W, R | W | X]))
        size = draw(st.sampled_from([0, 1, 0x12A4, 2 * MIB, 2 * MIB + 8192, 5 * MIB]))
        more = draw(st.sampled_from([0, 0, 0x2000]))
        align = draw(st.sampled_from([0, 1, 8, 4096, 4096, 4096, 0x10000, 2 * MIB, 4 * MIB]))
        if (address - offset) % max(align, 1):
            align = 4096
        segments.append(load(flags, offset, address, size, memsz=size + more, align=align))
        step = draw(st.sampled_from([0, 0, 4096, 3 * 4096, 0x1F000]))
        offset += size + draw(st.sampled_from([0, 0, 0, 1, 16, 4096]))
        address += size + more + step
        address += (offset - address) % 4096
    sections = [section(0, 0, 0, 0, 0)]
    for s in segments:
        if draw(st.booleans()):
            shift = draw(st.sampled_from([0, 0, 0, 8, -8]))
            sections.append(section(1, 2, s.p_vaddr, max(0, s.p_offset + shift), s.p_filesz))
            sections.append(section(8, 3, s.p_vaddr + s.p_filesz, s.p_offset + s.p_filesz, 4096))
    if draw(st.booleans()):
        sections = []
    tail = draw(st.sampled_from([b"", b"", b"\0", b"payload"]))
    if draw(st.booleans()):
        segments.append(PIE)
    return Made(segments, sections, draw(st.sampled_from([2, 3, 3])), tail)


slow = settings(
    max_examples=int(os.environ.get("LARGEFS_FUZZ_EXAMPLES", "150")),
    suppress_health_check=[*settings().suppress_health_check, HealthCheck.data_too_large],
)


# A library that the kernel's choice of address makes eligible, and a base of 2 MiB would not.
ODD_BASE = [load(R | X, 4096, 0, TEXT), load(R, TEXT + 8192, TEXT + 8192, TEXT)]


@slow
@example(Made(ODD_BASE, [], elf.ET_DYN, b""))
@given(layouts())
def test_any_layout(made: Made) -> None:
    survives(View.of_bytes(made.data()))


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    survives(View.of_bytes(data))
    survives(View.of_bytes(b"\x7fELF\2\1\1" + data))
    try:
        decode(data)
    except BadRecord as error:
        assert str(error)


def mutate(rng: random.Random, base: bytes) -> View:
    """One to eight fields of the tables of a good file changed; the file itself is not copied."""
    shoff, phnum, shnum = (
        struct.unpack_from("<Q", base, 40)[0],
        *struct.unpack_from("<HxxH", base, 56),
    )
    patches = []
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        area, count, entry = rng.choice([(0, 1, 64), (64, phnum, 56), (shoff, max(shnum, 1), 64)])
        at = area + rng.randrange(count) * entry + rng.randrange(entry // 4) * 4
        width = rng.choice([1, 2, 4, 8])
        old = int.from_bytes(base[at : at + width], "little")
        value = rng.choice(
            [
                rng.choice(INTERESTING),
                rng.getrandbits(64),
                old + rng.choice([-4096, -1, 1, 8, 4096, 2 * MIB]),
                old ^ 1 << rng.randrange(64),
                rng.randrange(len(base)),
            ]
        )
        patches.append((at, (value % (1 << 8 * width)).to_bytes(width, "little")))
    sizes = [len(base) - 1, len(base) + 1, 1 << 40, rng.randrange(len(base))]
    size = rng.choice([len(base)] * 6 + sizes)

    def pread(length: int, offset: int) -> bytes:
        out = bytearray(base[offset : offset + length])
        out += bytes(min(length, size - offset) - len(out))
        for at, data in patches:
            for i, byte in enumerate(data):
                if 0 <= at + i - offset < len(out):
                    out[at + i - offset] = byte
        return bytes(out)

    return View(size, pread)


def test_mutated_headers() -> None:
    seconds = float(os.environ.get("LARGEFS_FUZZ_SECONDS", "10"))
    seed = int(os.environ.get("LARGEFS_FUZZ_SEED", random.SystemRandom().getrandbits(32)))
    rng = random.Random(seed)
    bases = [gnu_ld_pie(), lld(pie=True), lld(pie=False), bolt(), Path("/bin/bash").read_bytes()]
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        number += 1
        view = mutate(rng, rng.choice(bases))
        try:
            survives(view)
        except Exception:
            print(f"LARGEFS_FUZZ_SEED={seed}, mutation {number}")
            raise
    print(f"{number} mutations in {seconds:.0f} s")
    assert number > 100
