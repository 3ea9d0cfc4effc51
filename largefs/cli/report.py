"""largefs report: how much executable text is on 2 MiB pages, and why the rest is not."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from largefs.cli.arguments import Seconds, json_option
from largefs.cli.output import show, size, width
from largefs.hugetext import coverage, file_report, mappings
from largefs.hugetext.coverage import Process, Report, Text
from largefs.hugetext.file_report import FileReport
from largefs.hugetext.mappings import Mapping

JSON_SCHEMA = "largefs-report-1"

NARROW = 100
"""Columns of a terminal, below which a path has a line for itself."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which processes and which of their mappings a report is about."""

    kind: str  # all, pid, program, library or mountpoint
    target: str
    pids: Callable[[], Iterable[int]]
    wanted: Callable[[Mapping], bool] = lambda mapping: True
    file: FileReport | None = None
    """The program or library itself, where it was named by its path."""


@click.command(short_help="How much text is on 2 MiB pages, and why not more.")
@click.argument("target", required=False, metavar="[PID|PROGRAM|FILE|MOUNTPOINT]")
@json_option
@click.option("--watch", is_flag=True, help="Repeat every --interval seconds, until interrupted.")
@click.option(
    "--interval",
    type=Seconds(0.1),
    default=2.0,
    show_default=True,
    help="Time between two reports of --watch.",
)
def command(target: str | None, as_json: bool, watch: bool, interval: float) -> None:
    """Show how much executable text is on 2 MiB pages, and why the rest is not.

    PID shows one process, mapping by mapping. PROGRAM, the name of an executable, shows its
    processes. FILE, the path of an executable or a shared object, also shows how much of its text
    is eligible, why the rest is not, and what the import changed. MOUNTPOINT shows the programs
    that have mapped files of the filesystem mounted there. Without any of these, all programs of
    the machine are shown. Other users' processes can be read by root only.

    Exit code: 0 if something was found, 1 if nothing was, 2 for a wrong argument. A file is
    something, whether or not anything runs it.
    """
    selection = select(target)
    report = collect(selection)
    ends = selection.kind == "pid"  # what is watched can end
    if not watch or (ends and not report.processes):
        if as_json:
            click.echo(json.dumps(to_json(selection, report), indent=2))
        else:
            show(render(selection, report))
        sys.exit(0 if report.processes or selection.file else 1)
    with suppress(KeyboardInterrupt), _place(as_json=as_json) as write:
        while report.processes or not ends:
            if as_json:
                click.echo(json.dumps(to_json(selection, report)))
            else:
                write(render(selection, report))
            time.sleep(interval)
            report = collect(selection)
    if ends and not report.processes:
        click.echo(f"largefs: process {selection.target} has ended", err=True)


@contextmanager
def _place(*, as_json: bool) -> Iterator[Callable[[RenderableType], None]]:
    """Where the reports of --watch go: each in the place of the last on a terminal, else below it."""
    if as_json or not sys.stdout.isatty():
        yield lambda report: show(Group(report, ""))
        return
    with Live(screen=True, auto_refresh=False) as live:
        yield lambda report: live.update(report, refresh=True)


def select(target: str | None) -> Selection:
    """Decide what TARGET means. Raises click.ClickException."""
    if target is None:
        return Selection("all", "", coverage.pids)
    if target.isdecimal():
        if not os.path.isdir(f"/proc/{target}"):
            raise click.UsageError(f"no process has the PID {target}")
        return Selection("pid", target, lambda: [int(target)])
    # mountinfo is asked, not the filesystem: a mount whose daemon has died answers nothing else.
    place = os.path.abspath(target)
    for mount in reversed(mappings.mounts()):
        if mount.mountpoint in (place, os.path.realpath(place)):
            return Selection("mountpoint", place, coverage.pids, _of_mount(mount))
    if os.path.isdir(target):
        raise click.UsageError(
            f"nothing is mounted on {target}: name a mountpoint, a program or a PID"
        )
    if "/" in target:
        if not os.path.exists(target):
            raise click.UsageError(f"{target}: no such file")
        path = os.path.realpath(target)
        try:
            file = file_report.of_path(path)
        except OSError as e:
            raise click.UsageError(f"{target}: {e.strerror}") from None
        if file.now.kind.startswith("shared object"):
            return Selection(
                "library", path, coverage.pids, lambda mapping: mapping.path == path, file
            )
        return Selection(
            "program", path, lambda: _running(lambda program: program == path), file=file
        )
    return Selection(
        "program", target, lambda: _running(lambda program: os.path.basename(program) == target)
    )


