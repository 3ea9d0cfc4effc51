"""largefs report, warm and doctor as a user meets them."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from largefs.cli import doctor, report, warm
from largefs.hugetext.routes import kernel_version
from largefs.store import Store
from tests.hugetext.support import MIB, make_file, mounted, text_of, warmed
from tests.mounts import LARGEFS

pytestmark = pytest.mark.resident


def run(command: click.Command, *arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def totals(result: Result) -> dict[str, Any]:
    document = json.loads(result.stdout)
    assert document["schema"] == "largefs-report-1"
    assert document["unit"] == "bytes"
    for process in document["processes"]:
        for number in "text", "eligible", "touched", "pmd_mapped":
            assert process[number] == sum(mapping[number] for mapping in process["mappings"])
    return dict(document["total"])


@pytest.fixture
def mapped(disk: Path, map_file: Callable[..., int]) -> Iterator[tuple[int, Path]]:
    path = warmed(make_file(disk / "[bold]file", 6 * MIB))
    yield map_file(path, 4096, 4 * MIB, 0, "touch"), path


def test_report_of_a_pid_agrees_with_the_count(mapped: tuple[int, Path]) -> None:
    pid, path = mapped
    text = text_of(pid, Path("/"))
    total = totals(run(report.command, pid, "--json"))
    assert total["eligible"] == text.eligible >= 2 * MIB
    assert total["touched"] == text.touched
    assert total["pmd_mapped"] == text.pmd_mapped
    assert total["coverage"] == text.coverage
    assert total["why"] == {reason.label: size for reason, size in text.why.items()}
    shown = run(report.command, pid)
    assert shown.exit_code == 0
    assert str(path) in shown.stdout
    assert "head or tail of the mapping" in shown.stdout


def test_report_of_a_mountpoint(
    disk: Path, serve: Callable[[Path, str], Path], map_file: Callable[..., int]
) -> None:
    """Only the mappings of that filesystem count, and no process of another."""
    warmed(make_file(disk / "file", 4 * MIB))
    mountpoint = serve(disk, "passthrough")
    assert run(report.command, mountpoint).exit_code == 1
    pids = [map_file(mountpoint / "file", 0, 4 * MIB, 0, "touch") for _ in range(2)]
    result = run(report.command, mountpoint, "--json")
    assert [process["pid"] for process in json.loads(result.stdout)["processes"]] == pids
    total = totals(result)
    assert total["text"] == total["touched"] == total["pmd_mapped"] == 8 * MIB
    assert total["coverage"] == 1.0
    assert "1.000" in run(report.command, str(mountpoint) + "/").stdout


def test_report_of_a_mountpoint_whose_server_was_killed(
    disk: Path,
    serve: Callable[[Path, str], Path],
    servers: dict[Path, subprocess.Popen[bytes]],
    map_file: Callable[..., int],
) -> None:
    """The programs go on under passthrough, and their pages can still be counted."""
    warmed(make_file(disk / "file", 4 * MIB))
    mountpoint = serve(disk, "passthrough")
    map_file(mountpoint / "file", 0, 4 * MIB, 0, "touch")
    servers[mountpoint].kill()
    servers[mountpoint].wait()
    assert totals(run(report.command, mountpoint, "--json"))["coverage"] == 1.0


def test_report_of_a_program_by_name_and_by_path(
    disk: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    program = disk / "my sleeper"
    program.write_bytes(Path("/bin/sh").read_bytes())
    program.chmod(0o755)
    child = start(program, "-c", "echo ready; read wait")
    for target in "my sleeper", program:
        result = run(report.command, target, "--json")
        assert result.exit_code == 0
        assert [p["pid"] for p in json.loads(result.stdout)["processes"]] == [child.pid]


def test_report_of_a_process_with_any_name(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    """A process writes its comm itself: it need not be text."""
    script = (
        "import sys; open('/proc/self/comm', 'wb').write(b'caf\\xc3'); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    pid = start(sys.executable, "-c", script).pid
    assert Path(f"/proc/{pid}/comm").read_bytes() == b"caf\xc3\n"
    assert totals(run(report.command, pid, "--json"))["text"] > 0
    assert run(report.command).exit_code == 0


def test_report_of_everything() -> None:
    result = run(report.command)
    assert result.exit_code == 0
    assert "total" in result.stdout


@pytest.mark.parametrize(
    ("target", "status", "words"),
    [
        ("4194305", 2, "no process has the PID"),
        ("/nowhere/at/all", 2, "no such file"),
        ("/usr/lib", 2, "nothing is mounted on"),
        ("no-such-program", 1, "no running process"),
    ],
)
def test_report_of_what_is_not_there(target: str, status: int, words: str) -> None:
    result = run(report.command, target)
    assert result.exit_code == status
    assert words in result.output


def test_report_of_a_file_whose_alignment_record_is_damaged(disk: Path) -> None:
    path = disk / "program"
    path.write_bytes(Path(sys.executable).resolve().read_bytes())
    os.setxattr(path, "user.largefs.alignment", b"no record")
    result = CliRunner().invoke(report.command, [str(path)])
    assert result.exit_code == 2, result.output
    assert "what the import noted of it is damaged" in result.output


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_report_fits_a_terminal(
    mapped: tuple[int, Path], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the terminal, all numbers and the whole path are there."""
    monkeypatch.setattr(report, "width", lambda: columns)
    selection = report.select(str(mapped[0]))
    console = Console(width=columns, file=io.StringIO())
    with console.capture() as captured:
        console.print(report.render(selection, report.collect(selection)))
    shown = captured.get()
    assert all(title in shown for title in (*report.NUMBERS, "MAPPING"))
    assert str(mapped[1]) in "".join(line.strip() for line in shown.splitlines())


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_report_watches_until_the_process_ends(
    mapped: tuple[int, Path], options: list[str]
) -> None:
    """And each report can be read at once, also through a pipe."""
    pid, path = mapped
    command = [LARGEFS, "report", str(pid), "--watch", "--interval", "0.1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watcher:
        try:
            assert watcher.stdout and watcher.stderr
            seen = 0
            while seen < 3:
                line = watcher.stdout.readline()
                assert line
                seen += os.fsencode(path) in line
            os.kill(pid, signal.SIGKILL)
            assert watcher.wait(20) == 0
            assert watcher.stderr.read() == b"largefs: process %d has ended\n" % pid
        finally:
            watcher.kill()


def test_report_watches_until_nobody_reads() -> None:
    command = f"{LARGEFS} report $$ --watch --interval 0.1 | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20)
    assert done.stdout.count("\n") == 1 and not done.stderr


def test_many_mappings(disk: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Thirty thousand mappings: a second, not a minute."""
    path = make_file(disk / "file", 4 * MIB)
    # Neighbours of the same page do not merge.
    script = (
        "import ctypes, sys\n"
        f"f = open({str(path)!r}, 'rb')\n"
        "for i in range(30000): ctypes.CDLL(None).mmap(None, 4096, 5, 2, f.fileno(), 0)\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    pid = start(sys.executable, "-c", script).pid
    begin = time.monotonic()
    total = totals(run(report.command, pid, "--json"))
    assert time.monotonic() - begin < 10
    assert total["why"]["small"] >= 30000 * 4096


def test_warm_a_directory(disk: Path) -> None:
    (disk / "below").mkdir()
    make_file(disk / "below" / "big", 4 * MIB)
    make_file(disk / "small", MIB)
    os.mkfifo(disk / "fifo")
    (disk / "link").symlink_to("below/big")
    result = run(warm.command, disk)
    assert result.exit_code == 0
    assert result.stdout == "4 of 4 MiB in 2 MiB folios (0 MiB were before), 1 files\n"
    assert "4 MiB were before" in run(warm.command, disk / "below" / "big").stdout


def test_warm_where_folios_are_small(filesystem: Callable[[str], Path]) -> None:
    path = make_file(filesystem("small-folios") / "file", 4 * MIB)
    result = run(warm.command, path)
    if result.exit_code == 0:
        pytest.skip("this kernel collapses files of any filesystem, or ext4 has changed")
    assert result.exit_code == 1
    assert result.stdout.startswith("0 of 4 MiB")
    assert "no large folios" in result.stderr


def test_warm_of_nothing() -> None:
    assert run(warm.command, "/nowhere").exit_code == 2


def test_doctor_on_a_store(disk: Path) -> None:
    store = disk / "store"
    Store.create(store)
    result = run(doctor.command, store, "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == "largefs-doctor-1"
    levels = {finding["check"]: finding["level"] for finding in document["findings"]}
    assert levels["store"] == levels["/dev/fuse"] == levels["libfuse"] == "ok"
    expected = "passthrough" if levels["companion"] == "ok" else "none"
    if kernel_version() >= (6, 9):
        assert document["route"] == expected
    assert levels[f"route {document['route']}"] == ("warn" if expected == "none" else "ok")
    assert result.exit_code == (1 if "warn" in levels.values() else 0)
    shown = run(doctor.command, store)
    assert f"route: {document['route']};" in shown.stdout


def test_doctor_on_a_place_for_a_store(disk: Path) -> None:
    result = run(doctor.command, disk)
    assert result.exit_code == 2
    assert "is empty, so no largefs store" in result.stdout
    assert "route:" in result.stdout


def test_doctor_without_dev_fuse() -> None:
    """In a mount namespace where another filesystem hides /dev."""
    code = "from largefs.cli.doctor import command; command()"
    script = f'mount -t tmpfs none /dev && exec {sys.executable} -c "{code}"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "modprobe fuse" in done.stdout


def test_mountpoint_with_blanks(disk: Path, map_file: Callable[..., int]) -> None:
    """mountinfo writes such bytes in octal."""
    mountpoint = disk / "a b\t\\c"
    mountpoint.mkdir()
    with mounted("-t", "tmpfs", "none", str(mountpoint)):
        map_file(make_file(mountpoint / "new\nline", MIB), 0, MIB, 0)
        document = json.loads(run(report.command, mountpoint, "--json").stdout)
        paths = [mapping["path"] for mapping in document["processes"][0]["mappings"]]
        assert paths == [str(mountpoint / "new\nline")]
