"""Import and export without a mount: what must not go wrong when a source, a disk or a user does."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from largefs.store import ROOT_INODE, Store, StoreError
from largefs.store.check import check
from largefs.transfer import exporter, importer
from largefs.transfer.exporter import Exporter
from largefs.transfer.importer import Importer, Tally
from tests.elf import images
from tests.mounts import largefs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def store() -> Iterator[Path]:
    """A store in memory: what is tested here is not the disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="largefs-test-", dir=memory) as directory:
        Store.create(Path(directory) / "store")
        yield Path(directory) / "store"


def run_import(source: Path, store: Path) -> Tally:
    with Store.open(store, "test") as opened:
        return Importer(opened).run(os.fsencode(source))


def run_export(store: Path, target: Path) -> exporter.Tally:
    with Store.open(store, "test") as opened:
        return Exporter(opened).run(b"/", os.fsencode(target))


def names(store: Path) -> list[bytes]:
    with Store.open(store, "test") as opened:
        return [d.name for d in opened.entries(ROOT_INODE)]


def content(store: Path, name: bytes) -> bytes:
    with Store.open(store, "test") as opened:
        row = opened.lookup(ROOT_INODE, name)
        with opened.backing.opened(row.id) as fd:
            return os.read(fd, row.size + 1)


def is_clean(store: Path) -> bool:
    problems = check(store, data=True).problems
    assert not problems, problems
    return True


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_drop_that_is_rolled_back_keeps_the_data(store: Path, error: BaseException) -> None:
    with Store.open(store, "test") as opened:
        kept = opened.make(ROOT_INODE, b"kept", stat.S_IFREG | 0o644, 0, 0).id
        gone = opened.make(ROOT_INODE, b"gone", stat.S_IFREG | 0o644, 0, 0).id
        with pytest.raises(type(error)), opened.change():
            opened.remove(ROOT_INODE, b"kept")
            raise error
        with opened.change():
            opened.remove(ROOT_INODE, b"gone")
            with pytest.raises(type(error)), opened.change():
                opened.remove(ROOT_INODE, b"kept")
                raise error
        assert kept in opened.to_flush()
        assert gone not in opened.to_flush()
        opened.commit()
        assert opened.backing.stat(kept)
        with pytest.raises(FileNotFoundError):
            opened.backing.stat(gone)
    assert is_clean(store)


def test_a_replacement_that_fails_keeps_the_file(
    source: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "file").write_bytes(b"precious")
    run_import(source, store)
    (source / "file").write_bytes(b"new")

    def refuse(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "set_checksums", refuse)
        assert run_import(source, store).failed
    assert is_clean(store)
    assert content(store, b"file") == b"precious"
    assert run_import(source, store).unchanged == 0
    assert content(store, b"file") == b"new"


def test_a_store_in_the_tree_is_left_out_and_stays_locked(source: Path) -> None:
    (source / "file").write_bytes(b"content")
    store = source / "store"
    Store.create(store)
    with Store.open(store, "test") as opened:
        tally = Importer(opened).run(os.fsencode(source))
        assert (tally.entries, tally.failed) == (1, [])
        assert [d.name for d in opened.entries(ROOT_INODE)] == [b"file"]
        assert "in use" in largefs("check", store, code=8).stderr
        for inside in (store, store / "extents" / "00"):
            with pytest.raises(OSError, match="the store itself"):
                Importer(opened).run(os.fsencode(inside))
    assert is_clean(store)


