"""largefs itself under its own stress: no difference, by either way of reading and writing."""

import json
from typing import Any

import pytest

from tests.mounts import Mount, Mounts, largefs

OPERATIONS = 1500
MINUTE = 60


def stress(mount: Mount, *options: object) -> dict[str, Any]:
    """A run without a difference; its summary."""
    result: dict[str, Any] = json.loads(largefs("stress", mount.path, *options, "--json").stdout)
    assert result["difference"] is None
    assert not list(mount.path.iterdir()), "it does not clean up"
    return result


@pytest.mark.parametrize("route", ["passthrough", "none"])
@pytest.mark.parametrize("seed", [7, 8])
def test_no_difference(mounts: Mounts, route: str, seed: int) -> None:
    """Seed 7 once found that SEEK_DATA did not see what a mapping had written (route none)."""
    mount = mounts.make(f"route={route}")
    result = stress(mount, "--ops", OPERATIONS, "--seed", seed)
    assert result["operations"] >= OPERATIONS


@pytest.mark.parametrize(
    ("mode", "count"), [("oracle", "truncate"), ("race", "race truncate"), ("programs", "race sum")]
)
def test_a_minute_of_each_mode(mounts: Mounts, mode: str, count: str) -> None:
    """Where there are huge pages, too: not only is nothing wrong, there was something to go wrong."""
    mount = mounts.make("route=passthrough")
    result = stress(mount, "--mode", mode, "--seconds", MINUTE)
    assert result["seconds"] >= MINUTE and result["counts"][count] > 100
    assert result["pmd_mapped"]["seen"] > 0
