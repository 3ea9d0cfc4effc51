"""Debian's programs, run from a mount with a cold cache: their text is on 2 MiB pages.

Counted by count_coverage.py, which is no part of the package, while each program is at work: it has
done real work, and waits for us to read its output or to close its input.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hugetext.support import HERE, drop, mounted
from tests.mounts import LARGEFS, Mount, Mounts, largefs

pytestmark = pytest.mark.resident

ENOUGH = 0.95
"""The coverage that largefs promises for programs that are eligible."""

CPP = """
#include <algorithm>
#include <iostream>
#include <map>
#include <regex>
#include <string>
template<int N> struct Work { std::map<int, std::string> m; int go() {
  std::regex r("a(b|c)*d"); m[N] = std::to_string(N);
  return std::regex_match(m[N], r) + Work<N - 1>().go(); } };
template<> struct Work<0> { int go() { return 0; } };
int main() { return Work<40>().go(); }
"""


def imported(
    mounts: Mounts, source: Path, *options: str, align: str = "off", patch: str = ""
) -> Mount:
    """A mount of an import of `source`, nothing of it in the page cache."""
    store = source.with_name("store")
    largefs("mkfs", store)
    largefs("import", "--align", align, source, store)
    subprocess.run(["sync", "-f", store], check=True)
    for file in (store / "extents").glob("*/*"):
        drop(file)
    return mounts.make(*options, store=store, patch=patch)


def coverage(pid: int, mountpoint: Path) -> tuple[int, float]:
    """(touched bytes, coverage) of what a process maps from the mount, by the independent count."""
    command = [sys.executable, HERE / "count_coverage.py", "--file", mountpoint, str(pid)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    why = subprocess.run([LARGEFS, "report", str(pid)], capture_output=True, text=True).stdout
    print(said, why, sep="\n")  # should the test fail
    _, touched, _, share, _ = said.splitlines()[-1].split()
    return int(touched), float(share)


@contextmanager
def at_work(*command: str | Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A program whose output nobody reads: it stops when the pipe is full, its work done."""
    child = subprocess.Popen(
        [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_until_blocked(child: subprocess.Popen[bytes]) -> None:
    """Wait until the child sleeps in a write to its full pipe."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert child.poll() is None, "the program ended too early"
        if "pipe_write" in Path(f"/proc/{child.pid}/stack").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the program did not fill its pipe")


def imported_node(mounts: Mounts, tmp_path: Path, *options: str, patch: str = "") -> Mount:
    """A mount of an import of node's program alone."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy2(node_and_libraries()[0], source / "node")
    return imported(mounts, source, *options, patch=patch)


def node_and_libraries() -> list[str]:
    node = os.path.realpath(shutil.which("node") or pytest.skip("nodejs is not installed"))
    return [node, *re.findall(r"=> (\S*libnode\S*)", subprocess.getoutput(f"ldd {node}"))]


def copy_node(directory: Path) -> Path:
    """Copy node and its own libraries into a directory; returns the program there."""
    node, *libraries = node_and_libraries()
    for path in (*libraries, node):
        shutil.copy(path, directory)
    return directory / Path(node).name


@contextmanager
def node_at_work(program: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Node, with the libraries beside it, after work of a kind."""
    work = (
        "const z = require('zlib'); let s = JSON.stringify([...Array(1e5).keys()]);"
        "console.log(z.gunzipSync(z.gzipSync(s)).length + s.replace(/1+/g, 'x').length);"
        "process.stdin.resume()"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent)}
    with at_work(program, "-e", work, env=environment) as child:
        assert child.stdout is not None
        assert int(child.stdout.readline()) > 500_000
        yield child


def test_node(mounts: Mounts, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    node = copy_node(source)
    mount = imported(mounts, source)
    with node_at_work(mount.path / node.name) as child:
        touched, share = coverage(child.pid, mount.path)
        assert touched > 10 << 20
        assert share >= ENOUGH
        report = subprocess.run(
            [LARGEFS, "report", mount.path, "--json"], check=True, capture_output=True, text=True
        ).stdout
        assert '"coverage": ' in report


def test_node_run_at_once_after_it_was_copied(mounts: Mounts, tmp_path: Path) -> None:
    """Nothing is committed yet, and its pages are dirty and in small folios."""
    mount = mounts.make()
    with node_at_work(copy_node(mount.path)) as child:
        touched, share = coverage(child.pid, mount.path)
        assert touched > 10 << 20
        assert share >= ENOUGH


@pytest.mark.parametrize("layer", ["lower", "upper"])
def test_node_in_an_overlay(mounts: Mounts, tmp_path: Path, layer: str) -> None:
    """As in a container whose image, or whose own layer, is on a mount."""
    mount = mounts.make()
    for name in ("lower", "upper", "work"):
        (mount.path / name).mkdir()
    merged = tmp_path / "merged"
    merged.mkdir()
    layers = ",".join(f"{n}dir={mount.path}/{n}" for n in ("lower", "upper", "work"))
    if layer == "lower":
        node = copy_node(mount.path / "lower")
    with mounted("-t", "overlay", "-o", layers, "none", str(merged)):
        if layer == "upper":
            node = copy_node(merged)
        with node_at_work(merged / node.name) as child:
            # overlayfs has a mount of its own of each layer, and that is what the kernel names
            touched, share = coverage(child.pid, Path("/", node.name))
            assert touched > 10 << 20
            assert share >= ENOUGH


def test_cc1plus(mounts: Mounts, tmp_path: Path) -> None:
    compiler = Path(subprocess.check_output(["g++", "-print-prog-name=cc1plus"], text=True).strip())
    source = tmp_path / "source"
    shutil.copytree(compiler.parent, source, symlinks=True)
    mount = imported(mounts, source)
    flags = subprocess.check_output(
        ["g++", "-E", "-v", "-x", "c++", "/dev/null"], stderr=subprocess.STDOUT, text=True
    )
    includes = re.findall(r"^ (/\S+)$", flags, re.MULTILINE)
    program = tmp_path / "work.cc"
    program.write_text(CPP)
    arguments = ["-quiet", "-O2", *[f"-I{i}" for i in includes], program, "-o", "-"]
    with at_work(mount.path / "cc1plus", *arguments) as child:
        wait_until_blocked(child)
        touched, share = coverage(child.pid, mount.path)
        assert touched > 10 << 20
        assert share >= ENOUGH


def test_libllvm(mounts: Mounts, tmp_path: Path) -> None:
    """A shared object, not relinked and not realigned: the kernel places it (thp_get_unmapped_area)."""
    llc = shutil.which("llc-14") or shutil.which("llc") or pytest.skip("llvm is not installed")
    llc = os.path.realpath(llc)
    library = re.findall(r"=> (\S*libLLVM\S*)", subprocess.getoutput(f"ldd {llc}"))[0]
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy2(os.path.realpath(library), source / Path(library).name)
    shutil.copy2(llc, source / "llc")
    mount = imported(mounts, source)
    code = tmp_path / "work.ll"
    code.write_text(
        "".join(
            f"define i64 @f{i}(i64 %x) {{ %y = mul i64 %x, {i} %z = xor i64 %y, {i * 7}"
            f" %w = udiv i64 %z, {i + 3} ret i64 %w }}\n"
            for i in range(3000)
        )
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(mount.path)}
    with at_work(mount.path / "llc", "-O2", code, "-o", "-", env=environment) as child:
        wait_until_blocked(child)
        touched, share = coverage(child.pid, mount.path)
        assert touched > 10 << 20
        assert share >= ENOUGH


def test_small_pages_without_warm_up(mounts: Mounts, tmp_path: Path) -> None:
    """The counter-proof: it is the warm-up that does it."""
    mount = imported_node(mounts, tmp_path, "hugetext=off")
    with at_work(mount.path / "node", "-e", "console.log(1); process.stdin.resume()") as child:
        assert child.stdout is not None
        child.stdout.readline()
        _, share = coverage(child.pid, mount.path)
        assert share < 0.5


def test_the_program_goes_on_when_the_daemon_is_killed(mounts: Mounts, tmp_path: Path) -> None:
    mount = imported_node(mounts, tmp_path)
    echo = "process.stdin.on('data', d => console.log(eval(d.toString())))"
    with at_work(mount.path / "node", "-e", echo) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def ask(expression: str) -> bytes:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(expression.encode() + b"\n")
            child.stdin.flush()
            return child.stdout.readline().strip()

        assert ask("6 * 7") == b"42"
        mount.kill()
        busy = "(() => { let s = 0; for (let i = 0; i < 3e6; i++) s += /a+/.test('b' + i); return s })()"
        assert ask(busy) == b"0"
        assert (
            ask(
                "require('zlib').crc32 ? 1 : require('zlib').deflateSync('x'.repeat(1e6)).length > 0 | 0"
            )
            == b"1"
        )
        assert child.poll() is None
        mount.mount()  # the store mounts again by itself
        assert (mount.path / "node").stat().st_size == (tmp_path / "source/node").stat().st_size


def test_the_command_warms_what_is_cached_in_small_folios(mounts: Mounts, tmp_path: Path) -> None:
    mount = imported_node(mounts, tmp_path, "hugetext=off")
    (mount.path / "node").read_bytes()  # now it is cached, in whatever folios
    said = largefs("warm", mount.path / "node").stdout
    done, wanted = re.match(r"(\d+) of (\d+) MiB", said).groups()
    assert done == wanted and int(done) > 10


SLOW = """
import time
from largefs.hugetext import warm
def warm_range(fd, offset, length, cancelled=warm.never):
    while not cancelled(): time.sleep(0.01)
    return warm.Warmed()
warm.warm_range, warm.probed = warm_range, warm.warm_range
from largefs.hugetext import routes
routes._try_warm = lambda fd: routes._Warmed(in_pmd=warm.probed(fd, 0, routes._TRIAL_SIZE).in_pmd)
"""
"""A warm-up that lasts until it is cancelled; not that of the probe."""


def test_a_mount_ends_in_the_middle_of_a_warm_up(mounts: Mounts, tmp_path: Path) -> None:
    mount = imported_node(mounts, tmp_path, patch=SLOW)
    # By a shell: Popen() itself would wait for execve().
    with subprocess.Popen(["sh", "-c", f"{mount.path}/node -v; :"]) as child:
        try:
            time.sleep(0.5)
            assert child.poll() is None, "execve() waits for the warm-up"
            os.kill(mount.pid, signal.SIGTERM)
            mount.wait_for_end()
        finally:
            mount.kill()


def test_opens_that_wait_for_a_warm_up_stop_nobody_else(mounts: Mounts, tmp_path: Path) -> None:
    mount = imported_node(mounts, tmp_path, patch=SLOW)
    (mount.path / "other").touch()
    # More than the 99 requests at a time that are pyfuse3's default.
    script = 'for i in $(seq 150); do "$0" -v & done; wait'
    with subprocess.Popen(["sh", "-c", script, mount.path / "node"]):
        try:
            time.sleep(2)
            subprocess.run(["stat", mount.path / "missing"], timeout=5, capture_output=True)
            (mount.path / "new").touch()
        finally:
            mount.kill()
    mount.expected = ["."]
