"""A whole run: sessions of operations and races by turns, until the time is over.

A session starts with new files and new workers and lasts a few thousand operations, with a
comparison of all files after each round; so a failure can be made again, and shrunk, from a list
that is not too long. All files are in one new directory, which is removed at the end, also when the
run is interrupted.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from largefs.stress import checks, program_race, race
from largefs.stress.generator import MODE_NAMES, POOL, Generator
from largefs.stress.replay import Race, Replay, load, save
from largefs.stress.report import Difference
from largefs.stress.session import CannotRunError, Limits, Operation, Session, Tally
from largefs.stress.shrink import shrink
from largefs.stress.syscalls import PAGE, PMD, Arena

_ROUND = 1000  # operations between comparisons of all files
_SESSION = 5 * _ROUND
_RACE_TRIES = 5  # a race is not deterministic: how often a replay tries
RACES = ("race", "programs")
MODES = ("all", "oracle", *RACES)


@dataclass(frozen=True)
class Plan:
    """What the user asked for; with ``operations`` the time does not matter."""

    directory: Path
    seed: int
    seconds: float = 60.0
    mode: str = "all"  # of MODES
    operations: int | None = None
    files: int = 3
    workers: int = 2
    max_size: int = 9 << 20
    timeout: float = 120.0
    race_seconds: float = 2.0  # for each race after each session; 0 for none
    shrink_seconds: float = 60.0
    skip: frozenset[str] = frozenset()
    save_to: Path = Path()
    log: Path | None = None


@dataclass
class Result:
    """What came out; ``replay`` is the file that was saved."""

    seed: int
    environment: dict[str, str]
    tally: Tally
    operations: int = 0
    seconds: float = 0.0  # until the end, or until the difference showed
    busy_seconds: float = 0.0  # in sessions, races left out
    difference: Difference | None = None
    replay: Path | None = None
    sequence: list[str] = field(default_factory=list)  # the operations that show the difference
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "seed": self.seed,
            **self.environment,
            "operations": self.operations,
            "seconds": round(self.seconds, 3),
            "operations_per_second": round(self.operations / max(self.busy_seconds, 1e-9)),
            "counts": dict(self.tally.operations),
            "errors": dict(self.tally.errors),
            "unsupported": self.tally.unsupported,
            "bytes_compared": self.tally.bytes_compared,
            "short_writes": self.tally.short_writes,
            "pmd_mapped": {
                "most_bytes": self.tally.pmd_most,
                "looked": self.tally.pmd_samples,
                "seen": self.tally.pmd_hits,
                "taken": dict(self.tally.pmd_taken),
            },
            "difference": self.difference.as_dict() if self.difference else None,
            "replay": str(self.replay) if self.replay else None,
            "notes": self.notes,
        }


def environment(directory: Path) -> dict[str, str]:
    """What a bug report needs: versions, kernel, filesystem and mount options of a directory."""
    try:
        device = os.stat(directory).st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError as error:
        raise CannotRunError(f"{directory}: {error.strerror}") from error
    mount = {"filesystem": "unknown", "options": ""}
    for line in lines:
        head, _, tail = line.partition(" - ")
        fields, (kind, _, options) = head.split(), tail.split(" ", 2)
        if fields[2] == f"{os.major(device)}:{os.minor(device)}":
            mount = {"filesystem": kind, "options": f"{fields[5]},{options}"}
    return {
        "largefs": importlib.metadata.version("largefs"),
        "python": platform.python_version(),
        "kernel": f"{platform.release()} {platform.machine()}",
        **mount,
    }


def _limits(plan: Plan, where: dict[str, str]) -> Limits:
    # shmem maps whole huge folios on purpose, also where the file ends inside one (mm/memory.c)
    beyond_end = PMD if where["filesystem"] == "tmpfs" else PAGE
    return Limits(plan.files, plan.workers, plan.max_size, plan.timeout, beyond_end)


@contextlib.contextmanager
def _scratch(plan: Plan) -> Iterator[str]:
    """A new directory in DIR, that is gone after."""
    try:
        space = os.statvfs(plan.directory)
        needed = 3 * plan.files * plan.max_size + (64 << 20)
        if space.f_blocks and space.f_bavail * space.f_frsize < needed:
            raise CannotRunError(
                f"{plan.directory}: needs {needed >> 20} MiB free; lower --max-size or --files"
            )
        root = tempfile.mkdtemp(prefix="largefs-stress-", dir=plan.directory)
    except OSError as error:
        raise CannotRunError(f"{plan.directory}: {error.strerror}") from error
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _pool(seed: int) -> Arena:
    return Arena(POOL, random.Random(f"pool {seed}").randbytes(POOL))  # noqa: S311


def run(plan: Plan, progress: Callable[[str], None]) -> Result:
    """Torture the directory; ``progress`` is told how it goes. Raises CannotRunError."""
    where = environment(plan.directory)
    result = Result(plan.seed, where, Tally())
    limits, pool = _limits(plan, where), _pool(plan.seed)
    for name in plan.skip & set(MODE_NAMES):
        result.tally.unsupported[f"fallocate {name}"] = "skipped"
    start = time.monotonic()

    def over() -> bool:
        result.seconds = time.monotonic() - start
        if plan.operations is not None:
            return result.operations >= plan.operations
        return result.seconds >= plan.seconds

    if plan.mode in RACES and not _wants(plan, plan.mode):
        raise CannotRunError("--race 0 and --skip leave nothing of this mode to do")
    with _scratch(plan) as root, _log(plan) as log:
        number = 0
        while result.difference is None and (number == 0 or not over()):
            if plan.mode in ("all", "oracle"):
                _one_session(plan, result, limits, pool, root, number, over, progress, log)
            for kind in RACES:
                if result.difference is None and _wants(plan, kind):
                    progress(_so_far(plan, result) + f", {kind}")
                    _one_race(plan, result, root, kind, f"{plan.seed}-{number}")
                    over()
            number += 1
    pool.close()
    return result


def _wants(plan: Plan, race: str) -> bool:
    return plan.mode in ("all", race) and plan.race_seconds > 0 and race not in plan.skip


@contextlib.contextmanager
def _log(plan: Plan) -> Iterator[Callable[[str], object]]:
    """A function that writes a line to the log, if there is one."""
    if plan.log is None:
        yield lambda _: None
        return
    try:
        out = plan.log.open("w")
    except OSError as error:
        raise CannotRunError(f"{plan.log}: {error.strerror}") from error
    with out:
        yield lambda line: print(line, file=out)


def _one_session(
    plan: Plan,
    result: Result,
    limits: Limits,
    pool: Arena,
    root: str,
    number: int,
    over: Callable[[], bool],
    progress: Callable[[str], None],
    log: Callable[[str], object],
) -> None:
    done: list[Operation] = []
    log(f"session {number}")
    began = time.monotonic()
    with Session(f"{root}/session{number}", pool, limits, result.tally) as session:
        generator = Generator(
            f"{plan.seed}-{number}", session.model, limits, result.tally, set(plan.skip)
        )

        def perform(op: Operation) -> None:
            done.append(op)
            try:
                was_done = checks.perform(session, op)
            except Difference as difference:
                log(f"{op}: {difference}")
                raise
            log(f"{op}" if was_done else f"{op}: left out")

        try:
            for count, op in enumerate(generator, 1):
                perform(op)
                result.operations += 1
                if count % 64 == 0:
                    progress(_so_far(plan, result))
                last = count == _SESSION or over()
                if count % _ROUND == 0 or last:
                    for check in generator.whole():
                        perform(check)
                if last:
                    break
        except Difference as difference:
            result.difference = difference
    result.busy_seconds += time.monotonic() - began
    if result.difference:
        _shrink_and_save(plan, result, limits, pool, root, done, progress)


def _so_far(plan: Plan, result: Result) -> str:
    if plan.operations is not None:
        return f"{result.operations:,} of {plan.operations:,} operations"
    return f"{result.operations:,} operations in {result.seconds:.0f} of {plan.seconds:.0f} s"


def _shrink_and_save(
    plan: Plan,
    result: Result,
    limits: Limits,
    pool: Arena,
    root: str,
    done: list[Operation],
    progress: Callable[[str], None],
) -> None:
    assert result.difference is not None
    kind, tries = result.difference.kind, 0

    def reproduce(operations: list[Operation]) -> Difference | None:
        nonlocal tries
        tries += 1
        progress(f"difference ({kind}): shortening its replay, {len(operations)} operations")
        with contextlib.suppress(CannotRunError):
            return _play(f"{root}/shrink{tries}", pool, limits, operations, Tally())
        return None

    if result.difference.kind == "hang":  # each try would hang too, and may leave a process behind
        result.notes.append("not shortened; a worker may hang until the filesystem answers")
        _save(plan, result, limits, Replay({"shrunk_from": len(done)}, done))
        return
    shorter, shown = shrink(done, result.difference, reproduce, plan.shrink_seconds)
    if shown is None:
        result.notes.append("the same operations did not show it again: it depends on timing")
    else:
        result.difference = shown
    header = {"shrunk_from": len(done), "reproduced": shown is not None}
    _save(plan, result, limits, Replay(header, shorter))


def _save(plan: Plan, result: Result, limits: Limits, replay: Replay) -> None:
    assert result.difference is not None
    replay.header = {
        "seed": result.seed,
        **result.environment,
        "limits": asdict(limits),
        "difference": result.difference.as_dict(),
        **replay.header,
    }
    result.sequence = [str(op) for op in replay.operations]
    result.replay = plan.save_to
    if plan.save_to.is_dir():
        result.replay = plan.save_to / f"largefs-stress-{result.seed}.jsonl"
    try:
        save(result.replay, replay)
    except OSError as error:
        result.notes.append(f"the replay could not be saved: {result.replay}: {error.strerror}")
        result.replay = None


def _play(
    root: str, pool: Arena, limits: Limits, operations: list[Operation], tally: Tally
) -> Difference | None:
    with Session(root, pool, limits, tally) as session:
        try:
            for op in operations:
                checks.perform(session, op)
        except Difference as difference:
            return difference
    return None


def _one_race(plan: Plan, result: Result, root: str, kind: str, seed: str) -> None:
    seconds = plan.race_seconds
    try:
        result.tally.add_race(_race(plan, root, kind, seed, seconds))
    except Difference as difference:
        result.difference = difference
        limits = _limits(plan, result.environment)
        _save(plan, result, limits, Replay({}, [], Race(kind, seed, seconds)))


def _race(plan: Plan, root: str, kind: str, seed: str, seconds: float) -> Counter[str]:
    if kind == "programs":
        return program_race.run(root, seed, seconds, plan.timeout)
    return race.run(root, seed, seconds, plan.timeout, plan.skip)


def replay(plan: Plan, path: Path) -> Result:
    """Do again what a replay file holds. Raises CannotRunError."""
    recorded = load(path)
    where = environment(plan.directory)
    result = Result(recorded.header["seed"], where, Tally())
    try:
        limits = Limits(**recorded.header["limits"])
    except TypeError as error:
        raise CannotRunError(f"{path}: not a replay file of largefs stress") from error
    start = time.monotonic()
    with _scratch(plan) as root:
        if recorded.race:
            again = recorded.race
            for _ in range(_RACE_TRIES):
                try:
                    counts = _race(plan, root, again.kind, again.seed, again.seconds)
                    result.operations += counts.total()
                    result.tally.add_race(counts)
                except Difference as difference:
                    result.difference = difference
                    break
        else:
            pool = _pool(result.seed)
            result.difference = _play(
                f"{root}/replay", pool, limits, recorded.operations, result.tally
            )
            result.operations = len(recorded.operations)
            pool.close()
    result.seconds = result.busy_seconds = time.monotonic() - start
    return result
