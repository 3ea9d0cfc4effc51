"""Bad input gets one clear line and an exit code, and nothing is lost."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts import CLOSED, LARGEFS, Mounts, is_mounted, largefs

MOUNT_FAILED = 32  # mount(8)
USAGE_OF_MOUNT = 1


def refused(*args: object, code: int, says: str) -> None:
    """A command ends with `code` and one line that contains `says`."""
    done = largefs(*args, code=code)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not done.stdout


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    largefs("mkfs", path)
    return path


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mountpoint"
    path.mkdir()
    return path


def test_no_store(tmp_path: Path, mountpoint: Path) -> None:
    for source in (tmp_path / "missing", tmp_path, Path("/etc/passwd")):
        refused("mount", source, mountpoint, code=MOUNT_FAILED, says="no largefs store")
        refused("import", "/etc/apt", source, code=1, says="no largefs store")
        refused("export", source, tmp_path / "out", code=1, says="no largefs store")
    assert not (tmp_path / "out").exists()


def test_some_other_database(tmp_path: Path, mountpoint: Path) -> None:
    for content in (b"", b"SQLite format 3\0" + bytes(4080), os.urandom(8192)):
        (tmp_path / "meta.db").write_bytes(content)
        refused("mount", tmp_path, mountpoint, code=MOUNT_FAILED, says="something else")
        assert (tmp_path / "meta.db").read_bytes() == content


def test_newer_format(store: Path, mountpoint: Path) -> None:
    with open(store / "meta.db", "r+b") as f:
        f.seek(60)
        f.write((99).to_bytes(4, "big"))
    before = (store / "meta.db").read_bytes()
    refused("mount", store, mountpoint, code=MOUNT_FAILED, says="format version 99 is newer")
    refused("import", "/etc/apt", store, code=1, says="update largefs")
    assert (store / "meta.db").read_bytes() == before


def test_store_in_use(mounts: Mounts, mountpoint: Path, tmp_path: Path) -> None:
    mount = mounts.make()
    for args, code in (
        (("mount", mount.store, mountpoint), MOUNT_FAILED),
        (("import", "/etc/apt", mount.store), 1),
        (("export", mount.store, tmp_path / "out"), 1),
        (("check", mount.store), 8),
    ):
        refused(*args, code=code, says=f"in use: mounted at {mount.path}")
    (mount.path / "still").write_text("there")


def test_a_store_whose_path_is_no_text(mounts: Mounts, tmp_path: Path) -> None:
    """POSIX paths are bytes; SQLite's binding takes only what is UTF-8."""
    store = tmp_path / os.fsdecode(b"st\xffre")
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("text")
    largefs("mkfs", store)
    largefs("import", source, store)
    mount = mounts.make(store=store)
    assert (mount.path / "file").read_text() == "text"
    (mount.path / "new").write_text("more")
    refused("import", source, store, code=1, says=f"in use: mounted at {mount.path}")
    mount.unmount()
    assert sorted(os.listdir(store)) == CLOSED
    assert "clean: 3 inodes" in largefs("check", store, "--data").stdout
    largefs("check", store, "--repair")
    largefs("doctor", store, code=None)
    largefs("export", store, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["file", "new"]


def test_mountpoint(mounts: Mounts, store: Path, tmp_path: Path) -> None:
    mount = mounts.make()
    (tmp_path / "file").touch()
    for mountpoint, says in (
        (tmp_path / "missing", "no such directory"),
        (tmp_path / "file", "not a directory"),
        (mount.path, "something is mounted here"),
    ):
        refused("mount", store, mountpoint, code=MOUNT_FAILED, says=says)
    mount.expected.append("ends on")
    os.kill(mount.pid, 9)
    while Path(f"/proc/{mount.pid}/exe").exists():
        pass
    refused("mount", store, mount.path, code=MOUNT_FAILED, says=f"umount {mount.path}")


def test_mountpoint_that_holds_the_store(store: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for source, mountpoint in (
        (store, store),
        (store, tmp_path),
        (store, tmp_path / "link"),
        (tmp_path / "link/store", tmp_path),
    ):
        refused("mount", source, mountpoint, code=MOUNT_FAILED, says="holds the store")


def test_options(store: Path, mountpoint: Path) -> None:
    for option, says in (
        ("nonsense", "unknown mount option 'nonsense'"),
        ("commit=soon", "must be 0.1 to 3600 seconds"),
        ("hugetext=perhaps", "must be one of open, background, off"),
    ):
        refused("mount", store, mountpoint, "-o", option, code=USAGE_OF_MOUNT, says=says)
    assert not mountpoint.is_mount()


def test_log_that_cannot_be_written(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    for log in (tmp_path / "missing/log", tmp_path):
        refused("mount", store, mountpoint, "-o", f"log={log}", code=MOUNT_FAILED, says=f"{log}: ")


def test_dry_run(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    largefs("mount", "--dry-run", store, mountpoint)
    missing = tmp_path / "missing"
    refused("mount", "--dry-run", store, missing, code=MOUNT_FAILED, says="no such directory")
    refused("mount", "--dry-run", missing, mountpoint, code=MOUNT_FAILED, says="no largefs store")


def test_mount_without_standard_descriptors(mounts: Mounts) -> None:
    mount = mounts.make()
    mount.unmount()
    script = f"{LARGEFS} mount {mount.store} {mount.path} -o log={mount.log} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], timeout=60, check=False).returncode == 0
    largefs("umount", "--force", mount.path)


def test_no_fuse_device(store: Path, mountpoint: Path) -> None:
    """In a mount namespace whose /dev/fuse is something else."""
    script = f"mount -t tmpfs none /dev && {LARGEFS} mount {store} {mountpoint}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == MOUNT_FAILED
    assert "/dev/fuse: missing" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [("mount", "{store}", "{mountpoint}"), ("doctor", "{store}")],
    ids=["mount", "doctor"],
)
def test_a_fuse_device_of_others(public: Path, command: tuple[str, ...]) -> None:
    """As an ordinary user, in a mount namespace whose /dev/fuse is for root alone."""
    places = {"store": public / "store", "mountpoint": public / "mountpoint"}
    places["mountpoint"].mkdir()
    device = public / "fuse"
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 229))
    program = (
        "import importlib; from tests.users import NOBODY, become\n"
        "from largefs.cli.commands import COMMANDS, cli, run\n"
        "for name in COMMANDS.values(): importlib.import_module(f'largefs.cli.{name}')\n"
        "import largefs.filesystem.daemon, largefs.filesystem.options, pyfuse3, encodings.ascii, sys\n"
        "become(NOBODY)\n"
        f"cli.main(['mkfs', '{places['store']}'], standalone_mode=False)\n"
        f"sys.argv[1:] = {[word.format(**places) for word in command]!r}\n"
        "sys.exit(run())"
    )
    script = f'mount --bind {device} /dev/fuse && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
    )
    if command[0] == "mount":
        assert done.returncode == MOUNT_FAILED
        assert done.stderr.startswith("largefs: /dev/fuse: Permission denied; mount as root, or ")
        assert done.stderr.count("\n") == 1
    else:
        assert done.returncode == 2
        assert re.search("^bad +/dev/fuse +cannot be opened: Permission denied$", done.stdout, re.M)


