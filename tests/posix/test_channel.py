"""The channel on real mounts, with the small filesystem of channel_daemon.py."""

import ctypes
import errno
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.users import NOBODY, become

DAEMON = Path(__file__).with_name("channel_daemon.py")
PAGES_LIMIT = Path("/proc/sys/fs/fuse/max_pages_limit")
MIB = 1 << 20
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32

pytestmark = [
    pytest.mark.resident,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse"),
]
libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Mount:
    path: Path
    source: Path
    daemon: subprocess.Popen[bytes]
    log: Path
    negotiated: dict[str, Any] | None = None
    expect_log: list[str] = field(default_factory=list)

    def events(self, kind: str) -> list[int]:
        """The sizes of the READ or WRITE requests so far."""
        lines = self.log.read_text().splitlines()
        return [e[kind] for e in map(json.loads, lines) if kind in e]


def start(path: Path, source: Path, log: Path, options: dict[str, Any]) -> Mount:
    with open(log, "wb") as out, open(f"{log}.err", "wb") as err:
        daemon = subprocess.Popen(
            [sys.executable, DAEMON, json.dumps(options), source, path], stdout=out, stderr=err
        )
    deadline = time.monotonic() + 20
    while not log.read_bytes().endswith(b"\n"):
        assert daemon.poll() is None, Path(f"{log}.err").read_text()
        assert time.monotonic() < deadline, "INIT is not settled"
        time.sleep(0.02)
    negotiated = json.loads(log.read_text().splitlines()[0])["negotiated"]
    return Mount(path, source, daemon, log, negotiated)


def stop(mount: Mount) -> None:
    """Unmount; the daemon must end by itself, at peace, and leave no mount behind."""
    try:
        subprocess.run(["umount", mount.path], check=True)
        assert mount.daemon.wait(10) == 0, Path(f"{mount.log}.err").read_text()
    finally:
        mount.daemon.kill()
        mount.daemon.wait()
        subprocess.run(["umount", "-l", mount.path], stderr=subprocess.DEVNULL, check=False)
    assert not os.path.ismount(mount.path)
    errors = Path(f"{mount.log}.err").read_text()
    for expected in mount.expect_log:
        assert expected in errors
    if not mount.expect_log:
        assert errors == ""


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    mounts: list[Mount] = []

    def mount(**options: Any) -> Mount:
        directory = tmp_path / str(len(mounts))
        (source := directory / "source").mkdir(parents=True)
        (path := directory / "mount").mkdir()
        source.chmod(0o777)
        tmp_path.chmod(0o755)
        mounts.append(start(path, source, directory / "log", options))
        return mounts[-1]

    yield mount
    for m in mounts:
        if os.path.ismount(m.path):
            stop(m)


@pytest.fixture
def pages_limit() -> Iterator[Callable[[int], None]]:
    if not PAGES_LIMIT.exists():
        pytest.skip("no fs.fuse.max_pages_limit (before Linux 6.13)")
    before = PAGES_LIMIT.read_text()
    yield lambda pages: PAGES_LIMIT.write_text(str(pages)) and None
    PAGES_LIMIT.write_text(before)


