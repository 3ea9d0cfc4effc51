"""The operations of the filesystem, driven without a mount."""

import errno
import inspect
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import xxhash

from largefs.filesystem.daemon import Mount
from largefs.filesystem.files import Files
from largefs.filesystem.operations import CAPABILITY, Filesystem
from largefs.filesystem.options import Options
from largefs.hugetext.routes import Offer, Probe, Route
from largefs.store import EXTENT_SIZE, ROOT_INODE, Store
from largefs.store.errors import fail

CONTEXT: Any = SimpleNamespace(uid=0, gid=0, pid=1, umask=0o022)
S_IFREG = stat.S_IFREG
FILE = S_IFREG | 0o644


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    Store.create(tmp_path / "store")
    with Store.open(tmp_path / "store", "a test") as store:
        yield store


@pytest.fixture
def filesystem(store: Store, tmp_path: Path) -> Filesystem:
    return Mount(store, tmp_path / "mountpoint", Options())._operations


def error_of(raised: pytest.ExceptionInfo[pyfuse3.FUSEError]) -> int:
    return raised.value.errno


async def test_a_file_lives_as_long_as_the_kernel_holds_it(
    filesystem: Filesystem, store: Store
) -> None:
    info, entry = await filesystem.create(ROOT_INODE, b"f", FILE, os.O_RDWR, CONTEXT)
    inode = entry.st_ino
    assert await filesystem.write(info.fh, 3, b"data") == 4
    assert bytes(await filesystem.read(info.fh, 0, 100)) == b"\0\0\0data"
    assert (await filesystem.getattr(inode, CONTEXT)).st_size == 7, "while it is being written"
    assert (await filesystem.lookup(ROOT_INODE, b"f", CONTEXT)).st_ino == inode  # the second hold

    await filesystem.unlink(ROOT_INODE, b"f", CONTEXT)
    assert (await filesystem.lookup(ROOT_INODE, b"f", CONTEXT)).st_ino == 0, "no such name"
    assert (await filesystem.getattr(inode, CONTEXT)).st_nlink == 0
    await filesystem.forget([(inode, 1)])
    await filesystem.release(info.fh)
    assert (await filesystem.getattr(inode, CONTEXT)).st_size == 7, "held once more"
    await filesystem.forget([(inode, 1)])
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await filesystem.getattr(inode, CONTEXT)
    assert error_of(raised) == errno.ENOENT
    store.commit()
    assert not list((store.path / "extents").glob("*/*"))


async def test_fsync_of_a_directory_gives_the_room_of_what_was_removed_back(
    filesystem: Filesystem, store: Store
) -> None:
    """That of a file waits for no removal: it may be another's."""
    await filesystem.mknod(ROOT_INODE, b"removed", FILE, 0, CONTEXT)
    info, _ = await filesystem.create(ROOT_INODE, b"f", FILE, os.O_RDWR, CONTEXT)
    await filesystem.fsync(info.fh, False)
    removed = (await filesystem.lookup(ROOT_INODE, b"removed", CONTEXT)).st_ino
    backing_file = store.path / "extents" / store.backing.name(removed)
    await filesystem.unlink(ROOT_INODE, b"removed", CONTEXT)
    await filesystem.forget([(removed, 2)])
    await filesystem.fsync(info.fh, False)
    assert backing_file.exists()
    await filesystem.fsyncdir(pyfuse3.FileHandleT(ROOT_INODE), False)
    assert not backing_file.exists()
    await filesystem.release(info.fh)


async def test_ctime_is_when_it_was_changed_whatever_mtime_says(
    filesystem: Filesystem, store: Store
) -> None:
    """cp -p and tar set mtime, to the future maybe, on a file that they still have open."""
    info, entry = await filesystem.create(ROOT_INODE, b"f", FILE, os.O_RDWR, CONTEXT)
    last = entry.st_ctime_ns

    async def change(**fields: int) -> None:
        wanted = pyfuse3.EntryAttributes()
        for name, value in fields.items():
            setattr(wanted, f"st_{name}", value)
        names = ("mode", "uid", "gid", "size", "atime", "mtime", "ctime")
        updates = {f"update_{n}": n in fields or f"{n}_ns" in fields for n in names}
        update = SimpleNamespace(**updates)
        await filesystem.setattr(entry.st_ino, wanted, update, None, CONTEXT)

    async def moved() -> bool:
        nonlocal last
        before, last = last, (await filesystem.getattr(entry.st_ino, CONTEXT)).st_ctime_ns
        assert before <= last <= time.time_ns()
        return before < last

    for mtime_ns in (4_000_000_000 * 10**9, 10**9):
        await change(mtime_ns=mtime_ns)
        assert await moved()
        await change(mode=0o600)
        assert await moved()
        time.sleep(0.02)  # the clock of the backing filesystem ticks that seldom
        await filesystem.write(info.fh, 0, b"data")
        assert await moved()
        await change(mtime_ns=mtime_ns)
        assert await moved()
    await filesystem.release(info.fh)
    assert not await moved()

    info = await filesystem.open(entry.st_ino, os.O_RDWR, CONTEXT)
    store.backing.set_times(entry.st_ino, 0, 10**9)  # moves its ctime, as a copy of the store does
    assert not await moved()
    time.sleep(0.02)
    await filesystem.write(info.fh, 0, b"atad")
    assert await moved()
    await filesystem.release(info.fh)
    assert not await moved()


