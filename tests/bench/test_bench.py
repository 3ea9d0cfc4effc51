"""It measures everything everywhere by turns, and leaves nothing behind; no test is about time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from largefs.bench import runner, workloads
from largefs.bench.runner import CannotRunError, Result
from largefs.bench.workloads import METRICS, WORKLOADS, Settings, Site

TOOL = [sys.executable, "-c", "from largefs.cli import main; main()", "bench"]
SMALL = ("--size", "2", "--files", "120", "--rounds", "2", "--program", "/bin/bash")


@pytest.fixture
def settings():
    return Settings(2 << 20, 120, Path("/bin/bash").resolve(), can_drop=False)


@pytest.fixture
def directories(tmp_path):
    made = [tmp_path / name for name in ("one", "two", "three")]
    for directory in made:
        directory.mkdir()
    return made


def test_measures_everything_everywhere(directories):
    done = subprocess.run([*TOOL, *directories, *SMALL, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    expected = set(METRICS) - (set() if result["caches_dropped"] else {"walk cold"})
    assert set(result["metrics"]) == expected
    for metric in result["metrics"].values():
        assert [len(rounds) for rounds in metric["rounds"]] == [2, 2, 2]
        assert all(value > 0 for rounds in metric["rounds"] for value in rounds)
        assert metric["ratio"][0] == 1
    assert all(os.listdir(directory) == [] for directory in directories)


def test_table(directories):
    done = subprocess.run(
        [*TOOL, *directories[:2], *SMALL, "--only", "append", "--only", "fault"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    rows = [line.split()[0] for line in done.stdout.splitlines() if "/s " in line]
    assert rows == ["append", "fault", "fault"]
    assert "medians of 2 rounds" in done.stdout and "as fast" in done.stdout


def test_directories_take_turns(directories, settings, monkeypatch):
    calls = []

    def fake(site: Site):
        calls.append(site.root.parent.name)
        return {"append": 1.0}

    monkeypatch.setitem(WORKLOADS, "append", fake)
    reports = []
    runner.run(directories, settings, 3, ["append"], reports.append)
    assert calls == ["one", "two", "three", "two", "three", "one", "three", "one", "two"]
    assert len(reports) == runner.steps(3, 3, 1)


def test_ratios_compare_within_a_round(directories, settings):
    rates = {"append": [[10.0, 100.0, 40.0], [20.0, 50.0, 80.0]]}
    result = Result(directories[:2], ["a", "b"], settings, rates)
    assert result.ratios("append", 1) == [2.0, 0.5, 2.0]
    assert result.median("append", 0) == 40.0
    times = Result(directories[:2], ["a", "b"], settings, {"start cold": [[10.0], [5.0]]})
    assert times.ratios("start cold", 1) == [2.0], "half the time is twice as fast"


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_leaves_its_site_as_it_was(tmp_path, settings, name):
    site = Site(tmp_path, settings)
    workloads.prepare(site)

    def listing():
        return sorted(str(path) for path in tmp_path.rglob("*"))

    before = listing()
    values = WORKLOADS[name](site)
    assert values and set(values) <= set(METRICS)
    assert listing() == before


def test_wrong_data_is_not_measured(directories, settings, monkeypatch):
    def truncating(site: Site):
        os.truncate(site.big, site.settings.size - 1)
        return workloads.streaming(site)

    monkeypatch.setitem(WORKLOADS, "stream", truncating)
    with pytest.raises(CannotRunError, match="read 2097151 of 2097152 bytes"):
        runner.run(directories, settings, 1, ["stream"], lambda _: None)
    assert all(os.listdir(directory) == [] for directory in directories)


def test_failing_program(directories, settings):
    broken = Settings(settings.size, settings.files, Path("/bin/false"), can_drop=False)
    with pytest.raises(CannotRunError, match="ended with 1"):
        runner.run(directories, broken, 1, ["start"], lambda _: None)
    assert all(os.listdir(directory) == [] for directory in directories)


def test_refuses_to_fill_the_disk(directories, settings):
    free = os.statvfs(directories[0])
    size = free.f_bavail * free.f_frsize // len(directories) // 2
    huge = Settings(size, settings.files, settings.program, can_drop=False)
    with pytest.raises(CannotRunError, match="lower --size or --files"):
        runner.run(directories, huge, 1, ["stream"], lambda _: None)
    assert all(os.listdir(directory) == [] for directory in directories)


def test_missing_directory(tmp_path):
    done = subprocess.run([*TOOL, tmp_path / "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and "does not exist" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(directories, number):
    bench = subprocess.Popen(
        [*TOOL, *directories, *SMALL, "--rounds", "1000"], stderr=subprocess.PIPE, text=True
    )
    try:
        while not list(directories[2].glob("largefs-bench-*/program")):
            assert bench.poll() is None
            time.sleep(0.01)
        bench.send_signal(number)
        assert "interrupted" in bench.communicate(timeout=60)[1]
    finally:
        bench.kill()  # or it would drop the machine's caches for ever
    assert bench.returncode == 2
    assert all(os.listdir(directory) == [] for directory in directories)
