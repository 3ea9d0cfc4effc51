"""largefs mount: mount a store; the command that also serves mount(8) as mount.largefs."""

import logging
import logging.handlers
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from largefs.cli.arguments import PATH
from largefs.cli.errors import die
from largefs.store import Store, StoreError
from largefs.store.database import read_format

if TYPE_CHECKING:
    from largefs.filesystem.options import Options

USAGE, SYSTEM, FAILURE = 1, 2, 32
"""Exit codes of mount(8): bad arguments or permissions; system error; mount failure."""

LOG_SIZE = 1 << 20
"""Bytes of STORE/log before it is moved to STORE/log.1, which goes the time after."""

PRIORITY = {logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""syslog(3)'s, for what is more than information (6)."""


@click.command("mount", short_help="Mount a store.")
@click.argument("store", type=PATH)
@click.argument("mountpoint", type=PATH)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground; log to stderr.")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Mount options, by commas.")
@click.option("-s", "--sloppy", is_flag=True, help="Pass over unknown mount options.")
@click.option("-v", "--verbose", is_flag=True, help="Say which route to 2 MiB pages was taken.")
@click.option("--dry-run", is_flag=True, help="Check the arguments; mount nothing.")
def command(
    store: Path,
    mountpoint: Path,
    foreground: bool,
    options: tuple[str, ...],
    sloppy: bool,
    verbose: bool,
    dry_run: bool,
) -> None:
    """Mount STORE at MOUNTPOINT; returns when the mount is usable.

    Exit code, as mount(8): 0 mounted; 1 bad arguments; 2 system error; 32 the mount failed.
    """
    from largefs.filesystem.options import OptionError, parse

    store, mountpoint = store.absolute(), mountpoint.absolute()
    try:
        parsed = parse(",".join(options), sloppy=sloppy)
    except OptionError as e:
        die(str(e), USAGE)
    if dry_run:
        _check(store, mountpoint)
        return
    if parsed.remount:
        sys.exit(_remount(store, mountpoint, parsed))
    report = sys.stderr.fileno()
    if not foreground:
        report = _into_background(verbose=verbose)
    _serve(store, mountpoint, parsed, report, foreground=foreground)


def _serve(
    store: Path, mountpoint: Path, options: "Options", report: int, *, foreground: bool
) -> None:
    """Open, mount, serve, close; the first thing written to `report` tells how it went."""
    from largefs.filesystem.daemon import Mount, MountError, check_mountpoint

    def ready(said: str) -> None:
        nonlocal report
        if foreground:
            if options.log is not None:  # else the log's own line is there to see
                print(f"largefs: mounted at {mountpoint}: {said}", file=sys.stderr)
            _notify_systemd(f"READY=1\nSTATUS={said}")
        else:
            os.write(report, b"+" + os.fsencode(said))
            os.close(report)
            report = -1
            _detach_output()

    try:
        check_mountpoint(mountpoint, store)
        _log_to(options.log, store, foreground=foreground)
        with Store.open(store, f"mounted at {mountpoint}") as opened:
            Mount(opened, mountpoint, options).run(ready)
    except (MountError, StoreError, OSError) as e:
        message = f"{e.filename or store}: {e.strerror}" if isinstance(e, OSError) else str(e)
        if foreground:
            die(message, FAILURE)
        if report >= 0:
            os.write(report, b"-" + os.fsencode(message))
        else:  # the mount had been reported; this is its end
            logging.getLogger(__name__).error("%s", message)
        sys.exit(FAILURE)


def _check(store: Path, mountpoint: Path) -> None:
    """End with an error where a mount would fail for its arguments."""
    from largefs.filesystem.daemon import MountError, check_mountpoint

    try:
        check_mountpoint(mountpoint, store)
        read_format(store / "meta.db")
    except (MountError, StoreError) as e:
        die(str(e), FAILURE)


def _remount(store: Path, mountpoint: Path, options: "Options") -> int:
    """Change what the kernel does by itself: ro, nosuid and the like. Returns mount(8)'s exit code."""
    from largefs.filesystem.options import Options

    asked = ",".join(["remount", *sorted(options.kernel)])
    if options != Options(kernel=options.kernel, remount=True):
        print(
            f"largefs: {mountpoint}: a remount changes ro, rw, nosuid and the like; "
            "for other options unmount and mount",
            file=sys.stderr,
        )
    mount = ["mount", "-i", "-t", "fuse.largefs", "-o", asked, str(store), str(mountpoint)]
    return subprocess.run(mount).returncode


def _into_background(*, verbose: bool) -> int:
    """Fork; the child goes on with a pipe to report on, the parent waits for it and ends."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # what a script left open is not ours to hold
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        if said[:1] == b"+":
            text = os.fsdecode(said[1:])
            if verbose or text.startswith("text in 4 KiB pages"):
                print(f"largefs: {text}", file=sys.stderr)
            os._exit(0)
        if said[:1] == b"-":
            die(os.fsdecode(said[1:]), FAILURE)
        die("the daemon ended before the mount was usable; try again with -f to see why", SYSTEM)
    os.close(reading)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return writing


def _detach_output() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


def _log_to(file: Path | None, store: Path, *, foreground: bool) -> None:
    """Where messages go: a file that is named; stderr in the foreground; the system log; STORE/log."""
    handler: logging.Handler
    form = "largefs[%(process)d]: %(levelname)s: %(message)s"
    if file is not None:
        handler = logging.FileHandler(file)
    elif foreground:
        handler = logging.StreamHandler()
        if _is_the_journal(sys.stderr.fileno()):
            form = "<%(priority)d>%(message)s"  # sd-daemon(3); the journal adds who and when
    elif Path("/dev/log").exists():
        handler = logging.handlers.SysLogHandler("/dev/log", "daemon")
    else:
        handler = logging.handlers.RotatingFileHandler(
            store / "log", maxBytes=LOG_SIZE, backupCount=1, delay=True
        )
    if isinstance(handler, logging.FileHandler):
        form = f"%(asctime)s {form}"
    handler.addFilter(_printable)
    handler.setFormatter(logging.Formatter(form, "%Y-%m-%dT%H:%M:%S%z"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)


def _is_the_journal(fd: int) -> bool:
    """Whether systemd takes to its journal what is written there (JOURNAL_STREAM in systemd.exec(5))."""
    st = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{st.st_dev}:{st.st_ino}"


def _printable(record: logging.LogRecord) -> bool:
    """Escape what is not text in a message, as in a path: else no handler could write it.

    And give the record its `priority`, one of syslog(3).
    """
    record.msg = record.getMessage().encode(errors="backslashreplace").decode()
    record.args = ()
    record.priority = PRIORITY.get(record.levelno, 6)
    return True


def _notify_systemd(state: str) -> None:
    """Tell systemd that the unit is up, by sd_notify(3)'s protocol."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.connect(address)
        s.sendall(os.fsencode(state))
