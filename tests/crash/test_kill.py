"""The daemon is killed at random moments under load: what was fsynced is there, and right.

LARGEFS_CRASH_ROUNDS sets how often (default 2); LARGEFS_CRASH_SEED which moments.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.crash.markers import Writers
from tests.mounts import Mounts, largefs

ROUNDS = int(os.environ.get("LARGEFS_CRASH_ROUNDS", "2"))
SEED = int(os.environ.get("LARGEFS_CRASH_SEED", "1"))


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_killed_daemon_loses_nothing_that_was_fsynced(
    mounts: Mounts, tmp_path: Path, round_: int
) -> None:
    moment = random.Random(f"{SEED} {round_}")
    m = mounts.make("commit=0.1" if round_ % 2 else "commit=5")
    with Writers(m.path, tmp_path) as writers:
        writers.wait_for(10)
        time.sleep(moment.uniform(0, 1))
        m.kill()
    largefs("check", m.store, "--data")  # as the crash left it
    m.mount()
    writers.verify()
    subprocess.run(["diff", "-r", m.path, m.path], check=True)


def test_a_daemon_that_is_killed_while_it_recovers(mounts: Mounts, tmp_path: Path) -> None:
    m = mounts.make()
    with Writers(m.path, tmp_path) as writers:
        writers.wait_for(10)
        m.kill()
    for delay in (0.0, 0.3, 0.6):
        daemon = subprocess.Popen(
            [Path(sys.executable).with_name("largefs"), "mount", "-f", m.store, m.path],
            stderr=subprocess.DEVNULL,
        )
        time.sleep(0.5 + delay)
        daemon.kill()
        daemon.wait()
        m.detach()
        largefs("check", m.store, "--data")
    m.mount()
    writers.verify()


def test_a_program_that_writes_on_after_the_daemon_was_killed(mounts: Mounts) -> None:
    """With passthrough its descriptor goes on working; nothing may call the file clean meanwhile."""
    m = mounts.make()
    f = (m.path / "file").open("wb", buffering=0)
    f.write(b"a" * 300_000)
    os.fsync(f.fileno())
    m.kill()
    m.mount()
    time.sleep(1)  # the new daemon has settled what it may
    try:
        f.write(b"b" * 300_000)
        expected = b"a" * 300_000 + b"b" * 300_000
    except OSError:  # no passthrough: the descriptor is dead
        expected = b"a" * 300_000
    with contextlib.suppress(OSError):  # ENOTCONN: FLUSH reaches nobody
        f.close()
    assert (m.path / "file").read_bytes() == expected
    m.unmount()
    largefs("check", m.store, "--data")
