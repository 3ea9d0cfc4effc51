"""Filesystems for the stress tool to torture, and the tool itself."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = [sys.executable, "-c", "from largefs.cli import main; main()", "stress"]


def _stress(*arguments, expect=None):
    """Run the tool with --json; its summary, and its exit code as ``code``."""
    done = subprocess.run(
        [*TOOL, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=240
    )
    if expect is not None:
        assert done.returncode == expect, done.stdout + done.stderr
    return {**json.loads(done.stdout), "code": done.returncode}


@pytest.fixture
def stress():
    """A function that runs the tool."""
    return _stress


@pytest.fixture
def tool():
    """The tool's command line."""
    return TOOL


@contextlib.contextmanager
def served(command, mountpoint: Path):
    """Run a FUSE server in the foreground until the block ends."""
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("no /dev/fuse")
    mountpoint.mkdir(exist_ok=True)
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(400):
            if os.path.ismount(mountpoint) or server.poll() is not None:
                break
            time.sleep(0.025)
        if not os.path.ismount(mountpoint):
            server.kill()
            pytest.fail(f"{command[0]} did not mount: {server.communicate()[1]}")
        yield mountpoint
    finally:
        server.terminate()  # not umount: it may be sitting on requests
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stderr.close()
        subprocess.run(["fusermount3", "-u", "-q", "-z", str(mountpoint)], check=False)


@pytest.fixture
def faulty(tmp_path):
    """A function that mounts the faulty filesystem with a fault."""
    with contextlib.ExitStack() as stack:

        def mount(fault: str) -> Path:
            server = str(Path(__file__).with_name("faulty.py"))
            target = tmp_path / "mnt"
            return stack.enter_context(served([sys.executable, server, str(target), fault], target))

        yield mount


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a filesystem of the kernel, by arguments of mount(8)."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    targets = []

    def mount(*arguments: str) -> Path:
        target = tmp_path / f"mnt{len(targets)}"
        target.mkdir()
        done = subprocess.run(["mount", *arguments, str(target)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount {' '.join(arguments)}: {done.stderr.strip()}")
        targets.append(target)
        return target

    yield mount
    for target in targets:
        subprocess.run(["umount", str(target)], check=True)
