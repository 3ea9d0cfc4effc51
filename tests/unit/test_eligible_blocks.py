"""The definition of eligible text, against the definition written out byte by byte."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from largefs.hugetext.coverage import Reason, Text, total
from largefs.hugetext.mappings import PAGE, PMD, Mapping

# Small multiples of half a block, with a page more or less, hit every border.
BORDERS = st.builds(
    lambda halves, pages: max(0, halves * (PMD // 2) + pages * PAGE),
    st.integers(0, 12),
    st.integers(-1, 1),
)


def mapping(start: int, length: int, offset: int) -> Mapping:
    return Mapping(
        start=start,
        end=start + length,
        permissions="r-xp",
        offset=offset,
        device=1,
        inode=1,
        path="/file",
        deleted=False,
        pmd_mapped=0,
        flags=frozenset(),
    )


@given(BORDERS, BORDERS, BORDERS, BORDERS, st.integers(0, PAGE - 1))
def test_eligible_blocks(start: int, length: int, offset: int, size: int, odd: int) -> None:
    text = mapping(start, length, offset)
    size += odd
    expected = [
        address
        for address in range(0, start + length, PMD)
        if start <= address
        and address + PMD <= start + length
        and (address - start + offset) % PMD == 0
        and address - start + offset + PMD <= size
    ]
    assert list(text.eligible_blocks(size)) == expected


def test_a_negative_range_is_empty() -> None:
    """The file was truncated to less than the mapping's offset."""
    assert not mapping(8 * PMD, 4 * PMD, 2 * PMD).eligible_blocks(PMD)
    assert len(mapping(8 * PMD, 4 * PMD, 2 * PMD).eligible_blocks(PMD)) == 0


@pytest.mark.parametrize(
    ("touched", "pmd", "coverage"),
    [(0, 0, None), (4 * PMD, 0, 0.0), (4 * PMD, 3 * PMD, 0.75), (4 * PMD, 5 * PMD, 1.0)],
)
def test_coverage(touched: int, pmd: int, coverage: float | None) -> None:
    assert Text(touched=touched, pmd_mapped=pmd).coverage == coverage


def test_total_does_not_change_its_parts() -> None:
    one = Text(1, 2, 3, 4, {Reason.EDGE: 5})
    two = Text(10, 20, 30, 40, {Reason.EDGE: 50, Reason.SMALL: 60})
    before = dataclasses.asdict(one)
    assert total([one, two]) == Text(11, 22, 33, 44, {Reason.EDGE: 55, Reason.SMALL: 60})
    assert dataclasses.asdict(one) == before


def test_labels_are_unique() -> None:
    assert len({reason.label for reason in Reason}) == len(Reason)
