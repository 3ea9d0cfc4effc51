"""largefs check: look for damage in a store, and repair it; fsck(8)'s exit codes."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from largefs.cli.arguments import PATH, json_option
from largefs.cli.errors import explained, show
from largefs.cli.output import size
from largefs.cli.progress import line
from largefs.store.check import Problem, Report, check

CORRECTED, LEFT, OPERATIONAL, CANCELLED = 1, 4, 8, 32
"""Exit codes of fsck(8), with 16 for wrong usage; the first two may come together."""


@click.command("check", short_help="Look for damage in a store, and repair it.")
@click.argument("store", type=PATH)
@click.option("--data", is_flag=True, help="Also read all data and compare it with its checksums.")
@click.option("--repair", is_flag=True, help="Mend what can be mended with nothing lost.")
@json_option
def command(store: Path, data: bool, repair: bool, as_json: bool) -> None:
    """Look for damage in STORE, which must not be mounted. Without --repair nothing is changed.

    A store that a crash left is not damaged: the next mount puts it in order.

    --repair deletes no data: what has lost its name comes to /lost+found. Data that is not what was
    recorded is listed with its path and offset, and stays listed until the file is written anew or
    removed (docs/check.md says how to keep it as it is).

    Exit code, as fsck(8), a sum of: 0 clean; 1 problems were mended; 4 problems are left; 8 could
    not be checked (in use, no store); 16 wrong usage; 32 interrupted.
    """
    start = time.monotonic()
    interrupted = "interrupted; nothing that was not finished has been changed"
    with explained(OPERATIONAL, (interrupted, CANCELLED)), line() as moving:

        def progress(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - start, 0.001)
            percent = 100 * done // max(total, 1)
            moving(lambda: f"{percent} % of {size(total)}, {size(rate)}/s")

        report = check(store.absolute(), data=data, repair=repair, progress=progress)
    if as_json:
        print(json.dumps(_as_json(store, report), indent=2))
    else:
        _print(store, report, data=data)
    sys.exit(CORRECTED * bool(report.mended) + LEFT * bool(report.left))


def _print(store: Path, report: Report, *, data: bool) -> None:
    """One line each problem, then what it comes to."""
    for p in report.problems:
        print(f"{_where(p)}{p.text}{' (mended)' if p.mended else ''}")
    for note in report.notes:
        print(f"{store}: {note}")
    looked_at = f"{report.inodes} inodes" + (f", {size(report.checked)} of data" if data else "")
    if not report.problems:
        print(f"{store}: clean: {looked_at}")
    else:
        print(
            f"{store}: {len(report.problems)} problems in {looked_at}: "
            f"{report.mended} mended, {report.left} left"
        )


def _where(p: Problem) -> str:
    if p.path is not None:
        return f"{show(p.path)}: "
    return f"inode {p.inode}: " if p.inode else ""


def _as_json(store: Path, report: Report) -> dict[str, Any]:
    return {
        "schema": "largefs-check-1",
        "store": str(store),
        "clean": not report.left,
        "inodes": report.inodes,
        "bytes": report.checked,
        "problems": [
            {
                "kind": p.kind,
                "inode": p.inode or None,
                "path": None if p.path is None else show(p.path),
                "offset": p.offset,
                "text": p.text,
                "mended": p.mended,
            }
            for p in report.problems
        ],
        "notes": report.notes,
    }
