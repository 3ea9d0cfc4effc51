"""A full disk: nothing half is ever visible, nothing is lost, and with room again everything goes on."""

import contextlib
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from tests.crash.disks import Disk, disk
from tests.crash.markers import sync_directory, write_and_sync
from tests.mounts import CLOSED, Mounts, largefs, reason_not_to_mount

SOURCE = Path("/usr/lib/gcc")
MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk of the kind that the test is parametrized with, or of ext4."""
    if reason := reason_not_to_mount():
        pytest.skip(reason)
    with disk(tmp_path, getattr(request, "param", "ext4"), 320 * MIB) as made:  # xfs takes no less
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


def refused(*args: object, code: int, says: str) -> None:
    """A command ends with `code` and one line that contains `says`."""
    done = largefs(*args, code=code)
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
@pytest.mark.parametrize("small_disk", ["ext4", "xfs", "tmpfs"], indirect=True)
def test_a_store_on_a_full_disk_is_mounted_to_clear_it_up(
    small_disk: Disk, mounts_on_it: Mounts, killed: bool
) -> None:
    """Nothing but the store needs be on the disk: it is not from beside it that room must come."""
    store = small_disk.path / "store"
    largefs("mkfs", store)
    m = mounts_on_it.make(store=store)
    m.expected = ["full"]
    for name in "abc":
        write_and_sync(m.path / name, os.urandom(8 * MIB))
    m.kill() if killed else m.unmount()
    small_disk.fill()
    m.mount()
    assert (m.path / "a").stat().st_size == 8 * MIB
    (m.path / "b").unlink()
    sync_directory(m.path)
    deadline = time.monotonic() + 60
    while shutil.disk_usage(m.path).free < 6 * MIB:
        # after a crash b may still be read, for its checksums; XFS frees blocks in the background
        assert time.monotonic() < deadline
        time.sleep(0.05)
    write_and_sync(m.path / "d", os.urandom(4 * MIB))
    m.unmount()
    small_disk.fill()
    largefs("check", store, "--data")
    largefs("check", store, "--repair")
    m.mount()
    assert sorted(os.listdir(m.path)) == ["a", "c", "d"]


@pytest.mark.parametrize("small_disk", ["ext2", "tmpfs"], indirect=True)
def test_where_no_room_is_held_it_has_to_be_made(
    small_disk: Disk, mounts_on_it: Mounts, tmp_path: Path
) -> None:
    """On a filesystem that holds none, and for a store that was copied."""
    store, source = small_disk.path / "store", tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("text")
    largefs("mkfs", store)
    largefs("import", source, store)
    for name in ("meta.db-wal", "owner.new"):
        (store / name).unlink()
    ballast = small_disk.fill()
    full = f"largefs: {store}: its disk is full; make room there and try again\n"
    another = store.with_name("another")
    refused("mkfs", another, code=1, says=f"largefs: {another}: its disk is full; make room there")
    assert not another.exists() or not os.listdir(another)
    refused("mount", store, source, code=32, says=full)
    refused("import", source, store, code=1, says=full)
    refused("export", store, tmp_path / "out", code=1, says=full)
    refused("check", store, "--repair", code=8, says="No space left on device; make room")
    done = largefs("doctor", store, code=1)
    assert "make room: 4.0 MiB for a trial file" in done.stdout and not done.stderr
    assert sorted(os.listdir(store)) == CLOSED
    largefs("check", store, "--data")
    ballast.unlink()
    assert (mounts_on_it.make(store=store).path / "file").read_text() == "text"


@pytest.mark.parametrize("small_disk", ["ext2", "tmpfs"], indirect=True)
def test_an_import_whose_metadata_fill_the_disk_is_completed_by_a_second_run(
    small_disk: Disk, tmp_path: Path
) -> None:
    store, source, links = small_disk.path / "store", tmp_path / "source", 12_000
    source.mkdir()
    for i in range(links):
        (source / f"{i}").symlink_to("t" * 1000)
    largefs("mkfs", store)
    ballast = small_disk.fill(leave=4 * MIB)
    full = f"largefs: {store}: its disk is full; make room there and try again\n"
    refused("import", source, store, code=1, says=full)
    largefs("check", store)
    ballast.unlink()
    assert f"{links} names" in largefs("import", source, store).stdout
    largefs("check", store)


@pytest.mark.parametrize("small_disk", ["tmpfs"], indirect=True)
def test_a_repair_without_room_changes_nothing(small_disk: Disk, tmp_path: Path) -> None:
    """It gets as far as its commit, for which the room does not suffice."""
    store, source = small_disk.path / "store", tmp_path / "source"
    source.mkdir()
    for i in range(2000):
        (source / f"{i}").symlink_to("t" * 100)
    largefs("mkfs", store)
    largefs("import", source, store)
    with contextlib.closing(apsw.Connection(str(store / "meta.db"))) as db:
        db.execute("DELETE FROM dentries")
    before = (store / "meta.db").read_bytes()
    ballast = small_disk.fill(leave=64 << 10)
    full = f"largefs: {store}: its disk is full; make room there and try again\n"
    refused("check", store, "--repair", code=8, says=full)
    assert sorted(os.listdir(store)) == CLOSED
    assert (store / "meta.db").read_bytes() == before
    ballast.unlink()
    assert "2000 mended, 0 left" in largefs("check", store, "--repair", code=1).stdout
    largefs("check", store)


@pytest.mark.parametrize("small_disk", ["tmpfs"], indirect=True)
def test_an_export_without_room_says_so_and_can_be_run_again(
    small_disk: Disk, tmp_path: Path
) -> None:
    store, source, out = tmp_path / "store", tmp_path / "source", small_disk.path / "out"
    source.mkdir()
    for name in "abc":
        (source / name).write_bytes(os.urandom(MIB))
    largefs("mkfs", store)
    largefs("import", source, store)
    ballast = small_disk.fill(leave=2 * MIB)
    refused("export", store, out, code=1, says=f"{out}: No space left on device after ")
    for name in os.listdir(out):  # nothing half
        assert (out / name).read_bytes() == (source / name).read_bytes()
    ballast.unlink()
    subprocess.run(["rm", "-r", out], check=True)
    largefs("export", store, out)
    subprocess.run(["diff", "-r", source, out], check=True)
    largefs("check", store, "--data")
