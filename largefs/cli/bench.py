"""largefs bench: the same work in several directories, by turns, and how they compare."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from largefs.bench import runner, workloads
from largefs.cli.arguments import json_option
from largefs.cli.errors import CANNOT_RUN, die


@click.command(short_help="Measure filesystems side by side.")
@click.argument(
    "directories",
    metavar="DIR...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="MIB",
    help="MiB in the big file.",
)
@click.option(
    "--files",
    type=click.IntRange(min=2),
    default=2000,
    show_default=True,
    help="Small files in a tree.",
)
@click.option(
    "--program",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Program to start (with --version); without it, the biggest of a few known ones.",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(tuple(workloads.WORKLOADS)),
    help="Only this workload. Can be repeated.",
)
@json_option
def command(
    directories: tuple[Path, ...],
    rounds: int,
    size: int,
    files: int,
    program: Path | None,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure filesystems side by side: the same work in each DIR, as ratios to the first.

    Works in a new directory below each DIR, and removes it. As root it drops the machine's caches.

    Exit code: 0 when everything was measured, 2 when not.
    """
    names = list(only) or list(workloads.WORKLOADS)
    console = Console(stderr=True)
    try:
        chosen = (program or workloads.default_program()).resolve()
        settings = runner.settings_for(size << 20, files, chosen)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar:
            total = runner.steps(len(directories), rounds, len(names))
            task = bar.add_task("", total=total, completed=-1)

            def progress(what: str) -> None:
                bar.update(task, advance=1, description=what)

            result = runner.run(list(directories), settings, rounds, names, progress)
    except (runner.CannotRunError, OSError) as error:
        die(str(error), CANNOT_RUN)
    except KeyboardInterrupt:
        die("interrupted; its files are removed", CANNOT_RUN)
    if as_json:
        print(json.dumps({"schema": "largefs-bench-1", **result.as_dict()}, indent=2))
    else:
        _print(result, rounds)


def _print(result: runner.Result, rounds: int) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("")
    for index, (path, kind) in enumerate(zip(result.directories, result.filesystems, strict=True)):
        table.add_column(f"{path}\n{kind}", justify="right", overflow="fold")
        if index:
            table.add_column("as fast\nmedian (range)", justify="right")
    for name in result.values:
        row = [name, workloads.METRICS[name].unit]
        for index in range(len(result.directories)):
            row.append(_number(result.median(name, index)))
            if index:
                ratios = result.ratios(name, index)
                spread = f" ({_ratio(min(ratios))}-{_ratio(max(ratios))})" if rounds > 1 else ""
                row.append(f"{_ratio(statistics.median(ratios))}{spread}")
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:  # no line of a report in a file is folded
        console.width = 60 + 60 * len(result.directories)
    console.print(table)
    settings = result.settings
    print(
        f"medians of {rounds} rounds; {settings.size >> 20} MiB, {settings.files} files, "
        f"{settings.program.name} of {settings.program.stat().st_size >> 20} MiB"
    )
    if not settings.can_drop:
        print("not root: only file data was dropped from the cache, so 'cold' is lukewarm")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
