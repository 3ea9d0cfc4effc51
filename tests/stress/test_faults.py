"""The oracle bites: each fault is found, by its class, and its short replay shows it again."""

import json
import os

import pytest

from largefs.stress import race
from largefs.stress.report import Difference

FAULTS = {
    "stale-after-truncate": {"stale"},
    "wrong-size": {"size"},
    "lost-write": {"lost-write"},
    "shifted-read": {"misplaced"},
    "zeros": {"lost-write"},
    "garbage": {"garbage"},
    "read-error": {"errno"},
    "fsync-error": {"errno"},
    "rename-leaves-old-name": {"errno"},
    "open-ignores-truncation": {"size"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found_and_replayed(stress, faulty, tmp_path, fault):
    root = faulty(fault)
    replay = tmp_path / "replay.jsonl"
    options = ("--seed", 2, "--ops", 10000, "--race", 0, "--shrink", 60, "--save", replay)
    found = stress(root, *options, expect=1)
    assert found["difference"]["kind"] in FAULTS[fault], found["difference"]
    assert not os.listdir(root), "the tool left something behind"

    header, *operations = map(json.loads, replay.read_text().splitlines())
    assert header["reproduced"] and header["difference"] == found["difference"]
    assert len(operations) <= 12, "the replay is not short"
    again = replayed(stress, root, replay, 20 if fault == "lost-write" else 1)
    assert (again["kind"], again["offset"]) == (
        found["difference"]["kind"],
        found["difference"]["offset"],
    )


def replayed(stress, root, replay, times):
    """The difference that a replay shows.

    A lost write shows only when the kernel has dropped what it cached of it, so some replays pass.
    """
    for _ in range(times):
        os.sync()
        with open("/proc/sys/vm/drop_caches", "w") as f:
            f.write("1")
        if difference := stress(root, "--replay", replay)["difference"]:
            return difference
    raise AssertionError(f"no difference in {times} replays")


def test_hang_is_found(stress, faulty, tmp_path):
    found = stress(
        faulty("hangs"), "--seed", 1, "--ops", 1000, "--timeout", 2, "--save", tmp_path, expect=1
    )
    assert found["difference"]["kind"] == "hang"


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("stale-after-truncate", {"stale"}),
        ("shifted-read", {"misplaced", "lost-write"}),
        ("zeros", {"lost-write"}),
        ("garbage", {"garbage"}),
        ("lost-write", {"lost-write"}),
        ("read-error", {"errno", "sigbus", "short"}),
    ],
)
def test_race_finds_it_too(faulty, fault, kinds):
    root = faulty(fault)
    with pytest.raises(Difference) as found:
        for attempt in range(10):
            race.run(str(root), f"{fault} {attempt}", 0.5, 30)
    assert found.value.kind in kinds, found.value


def test_race_is_replayed(stress, faulty, tmp_path):
    root, replay = faulty("garbage"), tmp_path / "replay.jsonl"
    only = [f"--skip={name}" for name in ("read", "mread", "fork", "seek", "tail", "huge", "run")]
    options = ("--seed", 1, "--ops", 1, "--race", 1, "--save", replay)
    found = stress(root, *options, *only, expect=1)["difference"]
    assert found["path"] == "race" and found["kind"] == "garbage"
    assert stress(root, "--replay", replay, expect=1)["difference"]["kind"] == "garbage"


def test_correct_filesystem_is_silent(stress, faulty):
    result = stress(faulty("none"), "--seed", 4, "--ops", 1500, "--race", 1, expect=0)
    assert result["difference"] is None
    assert result["operations"] == 1500
    assert "punch-hole+keep-size" in " ".join(result["unsupported"])
