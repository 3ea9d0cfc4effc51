"""Real programs after a warm-up: coverage of at least 0.95, by report and count alike."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hugetext.huge_text import build
from tests.hugetext.support import MIB, text_of, warmed

pytestmark = pytest.mark.resident

HEADERS = ("algorithm", "functional", "iostream", "map", "memory", "regex", "string", "vector")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A position-independent program of 32 MiB of text, its segments aligned to 2 MiB."""
    return build(tmp_path_factory.mktemp("program") / "huge-text", 32)


@pytest.mark.parametrize("fstype", ["host", "xfs", "tmpfs"])
def test_generated_program(
    fstype: str,
    program: Path,
    filesystem: Callable[[str], Path],
    disk: Path,
    start: Callable[..., subprocess.Popen[bytes]],
) -> None:
    directory = disk if fstype == "host" else filesystem(fstype)
    path = warmed(Path(shutil.copy(program, directory)))
    text = text_of(start(path).pid, path)
    assert 32 * MIB <= text.eligible == text.touched
    assert text.coverage == 1.0


def test_generated_program_through_passthrough(
    program: Path,
    disk: Path,
    serve: Callable[[Path, str], Path],
    start: Callable[..., subprocess.Popen[bytes]],
) -> None:
    warmed(Path(shutil.copy(program, disk)))
    path = serve(disk, "passthrough") / program.name
    text = text_of(start(path).pid, path)
    assert text.touched >= 32 * MIB
    assert text.coverage == 1.0


def test_node(disk: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Where node is a small program with a big library, that is copied too."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("nodejs is not installed")
    listed = subprocess.run(["ldd", node], check=True, capture_output=True, text=True).stdout
    for source in (os.path.realpath(node), *re.findall(r"=> (\S*libnode\S*)", listed)):
        warmed(Path(shutil.copy(source, disk / os.path.basename(source))))
    script = "console.log('ready'); process.stdin.resume()"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(disk)}
    child = start(disk / os.path.basename(os.path.realpath(node)), "-e", script, env=environment)
    text = text_of(child.pid, disk)
    assert text.touched > 10 * MIB
    assert text.coverage is not None and text.coverage >= 0.95


def stop(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def test_cc1plus_at_work(disk: Path) -> None:
    """Stopped in the middle of compiling C++."""
    finder = subprocess.run(["g++", "-print-prog-name=cc1plus"], capture_output=True, text=True)
    compiler = Path(finder.stdout.strip())
    if not compiler.is_absolute():
        pytest.skip("g++ is not installed")
    copy = warmed(Path(shutil.copy(compiler, disk)))
    source = disk / "file.cc"
    source.write_text(
        "".join(f"#include <{header}>\n" for header in HEADERS) + 'std::regex r(".");'
    )
    command = [copy, "-quiet", "-O2", "-imultiarch", "x86_64-linux-gnu", source, "-o", "/dev/null"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
        try:
            stop(child)
            # Far enough is when its text has been used; a fixed time would depend on the machine.
            deadline = time.monotonic() + 20
            while (text := text_of(child.pid, copy)).touched < 10 * MIB:
                assert child.poll() is None, child.communicate()
                assert time.monotonic() < deadline
                child.send_signal(signal.SIGCONT)
                time.sleep(0.2)
                stop(child)
        finally:
            child.kill()
    assert text.eligible > 10 * MIB
    assert text.coverage is not None and text.coverage >= 0.95