@pytest.mark.parametrize("passed_through", [False, True])
async def test_root_takes_set_id_bits_by_chown_not_by_writing(
    filesystem: Filesystem, store: Store, *, passed_through: bool
) -> None:
    """Both are a SETATTR that names nothing, and RELEASE comes a while after close(2)."""
    info, entry = await filesystem.create(ROOT_INODE, b"f", S_IFREG | 0o6755, os.O_RDWR, CONTEXT)
    inode = entry.st_ino
    names = ("mode", "uid", "gid", "size", "atime", "mtime", "ctime")
    nothing: Any = SimpleNamespace(**{f"update_{name}": False for name in names})

    async def mode_after(ctx: Any) -> int:
        reply = await filesystem.setattr(inode, pyfuse3.EntryAttributes(), nothing, None, ctx)
        assert reply.st_mode == store.get(inode).mode
        return stat.S_IMODE(reply.st_mode)

    if passed_through:  # what file_remove_privs() does to a file with a capability
        await filesystem.setxattr(inode, CAPABILITY, b"\1\0\0\2" + bytes(16), CONTEXT)
        await filesystem.removexattr(inode, CAPABILITY, CONTEXT)
        assert await mode_after(CONTEXT) == 0o6755
        await filesystem.setxattr(inode, CAPABILITY, b"\1\0\0\2" + bytes(16), CONTEXT)
        await filesystem.removexattr(inode, CAPABILITY, CONTEXT)
        assert await mode_after(SimpleNamespace(uid=0, gid=0, pid=2, umask=0o022)) == 0o755
    else:
        assert await mode_after(CONTEXT) == 0o755
    await filesystem.release(info.fh)


async def test_checksums_can_be_read_as_soon_as_the_file_is_closed(filesystem: Filesystem) -> None:
    info, entry = await filesystem.create(ROOT_INODE, b"f", FILE, os.O_RDWR, CONTEXT)
    await filesystem.write(info.fh, 0, b"data")
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await filesystem.getxattr(entry.st_ino, b"user.largefs.checksum", CONTEXT)
    assert error_of(raised) == errno.ENODATA, "its writer is not done"
    await filesystem.release(info.fh)
    expected = b"0:" + xxhash.xxh3_128_hexdigest(b"data").encode()
    assert await filesystem.getxattr(entry.st_ino, b"user.largefs.checksum", CONTEXT) == expected