def passthrough(mounted: Callable[..., Mount], **options: Any) -> Mount:
    mount = mounted(**{"wanted": {"passthrough": True, **options.pop("wanted", {})}, **options})
    assert mount.negotiated
    if not mount.negotiated["passthrough"]:
        pytest.skip("this kernel has no FUSE passthrough (Linux 6.9)")
    return mount


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Return 0 or an errno."""
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        return ctypes.get_errno()
    return 0


def aligned(size: int, fill: bytes = b"x") -> mmap.mmap:
    """A buffer for O_DIRECT."""
    buffer = mmap.mmap(-1, size)
    buffer.write(fill * size)
    return buffer


@pytest.mark.parametrize("mib", [1, 2, 4])
def test_requests_of_up_to_4_mib_reach_the_daemon(
    mounted: Callable[..., Mount], pages_limit: Callable[[int], None], mib: int
) -> None:
    size = mib * MIB
    pages_limit(size // mmap.PAGESIZE)
    mount = mounted(trace=True, wanted={"passthrough": False, "max_write": 4 * MIB})
    assert mount.negotiated
    assert (mount.negotiated["max_write"], mount.negotiated["max_pages"]) == (size, size // 4096)
    fd = os.open(mount.path / "f", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        assert os.pwritev(fd, [aligned(size)], 0) == size
        back = mmap.mmap(-1, size)
        assert os.preadv(fd, [back], 0) == size
        assert back[:] == b"x" * size
    finally:
        os.close(fd)
    assert mount.events("write") == [size]
    assert mount.events("read")[0] == size


def test_what_is_wanted_bounds_what_is_asked(
    mounted: Callable[..., Mount], pages_limit: Callable[[int], None]
) -> None:
    pages_limit(1024)
    mount = mounted(trace=True, wanted={"passthrough": False, "max_write": 2 * MIB})
    assert mount.negotiated
    assert mount.negotiated["max_write"] == 2 * MIB
    with open(mount.path / "f", "wb", buffering=0) as f:
        f.write(b"y" * (4 * MIB))
    assert max(mount.events("write")) == 2 * MIB
    assert (mount.source / "f").read_bytes() == b"y" * (4 * MIB)


@pytest.mark.parametrize("how", ["open", "create"])
def test_passthrough_bypasses_the_daemon(mounted: Callable[..., Mount], how: str) -> None:
    mount = passthrough(mounted, trace=True)
    data = os.urandom(3 * MIB + 17)
    if how == "open":
        (mount.source / "f").touch()
    with open(mount.path / "f", "w+b") as f:
        f.write(data)
        f.flush()
        f.seek(0)
        assert f.read() == data
        with mmap.mmap(f.fileno(), 0) as m:
            assert m[:] == data
    assert (mount.source / "f").read_bytes() == data
    assert mount.events("read") == mount.events("write") == []


def pmd_mapped(path: Path, address: int) -> int:
    """FilePmdMapped of the mapping at `address`, in KiB."""
    smaps = Path("/proc/self/smaps").read_text()
    entry = smaps[re.search(f"^{address:x}-", smaps, re.M).start() :]  # type: ignore[union-attr]
    assert str(path) in entry.splitlines()[0]
    return int(re.search(r"FilePmdMapped:\s*(\d+) kB", entry)[1])  # type: ignore[index]


def map_pmd(path: Path, advise: bool) -> int:
    """Map a file read-only, touch every page, and return FilePmdMapped in KiB."""
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as m:
        os.close(fd)
        if advise:
            m.madvise(mmap.MADV_HUGEPAGE)
        sum(m[i] for i in range(0, size, mmap.PAGESIZE))
        return pmd_mapped(path, _address(m))


def _address(m: mmap.mmap) -> int:
    """The address of a read-only mapping."""

    class Buffer(ctypes.Structure):
        _fields_ = [("buf", ctypes.c_void_p), ("rest", ctypes.c_char * 256)]

    buffer = Buffer()
    get, release = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
    get(ctypes.py_object(m), ctypes.byref(buffer), 0)
    address = buffer.buf
    release(ctypes.byref(buffer))
    assert address
    return address


def test_a_passed_through_mapping_has_the_backing_files_pmd_folios(
    mounted: Callable[..., Mount],
) -> None:
    mount = passthrough(mounted)
    with open(mount.source / "f", "wb") as f:
        f.write(os.urandom(8 * MIB))
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not map_pmd(mount.source / "f", advise=True):
        pytest.skip("the backing filesystem gave no PMD folio")
    assert map_pmd(mount.path / "f", advise=False) > 0


@pytest.mark.parametrize("through", [True, False])
def test_fallocate(mounted: Callable[..., Mount], through: bool) -> None:
    mount = passthrough(mounted) if through else mounted(wanted={"passthrough": False})
    modes = [0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE]
    native = mount.source / "native"
    for mode in modes:
        results = []
        for path in (mount.path / f"f{mode}", native):
            path.write_bytes(b"x" * (2 * MIB))
            fd = os.open(path, os.O_RDWR)
            code = fallocate(fd, mode, MIB + 4096, 2 * MIB)
            os.fsync(fd)
            os.close(fd)
            results.append((code, path.stat().st_size, path.read_bytes()))
        assert results[0] == results[1], f"mode {mode:#x}"
        backing = mount.source / f"f{mode}"
        assert backing.stat().st_blocks == native.stat().st_blocks, f"mode {mode:#x}"
    fd = os.open(mount.path / "f0", os.O_RDWR)
    # The kernel refuses these itself, whatever the backing filesystem has.
    for mode in (COLLAPSE_RANGE, INSERT_RANGE):
        assert fallocate(fd, mode, 0, MIB) == errno.EOPNOTSUPP
    os.close(fd)


@pytest.mark.parametrize("through", [True, False])
def test_seek_data_and_hole(mounted: Callable[..., Mount], through: bool) -> None:
    mount = passthrough(mounted) if through else mounted(wanted={"passthrough": False})
    with open(mount.source / "f", "wb") as f:
        f.seek(2 * MIB)
        f.write(b"x" * MIB)
        f.truncate(4 * MIB)
    with open(mount.path / "f", "rb") as f:
        assert os.lseek(f.fileno(), 0, os.SEEK_DATA) == 2 * MIB
        assert os.lseek(f.fileno(), 2 * MIB, os.SEEK_HOLE) == 3 * MIB
        with pytest.raises(OSError, match="No such device") as e:
            os.lseek(f.fileno(), 3 * MIB, os.SEEK_DATA)
        assert e.value.errno == errno.ENXIO


@pytest.mark.parametrize("through", [True, False])
def test_copy_file_range(mounted: Callable[..., Mount], through: bool) -> None:
    mount = passthrough(mounted) if through else mounted(wanted={"passthrough": False}, trace=True)
    data = os.urandom(3 * MIB)
    (mount.path / "a").write_bytes(data)
    before = len(mount.events("read"))
    with open(mount.path / "a", "rb") as a, open(mount.path / "b", "wb") as b:
        assert os.copy_file_range(a.fileno(), b.fileno(), 2 * MIB, 4096, 100) == 2 * MIB
    expected = b"\0" * 100 + data[4096 : 4096 + 2 * MIB]
    assert (mount.source / "b").read_bytes() == expected
    assert len(mount.events("read")) == before, "copied through the page cache"
    assert (mount.path / "b").read_bytes() == expected


@pytest.mark.parametrize("through", [True, False])
def test_tmpfile(mounted: Callable[..., Mount], through: bool) -> None:
    mount = passthrough(mounted) if through else mounted(wanted={"passthrough": False})
    try:
        fd = os.open(mount.path, os.O_TMPFILE | os.O_RDWR, 0o640)
    except OSError as e:
        if e.errno == errno.EOPNOTSUPP:
            pytest.skip("this kernel has no FUSE_TMPFILE (Linux 6.1)")
        raise
    os.write(fd, b"nameless")
    assert os.pread(fd, 100, 0) == b"nameless"
    st = os.fstat(fd)
    assert (st.st_nlink, st.st_size, st.st_mode & 0o777) == (0, 8, 0o640)
    os.close(fd)
    assert os.listdir(mount.path) == []


def test_an_exception_in_a_handler_is_eio_and_no_more(mounted: Callable[..., Mount]) -> None:
    mount = mounted(wanted={"passthrough": False}, bug_at=4096)
    mount.expect_log.append("ValueError: a bug in a handler")
    fd = os.open(mount.path / "f", os.O_RDWR | os.O_CREAT)
    for _ in range(3):
        assert fallocate(fd, 0, 4096, 4096) == errno.EIO
        assert fallocate(fd, 0, 0, 8192) == 0
    os.close(fd)
    assert (mount.path / "f").stat().st_size == 8192


def test_directories_without_handles(mounted: Callable[..., Mount]) -> None:
    """READDIR and FSYNCDIR carry the node id: the daemon asserts it."""
    mount = mounted(wanted={"passthrough": False})
    for i in range(500):
        (mount.source / f"{i:03}").touch()
    for _ in range(2):
        assert sorted(os.listdir(mount.path)) == [f"{i:03}" for i in range(500)]
    fd = os.open(mount.path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("kill_privileges", [True, False])
def test_setuid_does_not_survive_a_strangers_write(
    mounted: Callable[..., Mount], through: bool, kill_privileges: bool
) -> None:
    wanted = {"passthrough": through, "kill_privileges": kill_privileges}
    mount = mounted(wanted=wanted, timeout=0)
    assert mount.negotiated
    assert mount.negotiated["kill_privileges"] == kill_privileges
    path, source = mount.path / "f", mount.source / "f"

    def survives(act: Callable[[], object]) -> bool:
        """Does the setuid bit survive what a stranger does (in the mount's directory)?"""
        path.touch()
        path.chmod(0o4777)
        assert source.stat().st_mode & 0o7777 == 0o4777
        as_nobody(mount.path, act)
        assert path.stat().st_mode == source.stat().st_mode
        return bool(source.stat().st_mode & 0o4000)

    assert not survives(lambda: os.write(os.open("f", os.O_WRONLY), b"x"))
    assert not survives(lambda: os.truncate("f", 1))
    assert not survives(lambda: os.open("f", os.O_WRONLY | os.O_TRUNC))
    assert not survives(lambda: os.posix_fallocate(os.open("f", os.O_RDWR), 0, 9))
    assert survives(lambda: os.read(os.open("f", os.O_RDONLY), 9))


def as_nobody(directory: Path, act: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(directory)  # which nobody may not reach by its path
            become(NOBODY)
            act()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_10_000_opens_leak_nothing(mounted: Callable[..., Mount]) -> None:
    mount = passthrough(mounted)
    fds = Path(f"/proc/{mount.daemon.pid}/fd")
    (mount.path / "f").write_bytes(b"x")
    before = len(os.listdir(fds))
    resident = int(Path(f"/proc/{mount.daemon.pid}/statm").read_text().split()[1])
    for i in range(10_000):
        fd = os.open(mount.path / "f", os.O_RDWR)
        if i % 100 == 0:
            assert fallocate(fd, 0, 0, 4096) == 0
        os.close(fd)
    deadline = time.monotonic() + 10
    while len(os.listdir(fds)) > before and time.monotonic() < deadline:
        time.sleep(0.05)  # RELEASE is asynchronous
    assert len(os.listdir(fds)) <= before
    grown = int(Path(f"/proc/{mount.daemon.pid}/statm").read_text().split()[1]) - resident
    assert grown * mmap.PAGESIZE < 2 * MIB


def test_sigkill_leaves_nothing_but_the_running_mapping(mounted: Callable[..., Mount]) -> None:
    mount = passthrough(mounted)
    data = os.urandom(2 * MIB)
    (mount.source / "f").write_bytes(data)
    fd = os.open(mount.path / "f", os.O_RDONLY)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as m:
        os.close(fd)
        assert m[0] == data[0]
        mount.daemon.send_signal(signal.SIGKILL)
        mount.daemon.wait()
        assert m[:] == data
        with pytest.raises(OSError, match="Transport endpoint is not connected"):
            os.stat(mount.path / "another")
    subprocess.run(["umount", mount.path], check=True)
    assert not os.path.ismount(mount.path)


def test_writeback_cache_excludes_passthrough(mounted: Callable[..., Mount]) -> None:
    mount = mounted(wanted={"passthrough": True}, writeback=True)
    assert mount.negotiated
    assert mount.negotiated["flags"] & 1 << 16
    assert not mount.negotiated["passthrough"]
    (mount.path / "f").write_bytes(b"x" * MIB)
    assert (mount.path / "f").read_bytes() == b"x" * MIB


@pytest.mark.parametrize("absent", [True, False])
@pytest.mark.parametrize("want", [True, False])
def test_the_filesystem_is_the_same_without_a_channel(
    mounted: Callable[..., Mount], absent: bool, want: bool
) -> None:
    mount = mounted(absent=absent, want=want, trace=True)
    assert (mount.negotiated is None) == (absent or not want)
    data = os.urandom(5 * MIB + 1)
    path = mount.path / "f"
    path.write_bytes(data)
    assert path.read_bytes() == data
    assert (mount.source / "f").read_bytes() == data
    with open(path, "r+b") as f:
        with mmap.mmap(f.fileno(), 0) as m:
            m[MIB] = 65
        assert os.lseek(f.fileno(), 0, os.SEEK_HOLE) == len(data)
        f.truncate(2 * MIB)
        code = fallocate(f.fileno(), 0, 0, 3 * MIB)
        assert code == (errno.EOPNOTSUPP if absent else 0)
    assert (mount.source / "f").read_bytes()[MIB] == 65
    assert os.listdir(mount.path) == ["f"]
    path.chmod(0o600)
    path.unlink()
    assert os.listdir(mount.path) == []


def test_cost_of_a_request(mounted: Callable[..., Mount]) -> None:
    """The companion must not make pyfuse3's requests dearer. Prints the ratios (-s).

    Counts the daemon's time on a CPU, which other load on the machine disturbs least.
    """
    mounts = [mounted(absent=absent, timeout=0) for absent in (True, False)]
    for mount in mounts:
        (mount.path / "f").write_bytes(b"x" * 4096)

    def cost(mount: Mount, act: Callable[[Path], object]) -> float:
        """Nanoseconds of CPU time for each of 300."""
        schedstat = Path(f"/proc/{mount.daemon.pid}/schedstat")
        before = int(schedstat.read_text().split()[0])
        for _ in range(300):
            act(mount.path / "f")
        return (int(schedstat.read_text().split()[0]) - before) / 300

    for name, act in {
        "stat": os.stat,
        "open and close": lambda path: os.close(os.open(path, os.O_RDONLY)),
    }.items():
        rounds = [[cost(mount, act) for mount in mounts] for _ in range(25)]
        without, with_it = (min(r[i] for r in rounds) for i in (0, 1))
        ratio = with_it / without
        print(f"{name}: {ratio:.2f} of the CPU time without the companion ({without / 1e3:.0f} µs)")
        assert ratio < 1.5