def test_umount_by_force_of_a_mount_in_use(mounts: Mounts) -> None:
    mount = mounts.make()
    (mount.path / "file").write_text("text")
    with open(mount.path / "file"):
        refused("umount", mount.path, code=1, says="busy")
        assert os.listdir(mount.path) == ["file"]
        refused("umount", "--force", mount.path, code=1, says=f"umount --lazy {mount.path}")
        assert is_mounted(mount.path)
        with pytest.raises(OSError) as e:
            os.statvfs(mount.path)
        assert e.value.errno == errno.ENOTCONN
        largefs("check", mount.store, "--data")  # nobody holds it, and it was closed
        largefs("umount", "--lazy", mount.path)
        mount.pid = 0
        assert not is_mounted(mount.path)
    mount.mount()
    assert (mount.path / "file").read_text() == "text"


def test_doctor_on_what_is_no_store(mounts: Mounts, tmp_path: Path) -> None:
    mount = mounts.make()
    (mount.path / "file").touch()
    for place, says in (
        ("/etc/passwd", "/etc/passwd: not a directory; name a store"),
        ("/etc", "/etc: no largefs store (name the directory that largefs mkfs made)"),
        (mount.path, f"its store is: findmnt -no SOURCE {mount.path}"),
        (tmp_path / "missing", "largefs mkfs"),
    ):
        for option in ([], ["--json"]):
            refused("doctor", place, *option, code=2, says=says)


