"""A disk that fails under a store: whoever asks gets EIO or one clear line, and the last commit is kept."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.disks import Disk, disk
from tests.crash.markers import sync_directory
from tests.mounts import Mounts, largefs, reason_not_to_mount

NAMES = 300


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    if reason := reason_not_to_mount():
        pytest.skip(reason)
    with disk(tmp_path, "ext4", 64 << 20) as made:
        yield made


@pytest.fixture
def mounts_on_it(small_disk: Disk, mounts: Mounts) -> Mounts:
    """Mounts that end before the disk below them does."""
    return mounts


@pytest.fixture(params=["files", "symlinks"])
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    for i in range(NAMES):
        name = path / f"{i:03}"
        if request.param == "files":
            name.write_text(name.name)
        else:
            name.symlink_to("t" * 1000)
    return path


def forget(file: Path) -> None:
    """Have the kernel drop what it has of a file in memory."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def killing(disk: Disk, method: str, after: int) -> str:
    """A program: the command `largefs`, during which the disk dies when a method has done its work."""
    return (
        "from pathlib import Path; from largefs.cli import main; from largefs.store import Store\n"
        "from largefs.store.backing import BackingFiles; from tests.crash.disks import Disk\n"
        f"disk = Disk(Path({str(disk.image)!r}), Path({str(disk.path)!r}))\n"
        f"owner, _, name = {method!r}.partition('.')\n"
        "owner, calls = globals()[owner], 0\n"
        "method = getattr(owner, name)\n"
        "def count(*args, **options):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    if calls == {after}: disk.lose_power()\n"
        "    return method(*args, **options)\n"
        "setattr(owner, name, count)\n"
        "main()"
    )


def run(program: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent.parent,
    )


def test_an_import_says_that_it_is_the_store_and_can_be_run_again(
    small_disk: Disk, source: Path
) -> None:
    store = small_disk.path / "store"
    largefs("mkfs", store)
    done = run(killing(small_disk, "Store.adopt", NAMES // 2), "import", source, store)
    assert done.returncode == 1
    assert done.stderr.startswith(f"largefs: {store}: ") and done.stderr.count("\n") == 1
    assert "(dmesg), then " in done.stderr
    if not (source / "000").is_symlink():
        assert f"cannot write what {source}/" in done.stderr
    small_disk.restore_power()
    largefs("check", store, "--data")
    assert f"{NAMES} names" in largefs("import", source, store).stdout
    largefs("check", store, "--data")


def test_an_export_ends_with_one_line(small_disk: Disk, source: Path, tmp_path: Path) -> None:
    store = small_disk.path / "store"
    largefs("mkfs", store)
    largefs("import", source, store)
    forget(store / "meta.db")
    done = run(killing(small_disk, "Store.entries", 1), "export", store, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{store}: meta.db cannot be read or written" in done.stderr
    small_disk.restore_power()
    largefs("check", store, "--data")


def test_a_mount_answers_with_eio_and_lives_on(
    small_disk: Disk, source: Path, mounts_on_it: Mounts
) -> None:
    store = small_disk.path / "store"
    largefs("mkfs", store)
    largefs("import", source, store)
    m = mounts_on_it.make("commit=600", store=store)
    (m.path / "lost").mkdir()
    forget(store / "meta.db")
    small_disk.lose_power()
    for failing in (
        lambda: os.listdir(m.path),
        lambda: os.lstat(m.path / "150"),
        lambda: os.lstat(m.path / "151"),
    ):
        with pytest.raises(OSError) as e:
            failing()
        assert e.value.errno == errno.EIO
    log = m.log.read_text()
    assert log.count(f"{store}: meta.db cannot be read or written") == 3
    assert "Traceback" not in log
    for _ in range(2):  # nothing is lost as long as the daemon lives, so it is tried again
        with pytest.raises(OSError) as e:
            sync_directory(m.path)
        assert e.value.errno == errno.EIO
    assert os.statvfs(m.path).f_namemax == 255
    m.unmount()
    assert "Traceback" not in m.log.read_text()
    m.expected = ["meta.db cannot be read", "cannot commit", "cannot be refreshed"]
    small_disk.restore_power()
    m.mount()
    assert len(os.listdir(m.path)) == NAMES
