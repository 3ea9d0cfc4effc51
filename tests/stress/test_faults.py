"""The oracle bites: each fault is found, by its class, and its short replay shows it again."""

import json
import os

import pytest

from largefs.stress import program, program_race, race
from largefs.stress.report import Difference

FAULTS = {
    "stale-after-truncate": {"stale"},
    "wrong-size": {"size"},
    "lost-write": {"lost-write"},
    "loses-last-page": {"lost-write"},
    "shifted-read": {"misplaced"},
    "zeros": {"lost-write"},
    "garbage": {"garbage"},
    "read-error": {"errno", "sigbus"},
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
    assert found["seconds"] < 60, "not found within a minute"
    assert not os.listdir(root), "the tool left something behind"

    header, *operations = map(json.loads, replay.read_text().splitlines())
    assert header["reproduced"] and header["difference"] == found["difference"]
    assert len(operations) <= 12, "the replay is not short"
    lost = fault in ("lost-write", "loses-last-page")
    again = replayed(stress, root, replay, 20 if lost else 1)
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


@pytest.mark.parametrize("fault", ["shifted-read", "zeros", "garbage", "read-error"])
def test_programs_find_it_too(faulty, fault):
    """Text that is wrong sums wrongly or crashes, and a page that cannot be read is a SIGBUS."""
    if not program.supported():
        pytest.skip("the program is for x86-64")
    root = faulty(fault)
    with pytest.raises(Difference) as found:
        for attempt in range(20):
            program_race.run(str(root), f"{fault} {attempt}", 0.5, 30)
    assert found.value.kind in {"garbage", "crash", "errno"}, found.value


@pytest.mark.parametrize(("mode", "path"), [("race", "race"), ("programs", "program")])
def test_race_is_replayed(stress, faulty, tmp_path, mode, path):
    root, replay = faulty("garbage"), tmp_path / "replay.jsonl"
    options = ("--mode", mode, "--seed", 1, "--race", 1, "--save", replay)
    found = stress(root, *options, expect=1)["difference"]
    assert found["path"] == path and found["kind"] in {"garbage", "crash", "errno"}
    again = stress(root, "--replay", replay, expect=1)["difference"]
    assert again["path"] == path and again["kind"] in {"garbage", "crash", "errno"}


def test_correct_filesystem_is_silent(stress, faulty):
    result = stress(faulty("none"), "--seed", 4, "--ops", 1500, "--race", 1, expect=0)
    assert result["difference"] is None
    assert result["operations"] == 1500
    assert result["counts"]["race sum"] > 0
    assert "punch-hole+keep-size" in " ".join(result["unsupported"])
