"""largefs import: bring a directory tree into a store."""

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import click

from largefs.cli.arguments import PATH, json_option
from largefs.cli.errors import die, explained, show
from largefs.cli.output import size
from largefs.cli.progress import line
from largefs.hugetext.align import Mode
from largefs.store import Store
from largefs.transfer.importer import Importer, Tally


@click.command("import", short_help="Bring a directory tree into a store.")
@click.argument("directory", metavar="DIR", type=PATH)
@click.argument("store", type=PATH)
@click.option("--to", default="/", metavar="PATH", help="Directory in the store; made if missing.")
@click.option(
    "--align",
    type=click.Choice([m.value for m in Mode]),
    default=Mode.AUTO.value,
    show_default=True,
    help="What may change in programs so that their text becomes eligible: "
    "offsets and headers, headers only, nothing.",
)
@json_option
def command(directory: Path, store: Path, to: str, align: str, as_json: bool) -> None:
    """Import what DIR holds into STORE, with all its metadata; the store must not be mounted.

    Can be run again: only what is new or changed is copied, and nothing is removed. Files that
    cannot be read, or change meanwhile, are left out and named. An interrupt (or SIGTERM) ends it
    after the file that is being copied, a second one at once; either keeps the store in order.

    Exit code: 0 all imported; 1 something was left out, or the import ended early.
    """
    start = time.monotonic()
    with (
        explained(),
        _stoppable() as look,
        Store.open(store.absolute(), f"import of {directory}") as opened,
        line() as moving,
    ):

        def progress(tally: Tally) -> None:
            look()
            moving(lambda: _progress(tally, start))

        importer = Importer(opened, Mode(align), progress)
        try:
            tally = importer.run(os.fsencode(directory), os.fsencode(to))
        except OSError as e:
            _explain(e, importer.tally, directory)
    _print(tally, time.monotonic() - start, as_json=as_json)
    sys.exit(1 if tally.failed else 0)


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """Give a function that raises KeyboardInterrupt if SIGINT or SIGTERM has come.

    The second one ends the process, as a crash might: the store puts itself in order.
    """
    came = False

    def note(number: int, _: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(number, signal.SIG_DFL)

    def look() -> None:
        if came:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield look
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(tally: Tally, start: float) -> str:
    rate = tally.copied / max(time.monotonic() - start, 0.001)
    return f"{tally.entries} names, {size(tally.copied)}, {size(rate)}/s"


def _explain(e: OSError, tally: Tally, directory: Path) -> None:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        die(
            f"the disk is full after {tally.entries} names; these are complete: "
            "make room and run the same import again"
        )
    if e.filename is None:
        die(f"{directory}: {e.strerror}")
    raise e


def _print(tally: Tally, seconds: float, *, as_json: bool) -> None:
    for path, reason in tally.failed:
        print(f"largefs: {show(path)}: not imported: {reason}", file=sys.stderr)
    if as_json:
        print(
            json.dumps(
                {
                    "schema": "largefs-import-1",
                    "entries": tally.entries,
                    "unchanged": tally.unchanged,
                    "bytes": tally.copied,
                    "seconds": round(seconds, 3),
                    "aligned": [{"path": show(p), "what": w} for p, w in tally.aligned],
                    "failed": [{"path": show(p), "reason": r} for p, r in tally.failed],
                },
                indent=2,
            )
        )
        return
    print(
        f"{tally.entries} names ({tally.unchanged} unchanged), {size(tally.copied)} copied "
        f"in {seconds:.1f} s"
    )
    if tally.failed:
        print(f"{len(tally.failed)} names were left out", file=sys.stderr)
