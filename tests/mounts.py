"""Real mounts for tests: made by the command, always taken away, and looked at when the test ends.

A test asks for the fixture `mounts` (tests/conftest.py), and gets mounts from `mounts.make(...)`. When it
ends, whether it passed or not, everything is unmounted. If it passed, the log of each mount must hold no
warning and no error that the test did not name in `expected`, and `largefs check --data` must find each
store clean.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from largefs.store import owner

LARGEFS = str(Path(sys.executable).with_name("largefs"))
"""The command of the environment that runs the tests."""

CLOSED = ["extents", "meta.db", "meta.db-wal", "owner.new"]
"""What is in a store that nobody has open."""


def largefs(*args: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run a command; it must end with the exit code `code` (None: any)."""
    return _run([LARGEFS], args, code)


def _run(
    program: list[str], args: Sequence[object], code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*program, *map(str, args)], capture_output=True, text=True, timeout=120, check=False
    )
    if code is not None:
        said = f"largefs {' '.join(map(str, args))}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode == code, said
    return done


def reason_not_to_mount() -> str:
    """Why this machine cannot mount, or nothing."""
    if os.geteuid():
        return "only root can mount here"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse"
    return ""


@dataclass
class Mount:
    """A store, and where it is mounted or was."""

    store: Path
    path: Path
    """The mountpoint."""
    log: Path
    expected: list[str] = field(default_factory=list)
    """Regular expressions of the warnings and errors that the test is about."""
    patch: str = ""
    """Python that the daemon runs before it mounts, to break or delay something in it."""
    clean: bool = True
    """Whether `largefs check --data` must find the store clean at the end."""
    pid: int = 0
    """The daemon's, while it is known to run."""

    def mount(self, *options: str) -> None:
        """Mount, by the command; the log is appended to."""
        arguments = ["mount", self.store, self.path, "-o", ",".join([f"log={self.log}", *options])]
        if self.patch:
            _run(
                [sys.executable, "-c", f"{self.patch}\nfrom largefs.cli import main; main()"],
                arguments,
            )
        else:
            largefs(*arguments)
        holder = owner.read(self.store)
        assert holder is not None, "mounted, and nobody holds the store"
        self.pid = holder.pid

    def unmount(self) -> None:
        """Unmount, by the command, which waits until the store is closed."""
        largefs("umount", self.path)
        self.pid = 0

    def kill(self) -> None:
        """SIGKILL the daemon, if it still runs, and take the dead mount away."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        self.detach()

    def detach(self) -> None:
        """Take away what is mounted, whatever state it is in; returns when the daemon is gone."""
        while is_mounted(self.path):
            if subprocess.run(["umount", "-l", self.path], capture_output=True).returncode:
                break
        if self.pid:
            _wait_for_end(self.pid)
            self.pid = 0

    def wait_for_end(self, patience: float = 10.0) -> None:
        """Wait until the daemon has ended by itself, and unmounted."""
        deadline = time.monotonic() + patience
        while _runs(self.pid):
            assert time.monotonic() < deadline, "the daemon does not end"
            time.sleep(0.01)
        self.pid = 0
        assert not is_mounted(self.path)

    def complaints(self) -> list[str]:
        """The warnings and errors in the log (and whatever follows them) that were not expected."""
        if not self.log.exists():
            return []
        lines = [s for s in self.log.read_text().splitlines() if s.strip()]
        bad = [s for s in lines if not re.match(r"\S+ largefs\[\d+\]: (INFO|DEBUG): ", s)]
        return [s for s in bad if not any(re.search(e, s) for e in self.expected)]


class Mounts:
    """The mounts of one test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.all: list[Mount] = []

    def make(self, *options: str, store: Path | None = None, patch: str = "") -> Mount:
        """Mount `store` (one that is made for the purpose by default) at a new mountpoint."""
        number = len(self.all)
        path = self._directory / f"mnt{number}"
        path.mkdir()
        if store is None:
            store = self._directory / f"store{number}"
            largefs("mkfs", store)
        mount = Mount(store, path, self._directory / f"log{number}", patch=patch)
        self.all.append(mount)
        mount.mount(*options)
        return mount

    def tear_down(self) -> None:
        """Take all mounts away, killing a daemon that does not end."""
        for mount in reversed(self.all):
            mount.detach()

    def verify(self) -> None:
        """Unmount what is mounted; see that the logs are silent and the stores clean."""
        for mount in self.all:
            if mount.pid:
                mount.unmount()
        for mount in self.all:
            assert not mount.complaints(), "\n".join([f"{mount.log}:", *mount.complaints()])
            if mount.clean and mount.store.exists():
                largefs("check", mount.store, "--data")


def is_mounted(path: Path) -> bool:
    """Whether anything is mounted here, be its daemon alive or gone."""
    with open("/proc/self/mountinfo") as mounts:
        return any(line.split()[4] == str(path) for line in mounts)


def _wait_for_end(pid: int, patience: float = 10.0) -> None:
    """Wait until the process is gone; kill it if it does not go by itself."""
    deadline = time.monotonic() + patience
    while _runs(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline += patience
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether the process exists and is no zombie (in a container nobody may reap it)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
