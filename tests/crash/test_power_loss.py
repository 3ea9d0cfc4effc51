"""The machine loses power at random moments under load: what was fsynced is there, and right.

LARGEFS_CRASH_ROUNDS sets how often on each filesystem (default 2); LARGEFS_CRASH_SEED which moments.
"""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.disks import Disk, disk
from tests.crash.markers import Writers
from tests.mounts import LARGEFS, Mounts, largefs, reason_not_to_mount

ROUNDS = int(os.environ.get("LARGEFS_CRASH_ROUNDS", "2"))
SEED = int(os.environ.get("LARGEFS_CRASH_SEED", "1"))


@pytest.fixture(params=["ext4", "xfs"])
def made_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if reason := reason_not_to_mount():
        pytest.skip(reason)
    with disk(tmp_path, request.param, 1 << 30) as made:
        yield made


@pytest.fixture
def mounts_on_it(made_disk: Disk, mounts: Mounts) -> Mounts:
    """Mounts that end before the disk below them does."""
    return mounts


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_power_loss_loses_nothing_that_was_fsynced(
    made_disk: Disk, mounts_on_it: Mounts, tmp_path: Path, round_: int
) -> None:
    moment = random.Random(f"{SEED} {round_}")
    store = made_disk.path / "store"
    largefs("mkfs", store)
    m = mounts_on_it.make("commit=0.5" if round_ % 2 else "commit=5", store=store)
    m.expected = ["."]  # a daemon whose disk is gone complains, and rightly
    with Writers(m.path, tmp_path) as writers:
        writers.wait_for(20)
        time.sleep(moment.uniform(0, 2))
        made_disk.lose_power()
        m.kill()
    made_disk.restore_power()
    largefs("check", store, "--data")  # as the crash left it
    m.mount()
    writers.verify()
    m.unmount()
    largefs("check", store, "--data")


def test_power_loss_right_after_an_import_loses_nothing(
    made_disk: Disk, mounts_on_it: Mounts, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(100):
        (source / f"f{i}").write_bytes(f"{i} ".encode() * (1 + i * 200))
    store = made_disk.path / "store"
    largefs("mkfs", store)
    os.sync()
    largefs("import", source, store)
    made_disk.lose_power()
    made_disk.restore_power()
    m = mounts_on_it.make(store=store)
    subprocess.run(["diff", "-r", source, m.path], check=True)


def test_power_loss_during_an_import_leaves_whole_files(
    made_disk: Disk, mounts_on_it: Mounts, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for i in range(1500):
        directory = source / f"d{i % 10}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{i}").write_bytes(f"{i} ".encode() * (1 + i * 20))
    store = made_disk.path / "store"
    largefs("mkfs", store)
    largefs("import", source / "d0", store, "--to", "/before")

    done = len(list((store / "extents").glob("*/*")))
    importing = subprocess.Popen([LARGEFS, "import", source, store], stderr=subprocess.DEVNULL)
    while len(list((store / "extents").glob("*/*"))) < done + 200 and importing.poll() is None:
        time.sleep(0.01)
    made_disk.lose_power()
    importing.kill()
    assert importing.wait() != 0, "the import was through too early"
    made_disk.restore_power()

    largefs("check", store, "--data")  # as the crash left it
    m = mounts_on_it.make(store=store)
    subprocess.run(["diff", "-r", source / "d0", m.path / "before"], check=True)
    for f in m.path.glob("d*/*"):
        assert f.read_bytes() == (source / f.relative_to(m.path)).read_bytes()
    m.unmount()
    largefs("import", source, store)
    m.mount()
    subprocess.run(["diff", "-r", "-x", "before", source, m.path], check=True)
