"""The command as such: whatever is done to it, it says one line at most, and ends as it should."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from largefs.store import Store, StoreError, database
from tests.mounts import LARGEFS


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of bash, in which $L is largefs."""
    return subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "L": LARGEFS, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("command", ["--version", "report $$", "mkfs --help"])
def test_output_that_cannot_be_written(command: str) -> None:
    done = shell(f"$L {command} >/dev/full")
    assert done.returncode == 1
    assert done.stderr == "largefs: output: No space left on device\n"


def test_the_list_of_commands_is_whole() -> None:
    done = shell("$L --help", COLUMNS="80")
    assert done.returncode == 0 and "..." not in done.stdout.partition("Commands:")[2]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    done = shell(f"$L report $$ {closed}")
    assert done.returncode == 0 and not done.stderr


def test_a_reader_that_has_gone() -> None:
    done = shell("set -o pipefail; $L report | true; echo ${PIPESTATUS[0]}")
    assert done.stdout in ("0\n", "1\n") and not done.stderr


def test_names_that_the_locale_does_not_have(tmp_path: Path) -> None:
    store = tmp_path / "caf\u00e9 \u2603"
    Store.create(store)
    for locale in {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}:
        done = shell(f"$L check '{store}'", **locale)
        assert done.returncode == 0 and "clean" in done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_at_any_moment(number: int, tmp_path: Path) -> None:
    """Also while the command's modules are still loaded; not while Python itself starts."""
    for attempt in range(6):
        running = subprocess.Popen(
            [LARGEFS, "report", "--watch"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        _wait_for(lambda pid=running.pid: _in_main(pid))
        time.sleep(0.06 * attempt)
        running.send_signal(number)
        said = running.communicate(timeout=30)[1]
        assert (running.returncode, said.strip()) in [(130, "largefs: interrupted"), (0, "")]


def _in_main(pid: int) -> bool:
    """Whether it has its handlers; Python alone has none for SIGHUP."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> signal.SIGHUP - 1 & 1)


def _wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("command", ["mkfs ''", "import . ''", "stress ''"])
def test_an_empty_name_is_not_the_current_directory(command: str, tmp_path: Path) -> None:
    done = shell(f"cd '{tmp_path}' && $L {command}")
    assert done.returncode == 2 and "the name is empty" in done.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_store_that_may_not_be_read(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    (tmp_path / "store").chmod(0)
    program = (
        "import os, sys; from largefs.cli.commands import cli; import largefs.cli.check; "
        "os.setresuid(65534, 65534, 65534); "
        "cli.main(sys.argv[1:], standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "check", "store"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 8, done.stderr
    assert done.stderr.endswith("Permission denied\n") and done.stderr.count("\n") == 1


def test_nothing_is_exported_into_the_store(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    done = shell(f"cd '{tmp_path}' && $L export store store/extents/x")
    assert done.returncode == 1 and "belongs to the store itself" in done.stderr
    assert not (tmp_path / "store/extents/x").exists()


def test_a_store_that_could_not_be_made_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(StoreError, match="disk is full"):
        patched.setattr(database, "create", full)
        Store.create(tmp_path / "store")
    Store.create(tmp_path / "store")


def test_a_file_is_no_store_and_comes_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("text")
    done = shell(f"cd '{tmp_path}' && $L check in/file")
    assert done.returncode == 8 and "not a directory" in done.stderr and "mkfs" not in done.stderr
    done = shell(f"cd '{tmp_path}' && $L mkfs s && $L import in s && $L export s:/file out")
    assert done.returncode == 0 and "1 names, 4 B exported" in done.stdout
