"""largefs umount: unmount, and wait until the store is closed."""

import os
import select
import subprocess
import sys
from pathlib import Path

import click

from largefs.cli.arguments import PATH
from largefs.cli.errors import FAILED, die
from largefs.hugetext import mappings
from largefs.store import owner

PATIENCE = 60
"""Seconds that the daemon gets to settle and commit after the mount is gone."""


@click.command("umount", short_help="Unmount, and wait until the store is closed.")
@click.argument("mountpoint", type=PATH)
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when nobody uses it any more.")
@click.option(
    "-f", "--force", is_flag=True, help="Cut the daemon off first, if it hangs; for root."
)
def command(mountpoint: Path, lazy: bool, force: bool) -> None:
    """Unmount MOUNTPOINT and wait until its store is closed and can be used again."""
    mountpoint = Path(os.path.realpath(mountpoint))  # as mountinfo has it; follows no dead mount
    store = _store_mounted_at(mountpoint)
    if store is None:
        die(f"{mountpoint}: no largefs is mounted here")
    holder = owner.read(Path(store))
    daemon = _pidfd(holder.pid) if holder else -1
    # -i: without umount.fuse.largefs, which is this very command.
    tool = ["umount", "-i"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    options = (["-l"] if os.geteuid() == 0 else ["-z"]) if lazy else []
    if force:
        if os.geteuid():
            die("only root can unmount by force")
        options.append("-f")
    done = subprocess.run([*tool, *options, str(mountpoint)], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"{mountpoint}: busy"]
        if "busy" not in said[-1]:
            die(said[-1].rstrip("."))
        if not force:
            die(f"{said[-1].rstrip('.')} (fuser -vm {mountpoint} tells by whom)")
        print(
            f"largefs: {mountpoint}: the daemon is cut off, but programs still hold the mount; "
            f"end them, or detach it from them: largefs umount --lazy {mountpoint}",
            file=sys.stderr,
        )
    if daemon >= 0 and not lazy and not select.select([daemon], [], [], PATIENCE)[0]:
        die(
            f"{store}: the daemon still writes after {PATIENCE} s; wait for it before using the store"
        )
    sys.exit(done.returncode and FAILED)


def _store_mounted_at(mountpoint: Path) -> str | None:
    """The source of the last fuse.largefs mount at this path (proc_pid_mountinfo(5))."""
    for mount in reversed(mappings.mounts()):
        if mount.fstype == "fuse.largefs" and mount.mountpoint == str(mountpoint):
            return mount.source
    return None


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