def _of_mount(mount: mappings.Mount) -> Callable[[Mapping], bool]:
    """Whether a mapping is of a file of the mount.

    With passthrough to a store on overlayfs, /proc/PID/maps shows the backing file instead.
    """
    backing = f"{mount.source}/extents/"
    return lambda mapping: mapping.device == mount.device or mapping.path.startswith(backing)


def _running(matches: Callable[[str], bool]) -> list[int]:
    return [pid for pid in coverage.pids() if matches(coverage.program_of(pid))]


def collect(selection: Selection) -> Report:
    """Read the selected processes, but never ourselves unless asked by PID."""
    pids = [pid for pid in selection.pids() if selection.kind == "pid" or pid != os.getpid()]
    return coverage.collect(pids, selection.wanted)


def by_program(processes: Iterable[Process]) -> dict[str, list[Process]]:
    """Processes by the path of their executable, those with most eligible text first."""
    groups: dict[str, list[Process]] = {}
    for process in processes:
        groups.setdefault(process.program, []).append(process)
    return dict(sorted(groups.items(), key=lambda item: -_sum(item[1]).eligible))


def _sum(processes: Iterable[Process]) -> Text:
    return coverage.total(process.text for process in processes)


def render(selection: Selection, report: Report) -> RenderableType:
    """The report for people."""
    about = [] if selection.file is None else [*_file(selection.file), ""]
    if not report.processes:
        return Group(*about, _nothing(selection), *_footnotes(report))
    total = _sum(report.processes)
    if selection.kind == "pid":
        what = "MAPPING"
        mapped = report.processes[0].mapped
        shown = [m for m in mapped if m.text.eligible] or mapped
        rows = [_row(m.text, f"{m.mapping.start:x} {m.mapping.path}") for m in shown]
        if hidden := len(mapped) - len(shown):
            rows.append(_Row(f"(and {hidden} without eligible text)", style="dim"))
    elif selection.kind in ("program", "library"):
        what = "PROCESS"
        rows = [
            _row(process.text, f"{process.pid} {process.program}") for process in report.processes
        ]
    else:
        what = "PROGRAM"
        programs = by_program(report.processes).items()
        sums = [(program, _sum(processes), len(processes)) for program, processes in programs]
        rows = [_row(text, program, count) for program, text, count in sums if text.eligible]
        if others := sum(count for _, text, count in sums if not text.eligible):
            rows.append(_Row("(without eligible text)", count=others, style="dim"))
    rows.append(_row(total, "total", len(report.processes) * (what == "PROGRAM"), style="bold"))
    return Group(*about, _table(what, rows), *_reasons(total), *_footnotes(report))


def _file(file: FileReport) -> list[RenderableType]:
    """A file's own text, before anything runs it."""
    now = file.now
    lines: list[RenderableType] = [f"{_plain(file.path)}: {now.kind}"]
    if now.build_id:
        lines.append(f"  build id {now.build_id}")
    if now.text:
        lines.append(f"  text {size(now.text)}, of which eligible {size(now.eligible)}")
        for why, amount in sorted(now.rest.items(), key=lambda item: -item[1]):
            lines.append(f"  not eligible {size(amount)}: {why}")
    if file.original is None:
        lines.append(f"  as it came; what an import would do: {file.alignment}")
    else:
        lines.append(f"  aligned by the import: {file.alignment}")
        lines.append(f"  eligible before: {size(file.original.eligible)}")
    return lines


NUMBERS = ("TEXT", "ELIGIBLE", "TOUCHED", "ON 2 MiB", "COVERAGE")


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    numbers: tuple[str, ...] = ("",) * len(NUMBERS)
    count: int = 0
    """Processes, where these are counted."""
    style: str | None = None


