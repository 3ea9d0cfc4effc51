"""A machine with largefs installed, without touching the machine."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from largefs.store import owner
from tests import installed
from tests.mounts import largefs, reason_not_to_mount

Shell = Callable[..., subprocess.CompletedProcess[str]]

IN_NAMESPACE = """
mount -t overlay none -o "lowerdir=$ROOT/usr/sbin:/usr/sbin" /usr/sbin || exit 99
mount -t overlay none -o "lowerdir=$ROOT/opt:/opt" /opt || exit 99
cd "$HERE"
"""
"""/usr/sbin and /opt as they would be after mount-helpers/install; for the test's processes alone."""


@pytest.fixture(scope="session")
def root() -> Path:
    """Where largefs is installed; a LARGEFS_ROOT."""
    if reason := reason_not_to_mount() or installed.reason_not_to_install():
        pytest.skip(reason)
    return installed.install()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """An empty directory; the daemons of the stores made in it are ended with the test."""
    try:
        yield tmp_path
    finally:
        for meta in tmp_path.rglob("meta.db"):
            if holder := owner.read(meta.parent):
                end(holder.pid)


def end(pid: int) -> None:
    """SIGKILL one of our daemons, if it still runs; its mount goes with its namespace."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return
    if b"largefs" in command:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def store(here: Path) -> Path:
    """A store that holds one file."""
    (here / "from").mkdir()
    (here / "from/file").write_text("text\n")
    largefs("mkfs", here / "store")
    largefs("import", here / "from", here / "store")
    (here / "mnt").mkdir()
    return here / "store"


@pytest.fixture
def shell(here: Path, root: Path) -> Shell:
    """Run a script of bash in `here`, in a mount namespace in which largefs is installed."""
    probe = "mount -t overlay none -o lowerdir=/usr/sbin:/usr/bin /usr/sbin"
    if subprocess.run(["unshare", "-m", "sh", "-c", probe], capture_output=True).returncode:
        pytest.skip(
            "overlayfs cannot be mounted here, so nothing can be put into /sbin for a trial"
        )

    def run(script: str, *, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["unshare", "-m", "bash", "-euo", "pipefail", "-c", IN_NAMESPACE + script],
            env={"PATH": "/usr/sbin:/usr/bin", "ROOT": str(root), "HERE": str(here)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}{done.stderr}"
        return done

    return run


@pytest.fixture
def compiler() -> Path:
    """Debian's cc1plus: a program of a fixed address, 20 MiB of text."""
    path = subprocess.run(
        ["g++", "-print-prog-name=cc1plus"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not shutil.which(path):
        pytest.skip("no cc1plus")
    return Path(path)
