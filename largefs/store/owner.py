"""Who holds a store: the file `STORE/owner`, for messages and against two hosts on a shared disk.

On one host SQLite's exclusive lock on `meta.db` keeps a second daemon out. Between hosts a lock may not
travel (a shared disk, some network filesystems), so the holder also refreshes the mtime of `owner`
every HEARTBEAT seconds. A store whose owner is another host is taken over only after it was seen
silent for longer than that: the rule of ext4's multiple mount protection (fs/ext4/mmp.c).
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

HEARTBEAT = 5.0
"""Seconds between two refreshes of the owner file's mtime."""

SILENCE = 2.5 * HEARTBEAT
"""Seconds without a refresh after which another host's owner counts as dead."""

SPARE = "owner.new"
"""The record that comes next, and the last one while nobody holds the store."""


@dataclass(frozen=True)
class Owner:
    """A process that holds a store."""

    host: str
    """Host name, for messages."""
    machine: str
    """/etc/machine-id (machine-id(5)), or the host name where there is none."""
    boot: str
    """/proc/sys/kernel/random/boot_id: changes at every boot."""
    pid: int
    purpose: str
    """What it does with the store: 'mounted at /mnt', 'import'."""

    def __str__(self) -> str:
        here = self.boot == _read("/proc/sys/kernel/random/boot_id")
        return f"{self.purpose} (pid {self.pid}{'' if here else ' on host ' + self.host})"


def current(purpose: str) -> Owner:
    """Describe this process as an owner."""
    host = socket.gethostname()
    return Owner(
        host=host,
        machine=_read("/etc/machine-id") or host,
        boot=_read("/proc/sys/kernel/random/boot_id"),
        pid=os.getpid(),
        purpose=purpose,
    )


def read(store: Path) -> Owner | None:
    """Return the recorded owner; None where none is recorded or the record is unreadable."""
    try:
        return Owner(**json.loads((store / "owner").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def foreign_and_alive(store: Path) -> Owner | None:
    """Return the owner if it is another running host; may sleep up to SILENCE seconds to find out."""
    owner = read(store)
    me = current("")
    if owner is None or owner.machine == me.machine:
        return None
    path = store / "owner"
    try:
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT / 20)
            if path.stat().st_mtime_ns != before:
                return owner
    except OSError:
        return None  # it went away while we looked
    return None


def write(store: Path, owner: Owner) -> None:
    """Record the owner; replaces what was there. Raises OSError, with the name.

    The file of the record before is written again: a full disk has no room for another.
    """
    spare = store / SPARE
    try:
        if not spare.exists():
            with contextlib.suppress(FileNotFoundError):
                (store / "owner").rename(spare)
        with open(os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "w") as f:
            f.write(json.dumps(asdict(owner)) + "\n")
            f.truncate()
        spare.rename(store / "owner")
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(store / "owner")) from e


class Holder:
    """The record that this process holds a store, kept fresh by a thread until `release`."""

    def __init__(self, store: Path, purpose: str) -> None:
        self._store = store
        self._owner = current(purpose)
        self._released = threading.Event()
        write(store, self._owner)
        self._thread = threading.Thread(target=self._beat, name="largefs-owner", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            try:
                os.utime(self._store / "owner")
            except OSError as e:
                log.error("%s: the owner file cannot be refreshed: %s", self._store, e)

    def release(self) -> None:
        """Forget the record, while the store is still locked: later it may be another's; raises OSError."""
        self._released.set()
        self._thread.join()
        if read(self._store) == self._owner:
            (self._store / "owner").rename(self._store / SPARE)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
