"""largefs umount: unmount, and wait until the store is closed."""

import os
import select
import subprocess
from pathlib import Path

import click

from largefs.cli.errors import FAILED, die
from largefs.store import owner

PATIENCE = 60
"""Seconds that the daemon gets to settle and commit after the mount is gone."""


@click.command("umount")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when nobody uses it any more.")
def command(mountpoint: Path, lazy: bool) -> None:
    """Unmount MOUNTPOINT and wait until its store is closed and can be used again."""
    mountpoint = mountpoint.absolute()
    store = _store_mounted_at(mountpoint)
    if store is None:
        die(f"{mountpoint}: no largefs is mounted here")
    holder = owner.read(Path(store))
    daemon = _pidfd(holder.pid) if holder else -1
    tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    options = (["-l"] if os.geteuid() == 0 else ["-z"]) if lazy else []
    done = subprocess.run([*tool, *options, str(mountpoint)], capture_output=True, text=True)
    if done.returncode:
        die(done.stderr.strip().splitlines()[-1] if done.stderr else f"{mountpoint}: busy", FAILED)
    if daemon >= 0 and not lazy and not select.select([daemon], [], [], PATIENCE)[0]:
        die(
            f"{store}: the daemon still writes after {PATIENCE} s; wait for it before using the store"
        )


def _store_mounted_at(mountpoint: Path) -> str | None:
    """The source of the last fuse.largefs mount at this path (proc_pid_mountinfo(5))."""
    found = None
    with open("/proc/self/mountinfo") as mounts:
        for mount in mounts:
            fields, _, tail = mount.partition(" - ")
            kind, source, *_ = tail.split()
            if kind == "fuse.largefs" and _unescape(fields.split()[4]) == str(mountpoint):
                found = _unescape(source)
    return found


def _unescape(field: str) -> str:
    for code in ("040", "011", "012", "134"):
        field = field.replace(f"\\{code}", chr(int(code, 8)))
    return field


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
