"""What is measured in one directory.

A workload is a function that works in a prepared ``Site`` and gives the value of one or more
metrics. Every timed part does real work of fixed size; what is prepared or dropped from the cache
for it is not timed.
"""

from __future__ import annotations

import io
import mmap
import os
import random
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PAGE = 4096
_CHUNK = 1 << 20  # bytes in one read or write of a stream
_SMALL = 2048  # bytes in a small file
_PER_DIRECTORY = 100  # small files in one directory
_RANDOM_READS = 1000
_APPENDS = 50
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Settings:
    """The amount of work: bytes of the big file, number of small files, the program to start."""

    size: int
    files: int
    program: Path
    can_drop: bool


@dataclass(frozen=True)
class Site:
    """A directory that one filesystem gave us, prepared."""

    root: Path
    settings: Settings

    @property
    def tree(self) -> Path:
        """Small files, never changed."""
        return self.root / "tree"

    @property
    def big(self) -> Path:
        """One file of ``size`` bytes, never changed."""
        return self.root / "big"

    @property
    def program(self) -> Path:
        """A copy of the program."""
        return self.root / "program"


@dataclass(frozen=True)
class Metric:
    """What a value means; for a unit of time less is better, for a rate more."""

    name: str
    unit: str
    what: str

    @property
    def is_time(self) -> bool:
        """Whether less is better."""
        return self.unit == "ms"


_METRICS = (
    Metric("walk cold", "entries/s", "scandir and lstat of all small files, caches dropped"),
    Metric("walk warm", "entries/s", "the same at once again"),
    Metric("write", "MB/s", "a new file in pieces of 1 MiB, with fsync"),
    Metric("read cold", "MB/s", "the big file in pieces of 1 MiB, caches dropped"),
    Metric("read warm", "MB/s", "the same at once again"),
    Metric("random read cold", "reads/s", "4 KiB at random places of the big file, caches dropped"),
    Metric("create", "files/s", "small files, opened, written, closed"),
    Metric("read small", "files/s", "the same files opened, read, closed, caches dropped"),
    Metric("delete", "files/s", "the same files unlinked"),
    Metric("start cold", "ms", "the program with --version, its file not in the cache"),
    Metric("start warm", "ms", "the same at once again"),
    Metric("fault cold", "pages/s", "each page of a new mapping of the big file, caches dropped"),
    Metric("fault warm", "pages/s", "each page of another new mapping"),
    Metric("append", "appends/s", "4 KiB at the end of a file, with fsync each time"),
    Metric("untar", "files/s", "tar extracts an archive of small files"),
    Metric("status", "files/s", "each extracted file opened, read and compared, as git does"),
    Metric("remove", "files/s", "the extracted tree removed"),
)
METRICS = {metric.name: metric for metric in _METRICS}

Values = dict[str, float]


