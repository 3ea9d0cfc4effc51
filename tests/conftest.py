"""What every suite may use."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts import Mounts, reason_not_to_mount

# What nohup(1) and a shell's "&" have their children ignore, ours would ignore, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """Let fixtures know whether the test itself failed."""
    report = yield
    if report.when == "call" and report.failed:
        item.stash[FAILED] = True
    return report
