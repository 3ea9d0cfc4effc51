"""Open files, driven without a mount."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from largefs.filesystem.commits import Commits
from largefs.filesystem.files import SETTLE_AT_ONCE, Files, handle
from largefs.store import ROOT_INODE, Store
from largefs.store.check import check
from largefs.store.errors import fail


async def test_what_cannot_be_settled_stays_in_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else stat(2) would give the size before the writing until the next mount."""

    def full(*_: object, **__: object) -> None:
        raise fail(errno.ENOSPC)

    size = 2 * SETTLE_AT_ONCE
    Store.create(tmp_path / "store")
    with Store.open(tmp_path / "store", "a test") as store:
        files = Files(store, Commits(store, 5), None)
        inode = store.make(ROOT_INODE, b"f", stat.S_IFREG | 0o644, 0, 0).id
        await files.open(inode, writable=True, new=True)
        fh = handle(inode, writable=True)
        os.ftruncate(files.write_fd(fh), size)
        with monkeypatch.context() as disk, pytest.raises(OSError, match="space"):
            disk.setattr(store, "record_stat", full)
            files.release(fh)
        assert inode in files.writing
        assert files.stat_in_writing(inode).st_size == size
        files.finish()
        assert inode not in files.writing
        assert store.get(inode).size == size


@pytest.mark.parametrize("written_again", [True, False])
async def test_reading_for_the_checksums_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_again: bool
) -> None:
    """Of a file that is truncated meanwhile, lseek(2) may say ENXIO: its next closing sums it."""
    Store.create(tmp_path / "store")
    with Store.open(tmp_path / "store", "a test") as store:
        files = Files(store, Commits(store, 5), None)
        inode = store.make(ROOT_INODE, b"f", stat.S_IFREG | 0o644, 0, 0).id

        def cut_off(inode: int) -> None:
            if written_again:
                files._tickets.pop(inode)
            raise fail(errno.ENXIO)

        monkeypatch.setattr(files, "_look_at", cut_off)
        files.sum_later(inode)
        if written_again:
            await files._sum(inode)
        else:
            with pytest.raises(OSError, match="No such device or address"):
                await files._sum(inode)
        files._tickets.clear()


async def test_written_again_while_a_commit_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written behind the flush is not durable, so the file must not count as clean."""
    Store.create(tmp_path / "store")
    with Store.open(tmp_path / "store", "a test") as store:
        commits = Commits(store, 5)
        files = Files(store, commits, None)
        inode = store.make(ROOT_INODE, b"f", stat.S_IFREG | 0o644, 0, 0).id

        async def write(data: bytes) -> None:
            await files.open(inode, writable=True)
            fh = handle(inode, writable=True)
            os.pwrite(files.write_fd(fh), data, 0)
            files.release(fh)

        flush, flushed = store.backing.flush, []

        def flush_slowly(inodes: list[int]) -> None:
            flush(inodes)
            flushed.extend(inodes)
            if len(flushed) == 1:
                trio.from_thread.run(write, b"second")

        await write(b"first")
        with monkeypatch.context() as disk:
            disk.setattr(store.backing, "flush", flush_slowly)
            await commits.commit()
            assert flushed == [inode]
            assert store.get(inode).writing, "the second content was never flushed"
            await commits.commit()
            assert flushed == [inode, inode]
            assert not store.get(inode).writing


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_a_file_that_no_lease_may_be_taken_on_counts_as_written(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    os.chown(path, 65534, 65534)
    script = (
        "import os, sys; from largefs.store.backing import has_writer;"
        "print(has_writer(os.open(sys.argv[1], os.O_RDONLY)))"
    )
    for bounds, answer in (("+all", "False"), ("-lease", "True")):
        argv = ["setpriv", f"--bounding-set={bounds}", sys.executable, "-c", script, path]
        said = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert said.stdout.strip() == answer, said.stderr


async def test_times_set_while_the_checksums_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What utimensat(2) set after the closing stays, and `check` does not blame the store."""
    path = tmp_path / "store"
    Store.create(path)
    with Store.open(path, "a test") as store:
        files = Files(store, Commits(store, 5), None)
        inode = store.make(ROOT_INODE, b"f", stat.S_IFREG | 0o644, 0, 0).id
        await files.open(inode, writable=True, new=True)
        fh = handle(inode, writable=True)
        os.ftruncate(files.write_fd(fh), 2 * SETTLE_AT_ONCE)
        files.release(fh)

        def set_times() -> None:  # as setattr does
            store.set_attributes(inode, mtime_ns=1000)
            store.backing.set_times(inode, 0, 1000)

        look_at = files._look_at

        def look_slowly(inode: int) -> object:
            found = look_at(inode)
            trio.from_thread.run_sync(set_times)
            return found

        monkeypatch.setattr(files, "_look_at", look_slowly)
        await files._sum(inode)
        assert store.get(inode).mtime_ns == 1000
    assert not check(path, data=True).problems


async def test_one_watcher_for_an_inode(tmp_path: Path, autojump_clock: MockClock) -> None:
    """However often it is opened and closed while a mapping writes it."""
    Store.create(tmp_path / "store")
    with Store.open(tmp_path / "store", "a test") as store:
        files = Files(store, Commits(store, 5), None)
        inode = store.make(ROOT_INODE, b"f", stat.S_IFREG | 0o644, 0, 0).id
        mapping = store.backing.open(inode, os.O_RDWR)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(files.run_watch)
            for _ in range(10):
                files.settle_later(inode)
                await trio.sleep(0.001)
            watch = trio.lowlevel.current_statistics().tasks_living
            files.settle_later(inode)
            await trio.sleep(100)
            assert inode in files.writing
            assert trio.lowlevel.current_statistics().tasks_living == watch
            os.close(mapping)
            await trio.sleep(3)
            assert inode not in files.writing
            assert trio.lowlevel.current_statistics().tasks_living == watch - 1
            files.settle_later(inode)
            await trio.sleep(3)
            assert inode not in files.writing, "and it is watched again, when need be"
            nursery.cancel_scope.cancel()