@pytest.mark.parametrize("options", ["", "-o subset=pid"])
def test_doctor_without_proc(store: Path, options: str) -> None:
    """In a mount namespace whose /proc is empty, or holds nothing but processes."""
    kind = "proc" if options else "tmpfs"
    script = f"mount -t {kind} {options} none /proc && {LARGEFS} doctor {store}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if options:
        assert done.returncode in (0, 1) and not done.stderr
        assert "route:" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr == (
            "largefs: /proc/self/mountinfo: No such file or directory; "
            "make it readable: mount -t proc proc /proc\n"
        )


@pytest.mark.parametrize("signals", [1, 2])
def test_an_import_that_is_terminated(store: Path, tmp_path: Path, signals: int) -> None:
    """Once: it ends after the file at hand. Twice, it is killed. Both leave nothing but what is done."""
    source, temporary = tmp_path / "source", tmp_path / "temporary"
    temporary.mkdir()
    source.mkdir()
    files = 60
    for i in range(files):
        (source / f"{i:02}").write_bytes(os.urandom(4 << 20))
    running = subprocess.Popen(
        [LARGEFS, "import", source, store],
        env={**os.environ, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(store.glob("extents/*/*"))) < 5:
        assert running.poll() is None
        time.sleep(0.01)
    for _ in range(signals):
        running.terminate()
        if signals == 2:
            time.sleep(0.005)
    said = running.communicate(timeout=60)[1]
    if signals == 1:
        assert (running.returncode, said) == (130, "largefs: interrupted\n")
        assert sorted(os.listdir(store)) == CLOSED
    else:
        assert running.returncode in (-signal.SIGTERM, 130)
    assert os.listdir(temporary) == []
    largefs("check", store, "--data")
    done = json.loads(largefs("import", source, store, "--json").stdout)
    assert done["entries"] == files and not done["failed"]
    assert done["unchanged"] < files
    if signals == 1:
        assert done["unchanged"] >= 4
    assert sorted(os.listdir(store)) == CLOSED
    assert len(list(store.glob("extents/*/*"))) == files
    largefs("check", store, "--data")


def test_import_and_export_of_nothing(store: Path, tmp_path: Path) -> None:
    refused("import", tmp_path / "missing", store, code=1, says="No such file or directory")
    refused("import", "/etc/passwd", store, code=1, says="Not a directory")
    refused("export", f"{store}:/missing", tmp_path / "out", code=1, says="holds no /missing")
    refused("export", store, "/etc", code=1, says="not empty")
    refused("mkfs", store, code=1, says="is a store already")
    refused("mkfs", "/etc", code=1, says="not empty")


def test_a_file_that_changes_while_it_is_read(store: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good").write_text("good")
    growing = source / "growing"
    growing.write_bytes(bytes(128 << 20))
    done = threading.Event()

    def grow() -> None:
        with open(growing, "ab", buffering=0) as f:
            while not done.wait(0.001):
                f.write(b"more")

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        said = largefs("import", source, store, code=1).stderr
    finally:
        done.set()
        thread.join()
    assert f"{growing}: not imported: changed while it was read" in said
    largefs("export", store, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["good"]
    assert largefs("import", source, store).returncode == 0
    largefs("check", store, "--data")


UNREADABLE = """
import errno
from pyfuse3 import FUSEError
from largefs.filesystem.operations import Filesystem
read = Filesystem.read
async def fail_at(self, fh, off, size):
    if b"bad" in self._store.path_of(fh >> 1) and off + size > 64 << 10:
        raise FUSEError(errno.EIO)
    return await read(self, fh, off, size)
Filesystem.read = fail_at
"""


def test_a_source_that_the_disk_cannot_read(mounts: Mounts, store: Path) -> None:
    """It is left out, as what may not be read, and the rest is imported."""
    source = mounts.make("route=none", patch=UNREADABLE)
    for name, size in ("bad", 1 << 20), ("bad too", 5 << 20), ("good", 5 << 20):
        (source.path / name).write_bytes(os.urandom(size))
    source.unmount()  # and with it goes what the kernel has of them
    source.mount("route=none")
    done = largefs("import", source.path, store, "--align", "off", code=1)
    for name in "bad", "bad too":
        reason = "not imported: cannot be read: Input/output error"
        assert f"largefs: {source.path / name}: {reason}\n" in done.stderr
    assert done.stderr.endswith("\n2 names were left out\n")
    assert "5.0 MiB copied" in done.stdout
    largefs("check", store, "--data")


def test_a_file_too_large_for_the_filesystem_of_the_store(store: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good").write_text("good")
    with open(source / "large", "wb") as f:
        f.truncate(1 << 30)
    limited = ["prlimit", f"--fsize={64 << 20}", LARGEFS, "import", source, store]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    reason = "not imported: the store's filesystem: File too large"
    assert done.stderr == f"largefs: {source}/large: {reason}\n1 names were left out\n"
    largefs("check", store, "--data")


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user reaches and may write to."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="largefs-test-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def test_a_file_that_may_not_be_read(public: Path) -> None:
    """As an ordinary user; the interpreter is loaded before, for it may be out of that user's reach."""
    source = public / "source"
    source.mkdir()
    for name in ("good", "secret"):
        (source / name).write_text(name)
    (source / "secret").chmod(0)
    program = (
        "import os, sys; from largefs.cli.commands import cli; "
        "from largefs.cli import import_, mkfs, export; "
        "import largefs.transfer.importer, largefs.transfer.exporter, errno; "
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534); "
        f"cli.main(['mkfs', '{public}/store'], standalone_mode=False); "
        f"cli.main(['import', '{source}', '{public}/store'], standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert f"{source}/secret: not imported: Permission denied" in done.stderr
    assert "1 names were left out" in done.stderr
    largefs("export", public / "store", public / "out")
    assert os.listdir(public / "out") == ["good"]


def test_an_export_that_may_not_set_owners(public: Path) -> None:
    """One line for all of them, with the first."""
    source = public / "source"
    source.mkdir()
    for name in "abc":
        (source / name).touch()
    (source / "c").chmod(0o4755)
    program = (
        "import sys; from tests.users import NOBODY, become\n"
        "from largefs.cli.commands import cli, run; from largefs.cli import export, import_, mkfs\n"
        "become(NOBODY)\n"
        f"cli.main(['mkfs', '{public}/store'], standalone_mode=False)\n"
        f"sys.argv[1:] = ['import', '{source}', '{public}/store']\n"
        "run()\n"
        f"sys.argv[1:] = ['export', '{public}/store', '{public}/out']\n"
        "sys.exit(run())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    owner, bits = sorted(done.stderr.splitlines(), key=len, reverse=True)
    assert re.fullmatch("largefs: /[abc] and 3 more: cannot set owner", owner)
    assert bits == "largefs: /c: cannot set set-ID bits"
    assert "3 names, 0 B exported" in done.stdout
    assert sorted(os.listdir(public / "out")) == ["a", "b", "c"]


def test_a_mountpoint_is_no_store(tmp_path: Path, mounts: Mounts) -> None:
    """But it has one, and the message tells how to find it."""
    mount = mounts.make()
    refused("check", mount.path, code=8, says="findmnt")
    refused("export", mount.path, tmp_path / "out", code=1, says="findmnt")
