"""`lab test`: the kernel suite in each kernel's guest, and the table of what came of it."""

import os
import shlex
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from labkit import console
from labkit.build import build
from labkit.cache import CannotRunError, LabError, directory, run, say
from labkit.guest import RESULTS, Outcome, boot
from labkit.matrix import HERE, Entry

# Seconds that a guest may take, before the entry's own factor: five times what it does take
TIMEOUT = float(os.environ.get("LARGEFS_LAB_TIMEOUT", "1500"))

# The checkout cannot be written to in the guest: no plugin that keeps something there
COMMAND = (
    "tests/run kernel -- -v --durations=10 -p no:cacheprovider -p no:hypothesispytest"
    f" --junitxml={RESULTS}/junit.xml"
)


@dataclass
class Result:
    """What one kernel's run came to; it passed when `wrong` is empty."""

    entry: Entry
    tests: dict[str, int] = field(default_factory=dict)  # passed, failed, skipped
    coverage: dict[str, str] = field(default_factory=dict)  # route: coverage
    seconds: float = 0
    servers: dict[str, str] = field(default_factory=dict)  # what servers that do not opt in got
    wrong: list[str] = field(default_factory=list)


def test(entries: list[Entry], options: list[str]) -> int:
    """Test the entries one after another, with options for pytest, and print the table.

    Returns 1 if anything failed.
    """
    _prepare()
    command = f"{COMMAND} {shlex.join(options)}"
    results = [_test(entry, command) for entry in entries]
    _compare_servers(results)
    print(_table(results))
    for r in results:
        for line in r.wrong:
            print(f"{r.entry.name}: {line}")
    return any(r.wrong for r in results)


def _prepare() -> None:
    """Do on the host what the guest, without a network and many times slower, should find done."""
    checkout = HERE.parent
    python = checkout / ".venv/bin/python"
    run(checkout / "tests/set-up")
    run(python, "-m", "tests.kernel.programs", cwd=checkout)
    os.environ["LARGEFS_LAB_PYFUSE3"] = str(_pyfuse3_source(python, checkout))


def _pyfuse3_source(python: Path, checkout: Path) -> Path:
    """The source distribution of the locked pyfuse3, unpacked: its examples are in no other."""
    lines = (checkout / "requirements/test.txt").read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("pyfuse3=="))
    locked = [line.rstrip(" \\") for line in lines[first : first + 2]]
    source = directory("pyfuse3") / locked[0].replace("==", "-")
    if not source.exists():
        say(f"fetching {locked[0]}'s examples")
        requirement = source.parent / "requirement.txt"
        requirement.write_text(" \\\n".join(locked) + "\n")
        pip = (python, "-m", "pip", "-q", "--disable-pip-version-check", "download")
        run(*pip, "--no-deps", "--no-binary=pyfuse3", "-r", requirement, "-d", source.parent)
        run("tar", "-xf", f"{source}.tar.gz", "-C", source.parent)
    return source


def _compare_servers(results: list[Result]) -> None:
    """Servers that do not opt in must get the same on a 7.3 with the series as on the stock one."""
    stock = next((r.servers for r in results if r.entry.name == "7.3-stock"), {})
    for r in results:
        for name, got in r.servers.items() if r.entry.series else []:
            if got != stock.get(name, got):
                r.wrong.append(f"{name} differs from the stock kernel's")


def _test(entry: Entry, command: str) -> Result:
    try:
        image = build(entry)
        say(f"testing {entry.name} in a guest")
        with boot(entry, image, command, TIMEOUT) as outcome:
            return _read(entry, outcome)
    except CannotRunError:
        raise
    except LabError as e:
        return Result(entry, wrong=[str(e)])


def problems(outcome: Outcome) -> list[str]:
    """What was wrong with a boot, by the command's status and the kernel's console."""
    wrong = []
    if outcome.status is None:
        wrong.append(f"the guest hung or died: see {outcome.console}")
    elif outcome.status:
        wrong.append(f"the suite exited with {outcome.status}: see {outcome.output}")
    if complaints := console.complaints(outcome.console):
        wrong += [f"kernel log: {line}" for line in complaints[:5]]
        wrong.append(f"{len(complaints)} such lines in {outcome.console}")
    return wrong


def _read(entry: Entry, outcome: Outcome) -> Result:
    """Judge an outcome: the command's status, the tests' report, the console."""
    result = Result(entry, seconds=outcome.seconds)
    result.servers = {p.name: p.read_text() for p in outcome.results.glob("server-*.txt")}
    junit = outcome.results / "junit.xml"
    if junit.exists() and junit.stat().st_size:
        _read_junit(junit, result)
    result.wrong = problems(outcome)
    if outcome.status == 0 and not result.tests.get("passed"):
        result.wrong.append(f"no test ran: see {outcome.output}")
    return result


def _read_junit(junit: Path, result: Result) -> None:
    suite = next(ElementTree.parse(junit).getroot().iter("testsuite"))  # noqa: S314 - our own file
    total = int(suite.get("tests", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    result.tests = {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
    for p in suite.iter("property"):
        name = p.get("name", "")
        if name.startswith("coverage:"):
            result.coverage[name.removeprefix("coverage:")] = p.get("value", "")


def _table(results: list[Result]) -> str:
    """Kernel × route × coverage, one line for each route that a kernel was measured by."""
    rows = [("kernel", "route", "coverage", "tests", "time", "verdict")]
    for r in results:
        tests = ", ".join(f"{n} {what}" for what, n in r.tests.items() if n) or "none ran"
        minutes = f"{r.seconds // 60:.0f}:{r.seconds % 60:02.0f}"
        first = (tests, minutes, "FAILED" if r.wrong else "passed")
        routes = sorted(r.coverage.items(), key=lambda route: route[0] != "no hint")
        routes = routes or [(r.entry.route, "not measured")]
        for n, (route, coverage) in enumerate(routes):
            name = r.entry.name if n == 0 else ""
            rows.append((name, route, coverage, *(first if n == 0 else ("", "", ""))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