def small_content(number: int) -> bytes:
    """What the small file of a number holds."""
    return number.to_bytes(8, "little") * (_SMALL // 8)


def small_path(root: Path, number: int) -> Path:
    """Where it is."""
    return root / f"d{number // _PER_DIRECTORY:04}" / f"f{number:06}"


def space_needed(settings: Settings) -> int:
    """Bytes that a site takes at most, a small file counted as two blocks."""
    return 2 * settings.size + settings.program.stat().st_size + 4 * settings.files * 2 * _PAGE


def prepare(site: Site) -> None:
    """Make what the workloads only read."""
    _make_small_files(site.tree, site.settings.files)
    _write_big(site.big, site.settings.size)
    shutil.copyfile(site.settings.program, site.program)
    site.program.chmod(0o755)
    _flush(site.program)


def drop_caches(settings: Settings, *paths: Path) -> None:
    """Forget what is cached: all of it as root, else the data of ``paths``."""
    if settings.can_drop:
        os.sync()
        _DROP_CACHES.write_text("3")
        return
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def can_drop_caches() -> bool:
    """Whether the machine's caches may be dropped."""
    return os.access(_DROP_CACHES, os.W_OK)


@contextmanager
def _timed(values: Values, name: str, amount: float) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds = max(time.perf_counter() - start, 1e-9)
    values[name] = seconds * 1000 if METRICS[name].is_time else amount / seconds


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_small_files(root: Path, files: int) -> None:
    for number in range(files):
        path = small_path(root, number)
        if number % _PER_DIRECTORY == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(small_content(number))


def _write_big(path: Path, size: int) -> None:
    chunk = random.Random(size).randbytes(_CHUNK)  # noqa: S311
    with path.open("wb", buffering=0) as out:
        for _ in range(size // _CHUNK):
            out.write(chunk)
        os.fsync(out.fileno())


def _read_all(path: Path) -> int:
    done, buffer = 0, bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            done += n
    return done


# -- the workloads


def _walk(root: Path) -> int:
    count, waiting = 0, [os.fspath(root)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                os.lstat(entry.path)
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return count


def walking(site: Site) -> Values:
    """Walk and stat the tree of small files."""
    values: Values = {}
    expected = site.settings.files + -(-site.settings.files // _PER_DIRECTORY)
    drop_caches(site.settings)
    for name in ("walk cold", "walk warm") if site.settings.can_drop else ("walk warm",):
        with _timed(values, name, expected):
            count = _walk(site.tree)
        if count != expected:
            raise OSError(f"{site.tree}: {count} entries where there must be {expected}")
    return values


def streaming(site: Site) -> Values:
    """Write a big file; read one from the disk, and from the cache."""
    values: Values = {}
    size = site.settings.size
    path = site.root / "written"
    with _timed(values, "write", size / 1e6):
        _write_big(path, size)
    path.unlink()
    drop_caches(site.settings, site.big)
    for name in ("read cold", "read warm"):
        with _timed(values, name, size / 1e6):
            done = _read_all(site.big)
        if done != size:
            raise OSError(f"{site.big}: read {done} of {size} bytes")
    return values


def random_reads(site: Site) -> Values:
    """Read single pages here and there."""
    values: Values = {}
    drop_caches(site.settings, site.big)
    rng = random.Random(0)  # noqa: S311
    pages = site.settings.size // _PAGE
    places = [rng.randrange(pages) * _PAGE for _ in range(_RANDOM_READS)]
    fd = os.open(site.big, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        with _timed(values, "random read cold", len(places)):
            for place in places:
                os.pread(fd, _PAGE, place)
    finally:
        os.close(fd)
    return values


def small_files(site: Site) -> Values:
    """Create, read and delete small files."""
    values: Values = {}
    root, files = site.root / "small", site.settings.files // 2
    paths = [small_path(root, number) for number in range(files)]
    for parent in {path.parent for path in paths}:
        parent.mkdir(parents=True)
    with _timed(values, "create", files):
        for number, path in enumerate(paths):
            path.write_bytes(small_content(number))
    drop_caches(site.settings)
    with _timed(values, "read small", files):
        right = all(path.read_bytes() == small_content(n) for n, path in enumerate(paths))
    if not right:
        raise OSError(f"{root}: a small file does not hold what was written")
    with _timed(values, "delete", files):
        for path in paths:
            path.unlink()
    shutil.rmtree(root)
    return values


def _start(program: Path) -> None:
    """Run with --version, silently."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        redirect = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
        argv = [os.fspath(program), "--version"]
        pid = os.posix_spawn(program, argv, os.environ, file_actions=redirect)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(null)
    if code:
        raise OSError(f"{program} --version ended with {code}")


def program_start(site: Site) -> Values:
    """Start a big program."""
    values: Values = {}
    drop_caches(site.settings, site.program)
    if site.settings.can_drop:  # its libraries are on another filesystem: not what is measured
        _start(site.settings.program)
    for name in ("start cold", "start warm"):
        with _timed(values, name, 1):
            _start(site.program)
    return values


def _touch(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        _ = memory[::_PAGE]  # one byte of each page, in C


def faults(site: Site) -> Values:
    """Map the big file and touch each of its pages."""
    values: Values = {}
    drop_caches(site.settings, site.big)
    for name in ("fault cold", "fault warm"):
        with _timed(values, name, site.settings.size // _PAGE):
            _touch(site.big)
    return values


def appends(site: Site) -> Values:
    """Append to a log and make it durable, line by line."""
    values: Values = {}
    path, line = site.root / "log", bytes(_PAGE)
    with path.open("ab", buffering=0) as log, _timed(values, "append", _APPENDS):
        for _ in range(_APPENDS):
            log.write(line)
            os.fsync(log.fileno())
    path.unlink()
    return values


def _archive(files: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number in range(files):
            content = small_content(number)
            member = tarfile.TarInfo(os.fspath(small_path(Path("source"), number)))
            member.size, member.mtime = len(content), 1_700_000_000
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def untar(site: Site) -> Values:
    """Extract a source tree, look at all of it, remove it."""
    values: Values = {}
    files = site.settings.files
    archive = _archive(files)
    with _timed(values, "untar", files):
        subprocess.run(["tar", "-x", "-C", site.root], input=archive, check=True)
    root = site.root / "source"
    with _timed(values, "status", files):
        right = all(
            small_path(root, n).lstat().st_size == _SMALL
            and small_path(root, n).read_bytes() == small_content(n)
            for n in range(files)
        )
    if not right:
        raise OSError(f"{root}: an extracted file does not hold what the archive does")
    with _timed(values, "remove", files):
        shutil.rmtree(root)
    return values


Workload = Callable[[Site], Values]
WORKLOADS: dict[str, Workload] = {
    "walk": walking,
    "stream": streaming,
    "random": random_reads,
    "small": small_files,
    "start": program_start,
    "fault": faults,
    "append": appends,
    "untar": untar,
}


def default_program() -> Path:
    """The biggest of some programs: g++'s compiler, node, gdb, Python."""
    names = [shutil.which(name) for name in ("node", "gdb", "python3")]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["g++", "-print-prog-name=cc1plus"], capture_output=True, text=True, check=True
        )
        names.append(shutil.which(found.stdout.strip()))
    paths = [Path(name).resolve() for name in names if name]
    binaries = [path for path in paths if path.read_bytes()[:4] == b"\x7fELF"]
    if not binaries:
        raise FileNotFoundError("no big program found: name one with --program")
    return max(binaries, key=lambda path: path.stat().st_size)