def _row(text: Text, name: str, count: int = 0, style: str | None = None) -> _Row:
    sizes = (text.length, text.eligible, text.touched, text.pmd_mapped)
    part = "-" if text.coverage is None else f"{text.coverage:.3f}"
    return _Row(_plain(name), (*map(size, sizes), part), count, style)


def _table(what: str, rows: list[_Row]) -> Table:
    """One line a row; where paths would have little room, each stands above its numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    if width() < NARROW:
        table.add_column(f"{what}\n{_aligned(NUMBERS)}", overflow="fold")
        for row in rows:
            count = f" ({row.count} processes)" if row.count > 1 else ""
            numbers = f"\n{_aligned(row.numbers)}" if any(row.numbers) else ""
            table.add_row(f"{row.name}{count}{numbers}", style=row.style)
        return table
    counted = any(row.count for row in rows)
    for name in (*["PROCESSES"] * counted, *NUMBERS):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(what, overflow="fold")
    for row in rows:
        table.add_row(*[str(row.count)] * counted, *row.numbers, row.name, style=row.style)
    return table


def _aligned(numbers: Iterable[str]) -> str:
    return " ".join(f"{number:>9}" for number in numbers)


def _plain(name: str) -> str:
    """A file's or a process's name as rich can print it: names may hold any bytes, and rich takes
    [words] for markup.
    """
    return escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in name))


def _nothing(selection: Selection) -> str:
    return {
        "all": "no executable mapping could be read",
        "pid": f"process {selection.target} maps no executable file, or may not be read",
        "program": f"no running process of {_plain(selection.target)} was found",
        "library": f"no process has mapped {_plain(selection.target)}",
        "mountpoint": f"no process has mapped a program or library of {_plain(selection.target)}",
    }[selection.kind]


def _reasons(total: Text) -> list[RenderableType]:
    if not total.why:
        return []
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("NOT ON 2 MiB", justify="right", no_wrap=True)
    table.add_column("WHY", overflow="fold")
    table.add_column("WHAT TO DO", overflow="fold")
    for reason, amount in sorted(total.why.items(), key=lambda item: -item[1]):
        table.add_row(size(amount), reason.meaning, reason.remedy)
    untouched = total.eligible - total.touched
    if untouched:
        table.add_row(size(untouched), "eligible, but not touched yet", "nothing")
    return ["", table]


def _footnotes(report: Report) -> list[RenderableType]:
    if not report.skipped:
        return []
    count = len(report.skipped)
    what = "1 process" if count == 1 else f"{count} processes"
    advice = "protected even from root" if os.geteuid() == 0 else "other users': run as root"
    return ["", f"{what} could not be read ({advice})"]


def to_json(selection: Selection, report: Report) -> dict[str, Any]:
    """The report for programs; docs/routes.md documents it."""
    return {
        "schema": JSON_SCHEMA,
        "unit": "bytes",
        "kernel": platform.release(),
        "selection": {"kind": selection.kind, "target": selection.target},
        **({} if selection.file is None else {"file": asdict(selection.file)}),
        "total": _text_json(_sum(report.processes)),
        "programs": [
            {
                "program": program,
                "processes": [process.pid for process in processes],
                **_text_json(_sum(processes)),
            }
            for program, processes in by_program(report.processes).items()
        ],
        "processes": [
            {
                "pid": process.pid,
                "program": process.program,
                **_text_json(process.text),
                "mappings": [
                    {
                        "start": f"{mapped.mapping.start:x}",
                        "end": f"{mapped.mapping.end:x}",
                        "offset": mapped.mapping.offset,
                        "path": mapped.mapping.path,
                        "deleted": mapped.mapping.deleted,
                        **_text_json(mapped.text),
                    }
                    for mapped in process.mapped
                ],
            }
            for process in report.processes
        ],
        "skipped": [{"pid": skipped.pid, "reason": skipped.reason} for skipped in report.skipped],
    }


def _text_json(text: Text) -> dict[str, Any]:
    return {
        "text": text.length,
        "eligible": text.eligible,
        "touched": text.touched,
        "pmd_mapped": text.pmd_mapped,
        "coverage": text.coverage,
        "why": {reason.label: amount for reason, amount in text.why.items()},
    }
