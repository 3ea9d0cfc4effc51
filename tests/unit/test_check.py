"""`largefs check` against every invariant of the schema: break it, see it named, mended, and gone."""

import errno
import hashlib
import importlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest
from click.testing import CliRunner

from largefs.cli.check import command
from largefs.store import (
    EXTENT_SIZE,
    ROOT_INODE,
    BusyError,
    NotAStoreError,
    RestoredError,
    Store,
    StoreError,
    backing,
    owner,
)
from largefs.store.check import Report, check
from largefs.transfer.importer import Importer
from tests.mounts import largefs

DIRECTORY, FILE, SMALL, LINK, DEVICE, INNER, DEEP, HOLE = range(2, 10)
"""The inode numbers in the store that each test breaks."""

CONTENT = [b"A" * EXTENT_SIZE, b"", b"C" * 1000]
"""Of FILE, extent by extent: the second one is a hole."""


@pytest.fixture
def path() -> Iterator[Path]:
    """A store with one inode of each kind; in memory, for what is tested here is not the disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="largefs-test-", dir=memory) as directory:
        _make(Path(directory) / "store")
        yield Path(directory) / "store"


def _make(store: Path) -> None:
    Store.create(store)
    with Store.open(store, "test") as s:
        s.make(ROOT_INODE, b"directory", stat.S_IFDIR | 0o755, 0, 0)
        s.make(DIRECTORY, b"file", stat.S_IFREG | 0o644, 0, 0)
        s.make(DIRECTORY, b"small", stat.S_IFREG | 0o644, 0, 0)
        s.make(DIRECTORY, b"link", stat.S_IFLNK | 0o777, 0, 0, target=b"file")
        s.make(DIRECTORY, b"device", stat.S_IFCHR | 0o600, 0, 0, rdev=0x103)
        s.make(DIRECTORY, b"inner", stat.S_IFDIR | 0o755, 0, 0)
        s.make(INNER, b"deep", stat.S_IFDIR | 0o755, 0, 0)
        s.make(INNER, b"hole", stat.S_IFREG | 0o644, 0, 0)
        assert s.lookup(INNER, b"hole").id == HOLE
        s.link(SMALL, ROOT_INODE, b"second name")
        s.set_xattr(FILE, b"user.note", b"value")
        for i, data in enumerate(CONTENT):
            backing.write_full(fd := s.backing.open(FILE, os.O_RDWR), data, i * EXTENT_SIZE)
            os.close(fd)
        backing.write_full(fd := s.backing.open(SMALL, os.O_RDWR), b"small", 0)
        os.close(fd)
        os.ftruncate(fd := s.backing.open(HOLE, os.O_RDWR), 3 * EXTENT_SIZE)
        os.close(fd)
        for inode in (FILE, SMALL, HOLE):
            s.record_stat(inode, s.backing.stat(inode))
            s.record_checksums(inode, s.sum(inode))
        s.set_alignment(FILE, 10, b"record")


def sql(path: Path, *statements: str) -> None:
    db = apsw.Connection(str(path / "meta.db"))
    for statement in statements:
        db.execute(statement)
    db.close()


def backing_file(path: Path, inode: int) -> Path:
    return path / "extents" / backing.BackingFiles.name(inode)


def state(path: Path) -> dict[str, object]:
    """Everything about a store's files that a check must not change.

    Left out: a log that is empty, and the spare record of the holder, which a repair uses as a mount does.
    """
    return {
        str(f.relative_to(path)): (
            f.lstat().st_mtime_ns,
            f.lstat().st_ino,
            hashlib.sha256(f.read_bytes()).digest() if f.is_file() else None,
        )
        for f in path.rglob("*")
        if f.name != owner.SPARE and (f.name != "meta.db-wal" or f.stat().st_size)
    }


def kinds(report: Report) -> set[str]:
    return {p.kind for p in report.problems}


def lines(report: Report) -> str:
    return "\n".join(f"{p.kind}: {p.path!r}: {p.text} {p.mended}" for p in report.problems)


def test_a_store_as_it_was_made_is_clean(path: Path) -> None:
    report = check(path, data=True)
    assert not report.problems, lines(report)
    assert report.notes == []
    assert report.inodes == 9
    assert report.checked == EXTENT_SIZE + 1000 + 5


def test_an_imported_tree_is_clean(tmp_path: Path) -> None:
    store = tmp_path / "store"
    Store.create(store)
    with Store.open(store, "test") as s:
        assert not Importer(s).run(b"/usr/lib/gcc").failed
    before = state(store)
    report = check(store, data=True)
    assert not report.problems, lines(report)
    assert report.checked > 10 * EXTENT_SIZE
    assert state(store) == before


# What is broken, the statements that break it, the kinds of problem that must be named.
BROKEN_METADATA: dict[str, tuple[list[str], set[str]]] = {
    "root missing": (["DELETE FROM inodes WHERE id = 1"], {"root"}),
    "root no directory": (["UPDATE inodes SET mode = 33188 WHERE id = 1"], {"root"}),
    "root has a name": (
        [f"INSERT INTO dentries (parent, name, inode) VALUES ({DEEP}, x'61', 1)"],
        {"root"},
    ),
    "superblock missing": (["DELETE FROM superblock"], {"superblock"}),
    "inode numbers": (["UPDATE sqlite_sequence SET seq = 3"], {"restored"}),
    "inode numbers missing": (["DELETE FROM sqlite_sequence"], {"restored"}),
    "index missing": (["DROP INDEX dentries_by_inode"], {"schema"}),
    "parent missing": ([f"UPDATE dentries SET parent = 99 WHERE inode = {FILE}"], {"parent"}),
    "parent no directory": (
        [f"UPDATE dentries SET parent = {SMALL} WHERE inode = {FILE}"],
        {"parent"},
    ),
    "name of a missing inode": (
        ["INSERT INTO dentries (parent, name, inode) VALUES (1, x'61', 99)"],
        {"dentry"},
    ),
    "inode of a file missing": ([f"DELETE FROM inodes WHERE id = {FILE}"], {"dentry"}),
    "directory with two names": (
        [f"INSERT INTO dentries (parent, name, inode) VALUES (1, x'61', {DEEP})"],
        {"dentry"},
    ),
    "file without a name": ([f"DELETE FROM dentries WHERE inode = {FILE}"], {"unnamed"}),
    "directory without a name": (
        [f"DELETE FROM dentries WHERE inode = {INNER}"],
        {"unnamed", "nlink"},
    ),
    "link count": ([f"UPDATE inodes SET nlink = 7 WHERE id = {SMALL}"], {"nlink"}),
    "link count of 0": ([f"UPDATE inodes SET nlink = 0 WHERE id = {SMALL}"], {"nlink"}),
    "link count of a directory": (
        [f"UPDATE inodes SET nlink = 2 WHERE id = {DIRECTORY}"],
        {"nlink"},
    ),
    "cycle": ([f"UPDATE dentries SET parent = {DEEP} WHERE inode = {INNER}"], {"cycle", "nlink"}),
    "directory in itself": (
        [f"UPDATE dentries SET parent = {INNER} WHERE inode = {INNER}"],
        {"cycle", "nlink"},
    ),
    "mode of a file": ([f"UPDATE inodes SET mode = 420 WHERE id = {SMALL}"], {"mode"}),
    "mode of a directory": (
        [f"UPDATE inodes SET mode = 511 WHERE id = {INNER}"],
        {"mode"},
    ),
    "mode of a symlink": ([f"UPDATE inodes SET mode = 511 WHERE id = {LINK}"], {"mode"}),
    "mode negative": ([f"UPDATE inodes SET mode = -1 WHERE id = {DEVICE}"], {"mode"}),
    "owner": ([f"UPDATE inodes SET uid = -1 WHERE id = {FILE}"], {"owner"}),
    "size of a directory": ([f"UPDATE inodes SET size = 1 WHERE id = {DEEP}"], {"size"}),
    "size of a symlink": ([f"UPDATE inodes SET size = 1 WHERE id = {LINK}"], {"size"}),
    "device number": ([f"UPDATE inodes SET rdev = 5 WHERE id = {FILE}"], {"rdev"}),
    "huge directory": ([f"UPDATE inodes SET huge = 1 WHERE id = {DEEP}"], {"writing"}),
    "writing a symlink": ([f"UPDATE inodes SET writing = 1 WHERE id = {LINK}"], {"writing"}),
    "target of no inode": (["INSERT INTO symlinks VALUES (99, x'61')"], {"symlinks"}),
    "target of a file": ([f"INSERT INTO symlinks VALUES ({FILE}, x'61')"], {"symlinks"}),
    "xattr of no inode": (["INSERT INTO xattrs VALUES (99, x'61', x'61')"], {"xattrs"}),
    "checksum of no inode": ([f"INSERT INTO extents VALUES (99, 0, x'{0:032x}')"], {"extents"}),
    "checksum of a directory": (
        [f"INSERT INTO extents VALUES ({DEEP}, 0, x'{0:032x}')"],
        {"extents"},
    ),
    "checksum beyond the size": (
        [f"INSERT INTO extents VALUES ({FILE}, 3, x'{0:032x}')"],
        {"extents"},
    ),
    "checksum before the start": (
        [f"INSERT INTO extents VALUES ({FILE}, -1, x'{0:032x}')"],
        {"extents"},
    ),
    "checksum missing": ([f"DELETE FROM extents WHERE inode = {FILE} AND number = 2"], {"extents"}),
    "alignment of no inode": (["INSERT INTO alignments VALUES (99, 1, x'61')"], {"alignments"}),
    "alignment of a written file": (
        [f"UPDATE inodes SET writing = 1 WHERE id = {FILE}"],
        {"alignments"},
    ),
    "name empty": ([f"UPDATE dentries SET name = x'' WHERE inode = {FILE}"], {"name"}),
    "name with a slash": ([f"UPDATE dentries SET name = x'612f62' WHERE inode = {FILE}"], {"name"}),
    "name with a NUL": ([f"UPDATE dentries SET name = x'6100' WHERE inode = {FILE}"], {"name"}),
    "name is dot-dot": ([f"UPDATE dentries SET name = x'2e2e' WHERE inode = {FILE}"], {"name"}),
    "name too long": (
        [f"UPDATE dentries SET name = zeroblob(256) WHERE inode = {FILE}"],
        {"name"},
    ),
    "flag out of range": (
        ["PRAGMA ignore_check_constraints = 1", f"UPDATE inodes SET huge = 5 WHERE id = {FILE}"],
        {"database"},
    ),
}


@pytest.mark.parametrize("case", BROKEN_METADATA)
def test_broken_metadata_is_named_and_mended(path: Path, case: str) -> None:
    statements, expected = BROKEN_METADATA[case]
    sql(path, *statements)
    before = state(path)
    found = check(path, data=True)
    assert kinds(found) == expected, lines(found)
    assert state(path) == before

    mended = check(path, data=True, repair=True)
    assert mended.left == 0, lines(mended)
    again = check(path, data=True)
    assert not again.problems, lines(again)

    with Store.open(path, "test") as s:  # it works, and no data was lost
        assert s.get(ROOT_INODE).nlink >= 3
        held = {backing_file(path, FILE).read_bytes(), backing_file(path, SMALL).read_bytes()}
    assert held == {b"".join([CONTENT[0], bytes(EXTENT_SIZE), CONTENT[2]]), b"small"}
    assert not check(path, data=True).problems


def test_what_has_lost_its_name_comes_to_lost_and_found(path: Path) -> None:
    sql(path, f"DELETE FROM dentries WHERE inode IN ({FILE}, {INNER})")
    report = check(path, repair=True)
    assert report.left == 0
    with Store.open(path, "test") as s:
        found = s.lookup(ROOT_INODE, b"lost+found")
        assert {d.name: d.inode.id for d in s.entries(found.id)} == {
            b"#%d" % FILE: FILE,
            b"#%d" % INNER: INNER,
        }
        assert found.nlink == 3
        assert s.lookup(INNER, b"hole").id == HOLE
        s.make(ROOT_INODE, b"a new one", stat.S_IFREG, 0, 0)
    sql(path, f"DELETE FROM dentries WHERE inode = {DEEP}")
    check(path, repair=True)
    with Store.open(path, "test") as s:
        assert s.lookup(found.id, b"#%d" % DEEP).id == DEEP


def test_a_name_that_is_taken_in_lost_and_found(path: Path) -> None:
    with Store.open(path, "test") as s:
        s.make(ROOT_INODE, b"lost+found", stat.S_IFREG | 0o644, 0, 0)
    sql(path, f"DELETE FROM dentries WHERE inode = {FILE}")
    check(path, repair=True)
    with Store.open(path, "test") as s:
        assert s.lookup(s.lookup(ROOT_INODE, b"lost+found-1").id, b"#%d" % FILE).id == FILE
    assert not check(path).problems


def _remove_data(f: Path) -> None:
    f.unlink()


def _shorten(f: Path) -> None:
    os.truncate(f, f.stat().st_size - 1)


def _punch(f: Path) -> None:
    st = f.stat()
    fd = os.open(f, os.O_RDWR)
    backing.fallocate(fd, 3, 0, EXTENT_SIZE)  # PUNCH_HOLE, KEEP_SIZE
    os.close(fd)
    os.utime(f, ns=(st.st_atime_ns, st.st_mtime_ns))


def _replace_by_directory(f: Path) -> None:
    f.unlink()
    f.mkdir()


@pytest.mark.parametrize(
    ("damage", "kind", "offset"),
    [
        (_remove_data, "backing-missing", None),
        (_replace_by_directory, "backing-missing", None),
        (_shorten, "backing-size", 2 * EXTENT_SIZE + 999),
        (_punch, "extents", 0),
    ],
)
def test_lost_data_is_named_and_stays_reported(
    path: Path, damage: Callable[[Path], None], kind: str, offset: int | None
) -> None:
    damage(backing_file(path, FILE))
    before = state(path)
    found = check(path, data=True)
    assert kinds(found) == {kind}, lines(found)
    assert (found.problems[0].path, found.problems[0].offset) == (b"/directory/file", offset)
    assert check(path, data=True, repair=True).left == 1
    after = state(path)
    for name in ("meta.db", "meta.db-wal"):
        before.pop(name, None), after.pop(name, None)
    assert after == before
    _remove_the_file(path)
    assert not check(path, data=True).problems


def _remove_the_file(path: Path) -> None:
    """What a user does who gives it up."""
    if backing_file(path, FILE).is_dir():
        backing_file(path, FILE).rmdir()
    with Store.open(path, "test") as s:
        s.unlink(DIRECTORY, b"file")
        s.drop(FILE)


def _flip_a_bit(f: Path, offset: int) -> None:
    st = f.stat()
    with f.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(f, ns=(st.st_atime_ns, st.st_mtime_ns))


def test_damaged_data_is_listed_by_path_and_offset(path: Path) -> None:
    _flip_a_bit(backing_file(path, FILE), EXTENT_SIZE - 1)
    _flip_a_bit(backing_file(path, FILE), 2 * EXTENT_SIZE + 999)
    assert not check(path).problems  # nothing tells without reading
    for repair in (False, True, False):
        report = check(path, data=True, repair=repair)
        assert [(p.kind, p.path, p.offset, p.mended) for p in report.problems] == [
            ("data", b"/directory/file", 0, False),
            ("data", b"/directory/file", 2 * EXTENT_SIZE, False),
        ]


def test_a_file_that_is_written_anew_is_no_longer_damaged(path: Path) -> None:
    _flip_a_bit(backing_file(path, FILE), 0)
    assert check(path, data=True).left == 1
    with Store.open(path, "test") as s:  # what opening it for writing and closing it does
        s.begin_writing(FILE)
        s.commit()
        s.record_stat(FILE, s.backing.stat(FILE))
        s.record_checksums(FILE, s.sum(FILE))
    assert not check(path, data=True).problems


def test_an_unreadable_extent_is_listed_and_the_check_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = backing.read_full

    def failing(fd: int, view: memoryview, offset: int) -> int:
        if offset == 0 and len(view) == EXTENT_SIZE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, view, offset)

    monkeypatch.setattr(backing, "read_full", failing)
    _flip_a_bit(backing_file(path, FILE), 2 * EXTENT_SIZE)
    report = check(path, data=True)
    assert [(p.kind, p.offset) for p in report.problems] == [
        ("unreadable", 0),
        ("data", 2 * EXTENT_SIZE),
    ]
    assert report.checked == EXTENT_SIZE + 1000 + 5


def test_data_that_came_behind_the_stores_back_is_taken_in_if_the_rest_is_intact(
    path: Path,
) -> None:
    with backing_file(path, FILE).open("ab") as f:
        f.write(b"more")
    found = check(path, data=True)
    assert kinds(found) == {"backing-size"}, lines(found)
    assert check(path, repair=True).left == 0
    assert not check(path, data=True).problems
    with Store.open(path, "test") as s:
        assert s.get(FILE).size == 2 * EXTENT_SIZE + 1004
    with backing_file(path, SMALL).open("r+b") as f:
        f.write(b"something else")
    assert check(path, repair=True).left == 1


def test_a_touched_backing_file_gets_its_time_back_if_its_data_is_intact(path: Path) -> None:
    os.utime(backing_file(path, FILE), ns=(1, 1))
    found = check(path, data=True)
    assert kinds(found) == {"backing-mtime"}, lines(found)
    assert check(path, repair=True).left == 0
    assert not check(path).problems
    backing_file(path, SMALL).write_bytes(b"smell")
    assert check(path, repair=True).left == 1
    assert kinds(check(path)) == {"backing-mtime"}


def test_a_time_that_the_backing_filesystem_cannot_keep_is_no_problem(tmp_path: Path) -> None:
    """ext4 knows no year before 1901, and in small inodes only whole seconds."""
    _make(path := tmp_path / "store")
    for mtime_ns in (-3_786_825_600 * 10**9, 2**63 - 1, 10**9 + 1):  # from the year 1850 on
        with Store.open(path, "test") as s:
            s.set_attributes(FILE, mtime_ns=mtime_ns)
            s.backing.set_times(FILE, 0, mtime_ns)
        for repair in (False, True):
            report = check(path, repair=repair)
            assert not report.problems, lines(report)


def test_a_missing_file_that_held_only_holes_is_made_again(path: Path) -> None:
    backing_file(path, HOLE).unlink()
    assert kinds(check(path)) == {"backing-missing"}
    assert check(path, repair=True).left == 0
    assert not check(path, data=True).problems
    assert backing_file(path, HOLE).stat().st_size == 3 * EXTENT_SIZE


def test_a_backing_file_without_an_inode_comes_to_lost_and_found(path: Path) -> None:
    backing_file(path, 0x55).write_bytes(b"orphan")
    backing_file(path, 0x66).touch()
    found = check(path)
    assert kinds(found) == {"backing-orphan", "numbers"}, lines(found)
    assert check(path, repair=True).left == 0
    assert not check(path, data=True).problems
    assert backing_file(path, 0x55).read_bytes() == b"orphan"
    assert not backing_file(path, 0x66).exists()
    with Store.open(path, "test") as s:
        row = s.lookup(s.lookup(ROOT_INODE, b"lost+found").id, b"#%d" % 0x55)
        assert (row.size, stat.S_IMODE(row.mode)) == (6, 0o600)
        assert s.make(ROOT_INODE, b"new", stat.S_IFREG, 0, 0).id > 0x66


@pytest.mark.parametrize("mounted", [True, False])
def test_a_restored_database_makes_no_data_a_leftover(path: Path, mounted: bool) -> None:
    """A copy that was made while the store was mounted says, as after a crash, that it is not clean."""
    backup = path.with_name("backup")
    later = [b"one", b"two", b"three"]

    def write(s: Store, name: bytes, data: bytes) -> int:
        inode = s.make(ROOT_INODE, name, stat.S_IFREG | 0o644, 0, 0).id
        backing_file(path, inode).write_bytes(data)
        s.record_stat(inode, s.backing.stat(inode))
        s.record_checksums(inode, s.sum(inode))
        s.commit()
        return inode

    if not mounted:
        shutil.copy(path / "meta.db", backup)
    with Store.open(path, "test") as s:
        unnamed = write(s, b"temporary", b"gets its name later")  # as O_TMPFILE and linkat()
        s.unlink(ROOT_INODE, b"temporary")
        s.commit()
        if mounted:
            s.db.pragma("wal_checkpoint")
            shutil.copy(path / "meta.db", backup)
        s.link(unnamed, ROOT_INODE, b"named")
        files = {write(s, data, data): data for data in later} | {unnamed: b"gets its name later"}
    backup.replace(path / "meta.db")

    with pytest.raises(RestoredError, match="check --repair"):
        Store.open(path, "test")
    before = state(path)
    found = check(path)
    assert kinds(found) >= {"restored"}, lines(found)
    assert state(path) == before
    assert check(path, repair=True).left == 0
    assert not check(path, data=True).problems
    with Store.open(path, "test") as s:
        lost = s.lookup(ROOT_INODE, b"lost+found").id
        assert {d.inode.id for d in s.entries(lost)} == files.keys()
        assert s.make(ROOT_INODE, b"new", stat.S_IFREG, 0, 0).id > max(files)
    assert not check(path, data=True).problems
    for inode, data in files.items():
        assert backing_file(path, inode).read_bytes() == data


def test_a_missing_directory_of_backing_files_is_made_again(path: Path) -> None:
    (path / "extents" / "ab").rmdir()
    assert kinds(check(path)) == {"extents-directory"}
    assert check(path, repair=True).left == 0
    assert not check(path).problems


def test_a_symlink_without_a_target_cannot_be_mended(path: Path) -> None:
    sql(path, f"DELETE FROM symlinks WHERE inode = {LINK}")
    assert kinds(check(path)) == {"symlinks"}
    assert check(path, repair=True).left == 1


def test_a_store_copied_by_a_tool_that_fills_holes_is_clean(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", "--sparse=never", path, copy], check=True)
    assert backing_file(copy, HOLE).stat().st_blocks >= 3 * EXTENT_SIZE // 512
    report = check(copy, data=True)
    assert not report.problems, lines(report)


# ------------------------------------------------------------------------ stores that a crash left


def _crash(path: Path, work: Callable[[Store], None]) -> None:
    """Do some work in a process that then ends without a word."""
    pid = os.fork()
    if pid == 0:
        try:
            store = Store.open(path, "a test that crashes")
            work(store)
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def _leave_much_open(s: Store) -> None:
    s.make(ROOT_INODE, b"open", stat.S_IFREG | 0o644, 0, 0)
    s.unlink(DIRECTORY, b"file")  # and not dropped: somebody has it open
    s.commit()
    s.set_attributes(HOLE, mtime_ns=5)
    s.backing.set_times(HOLE, 5, 5)  # the time is on disk, its transaction is not
    s.make(ROOT_INODE, b"never committed", stat.S_IFREG | 0o644, 0, 0)


def test_a_store_that_a_crash_left_is_not_damaged_and_not_changed(path: Path) -> None:
    _crash(path, _leave_much_open)
    before = state(path)
    assert "meta.db-wal" in before
    report = check(path, data=True)
    assert not report.problems, lines(report)
    assert "it was not closed; the next mount puts it in order by itself" in report.notes
    assert state(path) == before
    with Store.open(path, "test") as s:
        assert s.find(ROOT_INODE, b"open")
        assert s.find(DIRECTORY, b"file") is None
    assert check(path, data=True).notes == []


def test_repair_of_a_store_that_a_crash_left_puts_it_in_order(path: Path) -> None:
    _crash(path, _leave_much_open)
    report = check(path, repair=True)
    assert not report.problems, lines(report)
    report = check(path, data=True)
    assert not report.problems
    assert report.notes == []
    assert not (path / "owner").exists()


def test_damage_is_found_in_a_store_that_a_crash_left(path: Path) -> None:
    _crash(path, _leave_much_open)
    backing_file(path, SMALL).unlink()
    sql(path, f"UPDATE inodes SET nlink = 0 WHERE id = {SMALL}")
    assert kinds(check(path)) == {"backing-missing", "nlink"}
    with Store.open(path, "test") as s:  # recovery must not take the wrong count for a removal
        assert s.get(SMALL).id == SMALL


def test_recovery_keeps_the_data_of_an_inode_that_was_lost(path: Path) -> None:
    _crash(path, _leave_much_open)
    sql(path, f"DELETE FROM inodes WHERE id = {SMALL}")
    Store.open(path, "test").close()
    assert backing_file(path, SMALL).read_bytes() == b"small"
    assert check(path, repair=True).left == 0
    with Store.open(path, "test") as s:
        assert s.lookup(DIRECTORY, b"small").size == 5


def test_recovery_does_not_record_what_somebody_still_writes(path: Path) -> None:
    """With passthrough a program goes on writing its file when the daemon is gone."""
    _crash(path, _leave_much_open)
    with Store.open(path, "test") as s:
        inode = s.lookup(ROOT_INODE, b"open").id
    sql(path, f"UPDATE inodes SET writing = 1 WHERE id = {inode}")
    with backing_file(path, inode).open("r+b") as writer:
        with Store.open(path, "test") as s:
            assert s.unsettled == [inode]
            assert s.has_writer(inode)
        writer.write(b"written after the recovery")
    report = check(path, data=True)
    assert not report.problems, lines(report)
    assert report.notes != []
    with Store.open(path, "test") as s:
        assert not s.has_writer(inode)
    assert check(path, data=True).notes == []


# ------------------------------------------------------------------------------- the database itself


def test_a_corrupt_database_is_reported_and_left_alone(path: Path) -> None:
    with (path / "meta.db").open("r+b") as f:
        for page in range(1, 12):
            f.seek(4096 * page)
            f.write(os.urandom(4096))
    before = state(path)
    for repair in (False, True):
        report = check(path, repair=repair)
        assert kinds(report) == {"database"}, lines(report)
        assert report.left
    assert state(path) == before


def test_a_wrong_index_is_made_again(path: Path) -> None:
    sql(
        path,
        "PRAGMA writable_schema = 1",
        "UPDATE sqlite_schema SET sql = replace(sql, '(inode)', '(parent)')"
        " WHERE name = 'dentries_by_inode'",
        "PRAGMA writable_schema = 0",
    )
    sql(
        path,
        "REINDEX",
        "PRAGMA writable_schema = 1",
        "UPDATE sqlite_schema SET sql = replace(sql, '(parent)', '(inode)')"
        " WHERE name = 'dentries_by_inode'",
    )
    assert kinds(check(path)) == {"database"}
    assert check(path, repair=True).left == 0
    assert not check(path).problems


def test_a_missing_table_is_reported_and_nothing_else_is_touched(path: Path) -> None:
    sql(path, "DROP TABLE xattrs")
    assert kinds(check(path)) == {"schema"}
    assert check(path, repair=True).left == 1


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError):
        check(tmp_path)
    (tmp_path / "meta.db").write_bytes(b"x" * 200)
    with pytest.raises(NotAStoreError):
        check(tmp_path)


def test_a_store_without_its_extents(path: Path) -> None:
    (path / "extents").rename(path / "gone")
    with pytest.raises(StoreError, match="extents/ is missing"):
        check(path)


# ------------------------------------------------------------------------------------ the command


def _run(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(command, [str(a) for a in args])
    return done.exit_code, done.stdout, done.stderr


def test_exit_codes_are_those_of_fsck(path: Path, tmp_path: Path) -> None:
    assert _run(path, "--data")[0] == 0
    sql(path, f"UPDATE inodes SET nlink = 7 WHERE id = {SMALL}")
    assert _run(path)[:2] == (
        4,
        "/directory/small: nlink is 7, but should be 2\n"
        f"{path}: 1 problems in 9 inodes: 0 mended, 1 left\n",
    )
    assert _run(path, "--repair")[0] == 1
    assert _run(path)[0] == 0
    backing_file(path, FILE).unlink()
    sql(path, f"UPDATE inodes SET nlink = 7 WHERE id = {SMALL}")
    assert _run(path, "--repair")[0] == 1 | 4
    assert _run(tmp_path / "nothing")[0] == 8
    largefs("check", path, "--unknown", code=16)
    largefs("check", code=16)


def test_a_store_in_use_is_not_checked(path: Path) -> None:
    with Store.open(path, "mounted at /mnt"):
        for options in ([], ["--repair"]):
            code, _, said = _run(path, *options)
            assert code == 8
            assert said == (
                f"largefs: {path}: in use: mounted at /mnt (pid {os.getpid()}); end that first\n"
            )
        assert (path / "owner").exists()


def test_nobody_takes_a_store_that_is_checked(path: Path) -> None:
    seen = []

    def progress(done: int, total: int) -> None:
        with pytest.raises(BusyError):
            Store.open(path, "test")
        seen.append((done, total))

    check(path, data=True, progress=progress)
    assert seen[-1] == (EXTENT_SIZE + 1005, EXTENT_SIZE + 1005)


def test_an_interrupted_check_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("largefs.cli.check"), "check", interrupt)
    assert _run(path)[0] == 32


def test_json(path: Path) -> None:
    _flip_a_bit(backing_file(path, FILE), 2 * EXTENT_SIZE)
    code, out, _ = _run(path, "--data", "--json")
    assert code == 4
    result = json.loads(out)
    assert result["clean"] is False
    assert result["problems"] == [
        {
            "kind": "data",
            "inode": FILE,
            "path": "/directory/file",
            "offset": 2 * EXTENT_SIZE,
            "text": f"damaged: 1000 bytes at {2 * EXTENT_SIZE} are not what was recorded",
            "mended": False,
        }
    ]


def test_a_foreign_owner_that_lives_keeps_a_check_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = owner.Owner("elsewhere", "f" * 32, "another", 1, "mounted at /srv")
    monkeypatch.setattr(owner, "foreign_and_alive", lambda path: other)
    with pytest.raises(BusyError, match="on host elsewhere"):
        check(path)
