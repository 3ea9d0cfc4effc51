"""largefs itself under its own stress: no difference, by either way of reading and writing."""

import json

import pytest

from tests.mounts import Mounts, largefs

OPERATIONS = 1500


@pytest.mark.parametrize("route", ["passthrough", "none"])
@pytest.mark.parametrize("seed", [7, 8])
def test_no_difference(mounts: Mounts, route: str, seed: int) -> None:
    """Seed 7 once found that SEEK_DATA did not see what a mapping had written (route none)."""
    mount = mounts.make(f"route={route}")
    said = largefs("stress", mount.path, "--ops", OPERATIONS, "--seed", seed, "--json")
    result = json.loads(said.stdout)
    assert result["operations"] >= OPERATIONS
    assert not list(mount.path.iterdir()), "it does not clean up"
