"""Rounds of workloads over several directories, by turns, and what they come to."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from largefs.bench.workloads import (
    METRICS,
    WORKLOADS,
    Settings,
    Site,
    can_drop_caches,
    prepare,
    space_needed,
)

_MARGIN = 256 << 20  # bytes that stay free on every filesystem
_PREFIX = "largefs-bench-"
_T = TypeVar("_T")


class CannotRunError(Exception):
    """The measurement cannot be made; the message says what to do."""


@dataclass
class Result:
    """``values[metric][directory]`` has a value for each round."""

    directories: list[Path]
    filesystems: list[str]
    settings: Settings
    values: dict[str, list[list[float]]] = field(default_factory=dict)

    def median(self, metric: str, index: int) -> float:
        """Median over the rounds."""
        return statistics.median(self.values[metric][index])

    def ratios(self, metric: str, index: int) -> list[float]:
        """For each round, how many times as fast as the first directory; above 1 is faster."""
        pairs = zip(self.values[metric][0], self.values[metric][index], strict=True)
        if METRICS[metric].is_time:
            return [first / value for first, value in pairs]
        return [value / first for first, value in pairs]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        settings = self.settings
        return {
            "kernel": f"{platform.release()} {platform.machine()}",
            "processors": os.cpu_count(),
            "size_bytes": settings.size,
            "files": settings.files,
            "program": str(settings.program),
            "caches_dropped": settings.can_drop,
            "directories": [
                {"path": str(path), "filesystem": kind}
                for path, kind in zip(self.directories, self.filesystems, strict=True)
            ],
            "metrics": {
                name: {
                    "unit": METRICS[name].unit,
                    "what": METRICS[name].what,
                    "median": [self.median(name, i) for i in range(len(self.directories))],
                    "ratio": [
                        statistics.median(self.ratios(name, i))
                        for i in range(len(self.directories))
                    ],
                    "rounds": rounds,
                }
                for name, rounds in self.values.items()
            },
        }


def filesystem_of(directory: Path) -> str:
    """The type of the filesystem that a directory is on, by /proc/self/mountinfo."""
    device = directory.stat().st_dev
    kind = "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        if head.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            kind = tail.split()[0]
    return kind


def check_space(directories: list[Path], settings: Settings) -> None:
    """Raise CannotRunError where the work could fill a disk (all may be on the same one)."""
    needed = len(directories) * space_needed(settings) + _MARGIN
    for directory in directories:
        space = os.statvfs(directory)
        free = space.f_bavail * space.f_frsize
        if free < needed:
            raise CannotRunError(
                f"{directory}: {free >> 20} MiB are free and {needed >> 20} MiB needed; "
                "lower --size or --files"
            )
        if space.f_files and space.f_favail < len(directories) * 4 * settings.files:
            raise CannotRunError(f"{directory}: too few free inodes; lower --files")


@contextmanager
def _site(directory: Path, settings: Settings) -> Iterator[Site]:
    try:
        root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
    except OSError as error:
        raise CannotRunError(f"{directory}: {error.strerror}") from error
    try:
        yield Site(root, settings)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def run(
    directories: list[Path],
    settings: Settings,
    rounds: int,
    workloads: list[str],
    progress: Callable[[str], None],
) -> Result:
    """Measure; ``progress`` is told each of the ``steps``. Raises CannotRunError."""
    try:
        check_space(directories, settings)
        kinds = [filesystem_of(directory) for directory in directories]
    except OSError as error:
        raise CannotRunError(f"{error.filename}: {error.strerror}") from error
    result = Result(directories, kinds, settings)
    with ExitStack() as stack:
        sites = [stack.enter_context(_site(directory, settings)) for directory in directories]
        for site in sites:
            progress(f"preparing {site.root.parent}")
            _guarded(prepare, site)
        for turn in range(rounds):
            for name in workloads:
                # who begins changes with each round, so that nobody always follows the same one
                for index in _rotated(len(sites), turn):
                    progress(f"round {turn + 1}: {name} in {directories[index]}")
                    values = _guarded(WORKLOADS[name], sites[index])
                    for metric, value in values.items():
                        columns = result.values.setdefault(metric, [[] for _ in sites])
                        columns[index].append(value)
    return result


def steps(directories: int, rounds: int, workloads: int) -> int:
    """How often ``run`` reports progress."""
    return directories * (1 + rounds * workloads)


def _rotated(count: int, turn: int) -> list[int]:
    return [(i + turn) % count for i in range(count)]


def _guarded(function: Callable[[Site], _T], site: Site) -> _T:
    try:
        return function(site)
    except OSError as error:
        raise CannotRunError(
            f"{site.root.parent}: {error.strerror or error}"
            + (f" ({error.filename})" if error.filename else "")
        ) from error


def settings_for(size: int, files: int, program: Path) -> Settings:
    """Settings, with what this process may do on this machine."""
    return Settings(size, files, program, can_drop_caches())