def test_a_deep_tree_keeps_the_times_of_its_directories(
    source: Path, store: Path, tmp_path: Path
) -> None:
    deepest, depth = source, 1200
    for _ in range(depth):
        deepest /= "d"
        deepest.mkdir()
    (deepest / "file").write_bytes(b"content")
    directories = [source, *(source / Path(*["d"] * n) for n in range(1, depth + 1))]
    for number, directory in enumerate(directories):
        os.utime(directory, ns=(number, number))
    for unchanged in (0, 1):
        tally = run_import(source, store)
        assert (tally.entries, tally.unchanged, tally.failed) == (depth + 1, unchanged, [])
    out = tmp_path / "out"
    exported = run_export(store, out)
    assert (exported.entries, exported.failed) == (depth + 1, [])
    for number, directory in enumerate(directories):
        assert (out / directory.relative_to(source)).stat().st_mtime_ns == number
    subprocess.run(["rm", "-r", source, out], check=True)  # pytest's own removal is recursive


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), StoreError("lost")])
def test_an_error_of_the_store_is_none_of_the_source(
    source: Path, store: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (source / "directory").mkdir()
    for name in "abc":
        (source / "directory" / name).touch()
    with Store.open(store, "test") as opened:
        commits = iter([None, None, error])

        def commit() -> None:
            if failure := next(commits, None):
                raise failure

        monkeypatch.setattr(importer, "COMMIT_SECONDS", -1.0)
        with monkeypatch.context() as patched, pytest.raises(type(error)) as raised:
            patched.setattr(opened, "commit", commit)
            Importer(opened).run(os.fsencode(source))
        assert raised.value is error


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_file_and_a_second_one_does_not(
    source: Path, store: Path, number: int, times: int
) -> None:
    """It comes at the worst moment: the metadata is written, and not yet known to be."""
    for name in ("one", "two"):
        (source / name).write_text(name)
    program = (
        "import os; from largefs.cli import main; from largefs.store import Store\n"
        "adopt = Store.adopt\n"
        "def adopt_and_interrupt(*args, **options):\n"
        "    adopt(*args, **options)\n"
        f"    for _ in range({times}): os.kill(os.getpid(), {number})\n"
        "Store.adopt = adopt_and_interrupt\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "import", source, store], capture_output=True, text=True
    )
    if times == 1:
        assert (done.returncode, done.stderr) == (130, "largefs: interrupted\n")
        (name,) = names(store)
        assert content(store, name) == name
    else:
        assert done.returncode == -number
        assert names(store) == []
    assert is_clean(store)
    assert run_import(source, store).unchanged == 2 - times


def test_a_file_whose_metadata_is_written_keeps_its_data(
    source: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "file").write_bytes(b"precious")
    adopt = Store.adopt

    def adopt_and_interrupt(*args: Any, **options: Any) -> None:
        adopt(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "adopt", adopt_and_interrupt)
        run_import(source, store)
    assert is_clean(store)
    assert content(store, b"file") == b"precious"


def test_a_time_that_no_store_can_hold_leaves_out_the_name(source: Path, store: Path) -> None:
    (source / "changed").write_bytes(b"old")
    run_import(source, store)
    late = 10_413_792_000  # 2300-01-01, in seconds
    (source / "directory").mkdir()
    for name in ("directory/inside", "good", "new"):
        (source / name).touch()
    (source / "changed").write_bytes(b"new")
    for name in ("directory", "new", "changed"):
        os.utime(source / name, (0, late))
    if (source / "new").stat().st_mtime != late:
        pytest.skip("the filesystem of tmp_path has no such times")
    tally = run_import(source, store)
    left_out = [os.fsencode(source / name) for name in ("changed", "directory", "new")]
    assert sorted(path for path, _ in tally.failed) == left_out
    assert {reason for _, reason in tally.failed} == {
        "its times are not between 1678 and 2261; touch it"
    }
    assert sorted(names(store)) == [b"changed", b"good"]
    assert content(store, b"changed") == b"old"
    assert is_clean(store)
    os.utime(source, (0, late))
    said = largefs("import", source, store, code=1).stderr
    assert said == f"largefs: {source}: its times are not between 1678 and 2261; touch it\n"


def test_a_hard_link_that_was_broken_is_broken_in_the_store(source: Path, store: Path) -> None:
    (source / "a").write_bytes(b"content")
    for name in ("b", "c"):
        os.link(source / "a", source / name)
    run_import(source, store)
    shutil.copy2(source / "b", source / "new")
    os.replace(source / "new", source / "b")
    (source / "a").chmod(0o600)
    (source / "b").chmod(0o666)
    assert run_import(source, store).unchanged < 3
    with Store.open(store, "test") as opened:
        a, b, c = (opened.lookup(ROOT_INODE, name) for name in (b"a", b"b", b"c"))
    assert a.id == c.id != b.id
    assert (a.nlink, b.nlink) == (2, 1)
    assert (stat.S_IMODE(a.mode), stat.S_IMODE(b.mode)) == (0o600, 0o666)
    assert run_import(source, store).unchanged == 3
    assert is_clean(store)


@pytest.mark.parametrize("image", [bytes(5000), images.lld(pie=True)], ids=["plain", "aligned"])
def test_a_file_whose_data_is_cut_short_is_not_exported(
    source: Path, store: Path, tmp_path: Path, image: bytes
) -> None:
    (source / "file").write_bytes(image)
    run_import(source, store)
    with Store.open(store, "test") as opened:
        row = opened.lookup(ROOT_INODE, b"file")
        assert (opened.alignment(row.id) is not None) == any(image)
        os.truncate(store / "extents" / opened.backing.name(row.id), row.size - 1)
    exported = run_export(store, tmp_path / "out")
    assert exported.failed == [(b"/file", exporter.CUT_SHORT)]
    assert os.listdir(tmp_path / "out") == []


def test_acls_of_the_directory_do_not_come_into_an_export(
    source: Path, store: Path, tmp_path: Path
) -> None:
    (source / "directory").mkdir()
    (source / "directory" / "file").touch(0o640)
    (source / "kept").touch()
    subprocess.run(["setfacl", "-m", "u:daemon:rw", source / "kept"], check=True)
    os.symlink("nowhere", source / "symlink")
    run_import(source, store)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["setfacl", "-m", "d:u:daemon:rwx,d:o::rwx", out], check=True)
    assert not run_export(store, out).failed
    exported = [out, out / "directory", out / "directory" / "file", out / "symlink"]
    assert [os.listxattr(path, follow_symlinks=False) for path in exported] == [[]] * 4
    assert os.listxattr(out / "kept") == ["system.posix_acl_access"]
    assert stat.S_IMODE((out / "directory" / "file").stat().st_mode) == 0o640


def test_an_export_without_privilege_gives_no_set_id_bits() -> None:
    """What the user cannot own must not run as that user; a read-only file has its xattrs."""
    if os.geteuid():
        pytest.skip("only root has files of others")
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="largefs-test-") as directory:
        place = Path(directory)
        place.chmod(0o777)
        source = place / "source"
        source.mkdir()
        (source / "program").touch()
        (source / "program").chmod(0o6755)
        (source / "read-only").touch()
        os.setxattr(source / "read-only", "user.k", b"value")
        (source / "read-only").chmod(0o444)
        os.setegid(65534)
        os.seteuid(65534)
        try:
            Store.create(place / "store")
            run_import(source, place / "store")
            tally = run_export(place / "store", place / "out")
        finally:
            os.seteuid(0)
            os.setegid(0)
        assert tally.failed == []
        assert sorted(tally.unset.pop("owner")) == [b"/", b"/program", b"/read-only"]
        assert tally.unset == {"set-ID bits": [b"/program"]}
        program, read_only = ((place / "out" / n).stat() for n in ("program", "read-only"))
        assert stat.S_IMODE(program.st_mode) == 0o755
        assert stat.S_IMODE(read_only.st_mode) == 0o444
        assert os.getxattr(place / "out" / "read-only", "user.k") == b"value"