@pytest.mark.parametrize("by", ["fsync", "rename"])
async def test_no_change_after_a_flush_that_failed(
    filesystem: Filesystem, store: Store, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    def failing(fd: int) -> None:
        raise fail(errno.EIO)

    await filesystem.mknod(ROOT_INODE, b"old", FILE, 0, CONTEXT)
    info, _ = await filesystem.create(ROOT_INODE, b"f", FILE, os.O_RDWR, CONTEXT)
    with monkeypatch.context() as disk, pytest.raises(pyfuse3.FUSEError) as raised:
        disk.setattr(os, "fsync", failing)
        if by == "fsync":
            await filesystem.fsync(info.fh, False)
        else:
            await filesystem.rename(ROOT_INODE, b"f", ROOT_INODE, b"old", 0, CONTEXT)
    assert error_of(raised) == errno.EIO
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await filesystem.fsync(info.fh, False)
    assert error_of(raised) == errno.EROFS


async def test_a_transaction_that_sqlite_took_back(
    filesystem: Filesystem, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit of SQLite's own makes it do what it does by a disk that fails: all of it is rolled back."""
    fh = pyfuse3.FileHandleT(ROOT_INODE)
    await filesystem.mkdir(ROOT_INODE, b"kept", 0o755, CONTEXT)
    await filesystem.fsyncdir(fh, False)
    store.db.pragma("max_page_count", store.db.pragma("page_count") + 2)
    with pytest.raises(pyfuse3.FUSEError) as raised:
        for i in range(1000):
            await filesystem.mkdir(ROOT_INODE, b"%0200d" % i, 0o755, CONTEXT)
    assert error_of(raised) == errno.EIO
    assert [r.message for r in caplog.records] == [
        f"{store.path}: what was changed since the last commit is lost: database or disk is full; "
        "see to its disk (dmesg), then mount it or run the command again"
    ]
    for change in (
        filesystem.mkdir(ROOT_INODE, b"d", 0o755, CONTEXT),
        filesystem.fsyncdir(fh, False),
    ):
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await change
        assert error_of(raised) == errno.EROFS
    assert (await filesystem.lookup(ROOT_INODE, b"kept", CONTEXT)).st_ino


@pytest.mark.parametrize("mode", [0o644, 0o755])
async def test_blksize_of_a_new_file(filesystem: Filesystem, store: Store, mode: int) -> None:
    """What is made executable may get text: the kernel asks only once whether folios may be large."""
    info, entry = await filesystem.create(ROOT_INODE, b"f", S_IFREG | mode, os.O_RDWR, CONTEXT)
    assert (entry.st_blksize == EXTENT_SIZE) == bool(mode & 0o111)
    await filesystem.write(info.fh, 0, b"#!/bin/sh\n")
    await filesystem.release(info.fh)
    assert (await filesystem.getattr(entry.st_ino, CONTEXT)).st_blksize < EXTENT_SIZE
    assert not store.get(entry.st_ino).huge


async def test_create_leaves_nothing_when_the_file_cannot_be_opened(
    filesystem: Filesystem, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_descriptors(*_: object, **__: object) -> None:
        raise fail(errno.EMFILE)

    with monkeypatch.context() as limits, pytest.raises(pyfuse3.FUSEError) as raised:
        limits.setattr(Files, "open", no_descriptors)
        await filesystem.create(ROOT_INODE, b"f", FILE, os.O_RDWR, CONTEXT)
    assert error_of(raised) == errno.EMFILE
    assert store.find(ROOT_INODE, b"f") is None
    await filesystem.create(ROOT_INODE, b"f", FILE, os.O_RDWR, CONTEXT)


async def test_tmpfile_leaves_nothing_when_the_file_cannot_be_opened(
    filesystem: Filesystem, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_descriptors(*_: object, **__: object) -> None:
        raise fail(errno.EMFILE)

    before = store.counts()
    monkeypatch.setattr(Files, "open", no_descriptors)
    with pytest.raises(pyfuse3.FUSEError):
        await filesystem.tmpfile(ROOT_INODE, FILE, os.O_RDWR, CONTEXT)
    assert store.counts() == before


ARGUMENTS = {
    "inode": ROOT_INODE, "parent": ROOT_INODE, "parent_inode": ROOT_INODE, "fh": 77,
    "new_parent_inode": ROOT_INODE, "parent_inode_old": ROOT_INODE, "parent_inode_new": ROOT_INODE,
    "name": b"a", "name_old": b"a", "name_new": b"b", "new_name": b"b", "target": b"t",
    "value": b"v", "buf": b"data", "mode": FILE, "rdev": 0, "flags": os.O_RDWR, "start_id": 0,
    "off": 0, "size": 10, "offset": 0, "length": 10, "whence": os.SEEK_DATA, "datasync": False,
    "offset_in": 0, "offset_out": 0, "fh_in": 77, "fh_out": 78, "inode_list": [(ROOT_INODE, 1)],
    "attr": pyfuse3.EntryAttributes(), "token": None, "ctx": CONTEXT,
    "fields": SimpleNamespace(
        update_mode=True, update_uid=True, update_gid=True, update_size=True,
        update_atime=True, update_mtime=True, update_ctime=True,
    ),
}  # fmt: skip


def handlers() -> list[str]:
    return [
        name
        for name, method in vars(Filesystem).items()
        if not name.startswith("_") and inspect.iscoroutinefunction(inspect.unwrap(method))
    ]


def arguments(method: Callable[..., Any]) -> dict[str, Any]:
    """Arguments by their names."""
    return {name: ARGUMENTS[name] for name in inspect.signature(method).parameters}


@pytest.mark.parametrize("name", handlers())
async def test_no_exception_but_fuseerror_leaves_a_handler(
    filesystem: Filesystem, store: Store, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks beneath it: here all of the store, and the handle was never given.

    pyfuse3 (handlers.pxi) awaits each in a `try: ... except FUSEError`, but forget bare.
    """

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("unforeseen")

    method = getattr(filesystem, name)
    with monkeypatch.context() as beneath:
        for attribute, value in vars(Store).items():
            if inspect.isfunction(value) and not attribute.startswith("__"):
                beneath.setattr(store, attribute, broken)
        try:
            await method(**arguments(method))
        except pyfuse3.FUSEError as error:
            assert error.errno > 0
            assert name != "forget"


@pytest.mark.parametrize(
    ("asked", "works", "passthrough", "large_folios"),
    [
        (None, {Route.PASSTHROUGH, Route.FOLIO}, True, True),
        (None, {Route.FOLIO}, False, True),
        (None, {Route.COLLAPSE}, False, True),
        (None, set(), True, True),
        (Route.FOLIO, {Route.PASSTHROUGH, Route.FOLIO}, False, True),
        (Route.NONE, {Route.PASSTHROUGH, Route.FOLIO}, False, False),
    ],
)
def test_what_a_route_asks_of_the_kernel(
    store: Store,
    tmp_path: Path,
    asked: Route | None,
    works: set[Route],
    passthrough: bool,
    large_folios: bool,
) -> None:
    offers = tuple(Offer(r, r in works or r is Route.NONE, "") for r in Route)
    mount = Mount(store, tmp_path / "mountpoint", Options(route=asked))
    wanted = mount._wanted(Probe(offers, offered=None, backing=True))
    assert (wanted.passthrough, wanted.large_folios) == (passthrough, large_folios)
    assert not mount._wanted(Probe(offers, offered=None, backing=False)).passthrough
