"""Roots with real programs, made once for all tests that run any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.elf import overlay
from tests.elf.packages import PROGRAMS, Unreachable, find


@pytest.fixture(scope="session")
def roots() -> Iterator[overlay.Roots]:
    """The packages as they are and aligned; the test is skipped where that cannot be had."""
    if reason := overlay.why_not():
        pytest.skip(reason)
    packages = []
    for names in PROGRAMS:
        try:
            packages.append(find(names))
        except Unreachable:
            continue
    try:
        with overlay.roots(packages) as made:
            yield made
    except Unreachable as reason:
        pytest.skip(str(reason))
