"""A store on a disk that fails, and in the hands of more than one process."""

import contextlib
import errno
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from largefs.filesystem.commits import Commits
from largefs.store import (
    ROOT_INODE,
    BusyError,
    ReadOnlyError,
    Store,
    StoreError,
    backing,
    check,
    owner,
)
from largefs.store.errors import fail
from largefs.transfer.importer import Importer

FILE = stat.S_IFREG | 0o644


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty store."""
    Store.create(tmp_path / "store")
    return tmp_path / "store"


def test_the_longest_path_that_sqlite_opens(tmp_path: Path) -> None:
    """Up to it a store works; beyond, the line says what is wrong, and a store that was moved is whole."""
    room = 512 - 8 - len(f"{tmp_path}/") - len("/meta.db.new")
    parents, leaf = divmod(room - 1, 100)
    longest = tmp_path.joinpath(*["d" * 99] * parents, "s" * (leaf + 1))
    Store.create(longest)
    Store.open(longest, "test").close()
    with pytest.raises(StoreError, match=r"too long for SQLite, by 1 bytes; choose a shorter one"):
        Store.create(longest.with_name(longest.name + "s"))
    moved = longest.rename(longest.with_name("m" * 110))
    with pytest.raises(StoreError, match="too long for SQLite"):
        Store.open(moved, "test")
    assert not check.check(moved.rename(tmp_path / "short")).problems


def test_a_cloned_file_that_cannot_be_read_is_left_out(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone is made without reading: it is the sum that finds what the disk has lost."""

    def clone(_: Importer, fd: int, to: int) -> bool:
        return os.write(to, b"shared") == 6

    def unreadable(*_: object) -> int:
        raise fail(errno.EIO)

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "f").write_bytes(b"shared")
    monkeypatch.setattr(Importer, "_clone", clone)
    monkeypatch.setattr(backing, "read_full", unreadable)
    with Store.open(path, "test") as store:
        tally = Importer(store).run(os.fsencode(tmp_path / "source"))
        assert [reason for _, reason in tally.failed] == ["cannot be read: Input/output error"]
        assert store.find(ROOT_INODE, b"f") is None


def test_the_record_of_the_holder_goes_before_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one who opens the store in between loses its own."""
    release = owner.Holder.release

    def while_another_opens(holder: owner.Holder) -> None:
        with pytest.raises(BusyError):
            Store.open(path, "another")
        release(holder)

    monkeypatch.setattr(owner.Holder, "release", while_another_opens)
    Store.open(path, "test").close()
    assert owner.read(path) is None
    check.check(path, repair=True)
    assert owner.read(path) is None


def test_nobody_removes_the_record_of_another(path: Path) -> None:
    holder = owner.Holder(path, "test")
    another = replace(owner.current("another host"), machine="another")
    owner.write(path, another)
    holder.release()
    assert owner.read(path) == another


def _with_a_dropped_file(store: Store) -> Path:
    """Leave a file to be removed by the next commit; returns its backing file."""
    inode = store.make(ROOT_INODE, b"removed", FILE, 0, 0).id
    store.commit()
    store.drop(store.unlink(ROOT_INODE, b"removed").id)
    return store.path / "extents" / store.backing.name(inode)


async def test_what_a_cancelled_commit_did_not_remove_goes_when_the_store_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is unmounted while a commit flushes."""
    with Store.open(path, "test") as store:
        removed = _with_a_dropped_file(store)
        store.make(ROOT_INODE, b"to be flushed", FILE, 0, 0)
        with trio.CancelScope() as scope, monkeypatch.context() as disk:
            disk.setattr(store.backing, "flush", lambda _: trio.from_thread.run_sync(scope.cancel))
            commits = Commits(store, 5)
            await commits.commit()
            await commits.remove_dropped()
        assert scope.cancelled_caught
        assert removed.exists()
    assert not removed.exists()
    assert not check.check(path).problems


async def test_no_fsync_waits_for_what_was_removed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_remove = threading.Event()
    with Store.open(path, "test") as store:
        removed, remove = _with_a_dropped_file(store), store.backing.remove
        commits = Commits(store, 5)

        def slow(inode: int) -> None:
            assert may_remove.wait(60)
            remove(inode)

        monkeypatch.setattr(store.backing, "remove", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(commits.run_removals)
            with trio.fail_after(30):
                await commits.commit()
                store.make(ROOT_INODE, b"directory", stat.S_IFDIR | 0o755, 0, 0)
                await commits.commit()
            assert removed.exists() and not store.uncommitted
            may_remove.set()
            with trio.fail_after(30):
                while removed.exists():
                    await trio.sleep(0.01)
                await commits.remove_dropped()
            assert not store.to_remove
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), fail(errno.EIO)])
def test_what_could_not_be_removed_is_tried_again(
    path: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise failure

    with Store.open(path, "test") as store:
        removed = _with_a_dropped_file(store)
        with monkeypatch.context() as disk, contextlib.suppress(KeyboardInterrupt):
            disk.setattr(store.backing, "remove", failing)
            store.commit()
        assert removed.exists()
    assert not removed.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("mounted", [True, False])
async def test_nothing_is_clean_after_a_flush_that_failed(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, mounted: bool
) -> None:
    """The kernel tells of a failed writeback once: the next fsync(2) succeeds."""

    def failing(fd: int) -> None:
        monkeypatch.undo()
        raise fail(number)

    store = Store.open(path, "test")
    inode = _settled_file(store)
    monkeypatch.setattr(os, "fsync", failing)
    if mounted:
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            await Commits(store, 5).commit()
    else:
        with pytest.raises(ReadOnlyError, match=os.strerror(number)):
            store.commit()
    with pytest.raises(ReadOnlyError):
        store.commit()
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        store.make(ROOT_INODE, b"another", FILE, 0, 0)
    store.close()
    with Store.open(path, "test") as store:
        assert store.get(inode).writing
        assert store.unsettled == [inode]


def test_a_flush_without_descriptors_is_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptors(*_: object) -> None:
        raise fail(errno.EMFILE)

    with Store.open(path, "test") as store:
        inode = _settled_file(store)
        with monkeypatch.context() as limits, pytest.raises(StoreError) as raised:
            limits.setattr(store.backing, "flush", no_descriptors)
            store.commit()
        assert raised.type is StoreError
        store.commit()
        assert not store.get(inode).writing


def _settled_file(store: Store) -> int:
    """A file that the next commit makes clean."""
    inode = store.make(ROOT_INODE, b"f", FILE, 0, 0).id
    store.commit()
    fd = store.backing.open(inode, os.O_WRONLY)
    os.write(fd, b"data")
    os.close(fd)
    store.record_stat(inode, store.backing.stat(inode))
    store.record_checksums(inode, store.sum(inode))
    return inode
