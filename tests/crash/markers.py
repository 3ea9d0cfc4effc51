"""Writers that note what they were promised, and the reader that holds the filesystem to it.

    python -m tests.crash.markers DIRECTORY PROMISES

is one writer. It writes in DIRECTORY until it is killed, by the patterns that real programs use, and
appends a line to PROMISES after each fsync that returned. What each file holds follows from the number
in its promise.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path


def content(number: int) -> bytes:
    """What the file of a number holds: up to 3 MiB, so that some are longer than an extent."""
    rng = random.Random(number)
    length = rng.choice([1, 100, 4096, 70_000, 200_000, 3 << 20])
    return rng.randbytes(min(length, 65536)) * (length // 65536 + 1)


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a file and fsync it, in one descriptor."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """fsync a directory: its names are promised."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(directory: Path, promises: Path) -> None:
    """Go on until killed."""
    directory.mkdir(exist_ok=True)
    with promises.open("ab", buffering=0) as p:
        number = 0
        while True:
            number += 1
            new = directory / f"new{number % 50}"
            write_and_sync(new, content(number))
            p.write(b"new %d\n" % number)

            # Without fsync of the file: the filesystem itself must not let an empty one replace it.
            (directory / "config.tmp").write_bytes(content(number))
            (directory / "config.tmp").rename(directory / "config")
            p.write(b"config %d\n" % number)
            if number % 3 == 0:
                sync_directory(directory)
                p.write(b"config-synced %d\n" % number)

            log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(log, b"%08d\n" % number)
            if number % 2 == 0:
                os.fsync(log)
                p.write(b"log %d\n" % number)
            os.close(log)

            sub = directory / f"dir{number % 7}"
            if sub.exists():
                (sub / "moved").unlink()
                sub.rmdir()
            else:
                sub.mkdir()
                os.link(new, sub / "moved")


def verify(directory: Path, promises: Path) -> None:
    """Everything that was promised is there; what was on its way is old or new, and nothing else."""
    last: dict[str, int] = {}
    new: dict[int, int] = {}
    for line in promises.read_text().splitlines():
        what, number = line.split()
        last[what] = int(number)
        if what == "new":
            new[int(number) % 50] = int(number)
    reached = last["new"] + 1  # the writer may have been at work on it
    for slot, number in new.items():
        if slot == reached % 50:
            continue  # being truncated and written again when the daemon died
        assert (directory / f"new{slot}").read_bytes() == content(number), f"new{slot}: {number}"
    _verify_config(directory / "config", last, reached)
    _verify_log(directory / "log", last, reached)


def _verify_config(config: Path, last: dict[str, int], reached: int) -> None:
    """The name that is always renamed over: whole, and not older than what was promised."""
    if not config.exists():
        assert "config-synced" not in last
        return
    data = config.read_bytes()
    assert data, "renamed over by an empty file"
    candidates = range(last.get("config-synced", 1), reached + 1)
    assert any(data == content(n) for n in candidates), "neither old nor new"


def _verify_log(log: Path, last: dict[str, int], reached: int) -> None:
    """The file that is only appended to: all lines up to the promised one, none torn before it."""
    synced = last.get("log", 0)
    data = log.read_bytes() if log.exists() else b""
    assert data[: 9 * synced] == b"".join(b"%08d\n" % n for n in range(1, synced + 1))
    assert len(data) <= 9 * reached


class Writers:
    """Several writers in one mount, as processes of their own."""

    def __init__(self, mountpoint: Path, notes: Path, number: int = 2) -> None:
        self._pairs = [(mountpoint / f"w{i}", notes / f"promises{i}") for i in range(number)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Writers":
        for directory, promises in self._pairs:
            promises.touch()
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.crash.markers", directory, promises],
                    cwd=Path(__file__).parents[2],
                    stderr=subprocess.DEVNULL,
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def wait_for(self, number: int) -> None:
        """Wait until each writer has been promised so much."""
        deadline = time.monotonic() + 60
        while any(len(p.read_bytes().splitlines()) < number for _, p in self._pairs):
            assert time.monotonic() < deadline, "the writers do not get on"
            time.sleep(0.01)

    def verify(self) -> None:
        """Hold the filesystem to all it promised."""
        for directory, promises in self._pairs:
            verify(directory, promises)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
