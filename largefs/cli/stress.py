"""largefs stress: does truncate, mmap and huge pages get on with each other on this filesystem?"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from largefs.cli.arguments import PATH, Seconds, json_option
from largefs.cli.errors import CANNOT_RUN, die
from largefs.stress import generator, runner
from largefs.stress.session import CannotRunError

_SHOWN = 30  # operations of a replay that are also printed


@click.command(short_help="Torture truncate, mmap and huge pages.")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--seed", type=int, help="Seed of the operations; without it, a new one each time.")
@click.option(
    "--seconds",
    type=Seconds(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="How long.",
)
@click.option(
    "--mode",
    type=click.Choice(runner.MODES),
    default="all",
    show_default=True,
    help="Operations with an exact model, races on a file, races around programs, or all by turns.",
)
@click.option("--ops", type=click.IntRange(min=1), help="How many operations, instead of how long.")
@click.option("--replay", type=PATH, help="Do again what FILE holds.")
@click.option(
    "--save",
    type=PATH,
    default=Path(),
    show_default=True,
    help="File or directory for the replay file of a difference.",
)
@click.option("--files", type=click.IntRange(1, 16), default=3, show_default=True)
@click.option(
    "--workers", type=click.IntRange(1, 8), default=2, show_default=True, help="Processes."
)
@click.option(
    "--max-size",
    type=click.IntRange(3, 64),
    default=9,
    show_default=True,
    metavar="MIB",
    help="Most MiB in a file.",
)
@click.option(
    "--race",
    "race_seconds",
    type=Seconds(min=0),
    default=2.0,
    show_default=True,
    help="How long each race lasts, after each 5000 operations; 0: no races.",
)
@click.option(
    "--tails",
    is_flag=True,
    help="Also store behind the end of files through mappings; many filesystems fail this.",
)
@click.option(
    "--skip",
    multiple=True,
    type=click.Choice(generator.choices()),
    metavar="NAME",
    help="Leave an operation out, to get past a known difference. Can be repeated.",
)
@click.option(
    "--shrink",
    "shrink_seconds",
    type=Seconds(min=0),
    default=60.0,
    show_default=True,
    help="How long to shorten the replay file of a difference.",
)
@click.option(
    "--timeout",
    type=Seconds(min=1),
    default=120.0,
    show_default=True,
    help="After how long an operation hangs.",
)
@click.option("--log", type=PATH, help="Write every operation to FILE.")
@json_option
def command(
    directory: Path,
    seed: int | None,
    seconds: float,
    mode: str,
    ops: int | None,
    replay: Path | None,
    save: Path,
    files: int,
    workers: int,
    max_size: int,
    race_seconds: float,
    tails: bool,
    skip: tuple[str, ...],
    shrink_seconds: float,
    timeout: float,
    log: Path | None,
    as_json: bool,
) -> None:
    """Torture truncate, mmap, hole punching and huge pages in DIR, on any filesystem.

    Every byte, every size and every SIGBUS is compared with an exact model.

    Exit code: 0 when nothing was wrong, 1 when a difference was found, 2 when it could not run.
    """
    if ops is not None and mode in runner.RACES:
        raise click.UsageError("--ops counts operations, and a race has none: use --seconds")
    plan = runner.Plan(
        directory=directory,
        seed=int(time.time()) if seed is None else seed,
        seconds=seconds,
        mode=mode,
        operations=ops,
        files=files,
        workers=workers,
        max_size=max_size << 20,
        timeout=timeout,
        race_seconds=race_seconds,
        shrink_seconds=shrink_seconds,
        skip=frozenset(skip) | (frozenset() if tails else {"tail"}),
        save_to=save,
        log=log,
    )

    terminal = sys.stderr.isatty()

    def progress(what: str) -> None:
        if terminal:
            print(f"\rseed {plan.seed}: {what}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        if replay:
            result = runner.replay(plan, replay)
        else:
            result = runner.run(plan, progress)
            if terminal:
                print("\r\x1b[K", end="", file=sys.stderr)
    except CannotRunError as error:
        die(str(error), CANNOT_RUN)
    except KeyboardInterrupt:
        die("interrupted; its files are removed", CANNOT_RUN)
    if as_json:
        print(json.dumps({"schema": "largefs-stress-1", **result.as_dict()}, indent=2))
    else:
        _print(result, directory)
    sys.exit(1 if result.difference else 0)


def _print(result: runner.Result, directory: Path) -> None:
    where = result.environment
    print(
        f"seed {result.seed}, Linux {where['kernel']}, {where['filesystem']} ({where['options']}):"
    )
    if result.busy_seconds:
        rate = result.operations / result.busy_seconds
        print(
            f"{result.operations:,} operations in {result.seconds:.1f} s "
            f"({rate:,.0f} a second, races left out), {result.tally.bytes_compared / 1e9:.1f} GB compared"
        )
    else:
        print(f"races for {result.seconds:.1f} s")
    table = Table("operation", "done", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, count in sorted(result.tally.operations.items()):
        table.add_row(name, f"{count:,}")
    Console(highlight=False).print(table)
    tally = result.tally
    if tally.errors:
        seen = ", ".join(f"{name} ({n})" for name, n in sorted(tally.errors.items()))
        print(f"errors, all of them allowed: {seen}")
    if tally.unsupported:
        absent = ", ".join(f"{name} ({why})" for name, why in sorted(tally.unsupported.items()))
        print(f"not tested, the filesystem lacks it: {absent}")
    if tally.pmd_hits:
        most = f", up to {tally.pmd_most >> 20} MiB in one process" if tally.pmd_most else ""
        print(f"PMD-mapped in {tally.pmd_hits:,} of {tally.pmd_samples:,} looks{most}")
    else:
        print(
            "PMD-mapped: NEVER SEEN. No huge page was tested: this run proves nothing about them."
        )
    if tally.pmd_taken:
        print("2 MiB pages taken from mappings by")
        for name, count in sorted(tally.pmd_taken.items()):
            print(f"  {name} {count:,}")
    for note in result.notes:
        print(f"note: {note}")
    if result.difference:
        print(f"DIFFERENCE at operation {result.difference.operation}: {result.difference}")
        for line in result.sequence[-_SHOWN:]:
            print(f"  {line}")
        if len(result.sequence) > _SHOWN:
            print(f"  (the last {_SHOWN} of {len(result.sequence)} operations)")
        if result.replay:
            print(f"replay: largefs stress {directory} --replay {result.replay}")
    else:
        print("no difference")
