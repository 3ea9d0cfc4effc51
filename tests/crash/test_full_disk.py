"""A full disk: nothing half is ever visible, nothing is lost, and with room again everything goes on."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.disks import Disk, disk
from tests.crash.markers import sync_directory, write_and_sync
from tests.mounts import Mounts, largefs, reason_not_to_mount

SOURCE = Path("/usr/lib/gcc")
MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk of the kind that the test is parametrized with, or of ext4."""
    if reason := reason_not_to_mount():
        pytest.skip(reason)
    with disk(tmp_path, getattr(request, "param", "ext4"), 256 * MIB) as made:
        yield made


@pytest.fixture
def mounts_on_it(small_disk: Disk, mounts: Mounts) -> Mounts:
    """Mounts that end before the disk below them does."""
    return mounts


def test_an_import_that_fills_the_disk_is_completed_by_a_second_run(
    small_disk: Disk, mounts_on_it: Mounts
) -> None:
    store = small_disk.path / "store"
    largefs("mkfs", store)
    ballast = small_disk.fill(leave=60 * MIB)
    said = largefs("import", SOURCE, store, code=1).stderr
    assert "the disk is full after" in said
    assert said.count("\n") == 1
    largefs("check", store, "--data")
    m = mounts_on_it.make(store=store)
    names = 0
    for directory, _, files in os.walk(m.path):
        for name in files:
            got = Path(directory) / name
            if got.is_symlink():
                continue
            names += 1
            original = SOURCE / got.relative_to(m.path)
            assert got.stat().st_size >= original.stat().st_size, f"{got}: half a file"
    assert names > 5
    m.unmount()
    ballast.unlink()
    largefs("import", SOURCE, store, "--align", "off")
    m.mount()
    subprocess.run(["diff", "-rq", "--no-dereference", SOURCE, m.path], check=True)


def test_writes_to_a_full_disk_fail_and_go_on_when_there_is_room(
    small_disk: Disk, mounts_on_it: Mounts
) -> None:
    store = small_disk.path / "store"
    largefs("mkfs", store)
    m = mounts_on_it.make(store=store)
    m.expected = ["No space left on device", "full"]
    (m.path / "before").write_bytes(b"kept" * 1000)
    small_disk.fill(leave=10 * MIB)
    with pytest.raises(OSError) as e, (m.path / "big").open("wb", buffering=0) as f:
        while True:
            f.write(b"x" * MIB)
    assert e.value.errno == errno.ENOSPC
    assert (m.path / "before").read_bytes() == b"kept" * 1000
    (m.path / "big").unlink()  # frees the room, though the disk is full
    sync_directory(m.path)
    write_and_sync(m.path / "after", b"y" * 4 * MIB)
    assert (m.path / "after").stat().st_size == 4 * MIB


@pytest.mark.parametrize("small_disk", ["ext4", "ext2", "tmpfs"], indirect=True)
def test_a_commit_without_room_fails_loses_nothing_and_is_tried_again(
    small_disk: Disk, mounts_on_it: Mounts
) -> None:
    store = small_disk.path / "store"
    largefs("mkfs", store)
    m = mounts_on_it.make("commit=0.5", store=store)
    m.expected = ["No space left on device", "full"]
    ballast = small_disk.fill()
    made = 0
    with pytest.raises(OSError) as e:
        for i in range(20_000):  # until the log of the database would need more than there is
            os.symlink("t" * 1000, m.path / f"link{i:05}")
            made += 1
            if i % 100 == 99:
                sync_directory(m.path)
    assert e.value.errno == errno.ENOSPC
    assert os.readlink(m.path / "link00000") == "t" * 1000
    (m.path / "link00000").unlink()
    ballast.unlink()
    (m.path / "with room again").write_bytes(b"content")
    sync_directory(m.path)
    names = sorted(os.listdir(m.path))
    assert names == sorted([f"link{i:05}" for i in range(1, made)] + ["with room again"])
    m.kill()
    m.mount()
    assert sorted(os.listdir(m.path)) == names
