"""What every suite may use."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.mounts import Mounts, reason_not_to_mount

# What nohup(1) and a shell's "&" have their children ignore, ours would ignore, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes says how busy the machine is, not whether largefs is right.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def mounts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mounts]:
    """Real mounts; see tests/mounts.py for what is looked at when the test ends."""
    if reason := reason_not_to_mount():
        pytest.skip(reason)
    made = Mounts(tmp_path)
    try:
        yield made
        if not request.node.stash.get(FAILED, False):
            made.verify()
    finally:
        made.tear_down()


def memory_is_reclaimed() -> bool:
    """Whether this kernel pages out memory all the time, as some hosts have their guests do (DAMON).

    It takes a huge folio from under a program now and then, and what is read again comes in small ones.
    """
    kdamonds = Path("/sys/kernel/mm/damon/admin/kdamonds").glob("[0-9]*")
    return any(
        (kdamond / "state").read_text() == "on\n" and action.read_text() == "pageout\n"
        for kdamond in kdamonds
        for action in kdamond.glob("contexts/*/schemes/*/action")
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where memory may go at any moment, look up to three times; the summary counts the reruns."""
    if os.geteuid() == 0 and memory_is_reclaimed():
        for item in items:
            if item.get_closest_marker("resident"):
                item.add_marker(pytest.mark.flaky(reruns=2, only_rerun=["AssertionError"]))


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """Let fixtures know whether the test itself failed."""
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report
