"""The kernel's side, tested in a guest of kernel-patch/lab.

On the host this suite is test_lab.py, which boots the kernel with the series and runs the same
suite in it; the other tests are skipped there, unless the running kernel itself has the series.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel import pages
from tests.kernel.programs import program

HERE = Path(__file__).parent

GUEST = os.environ.get("LARGEFS_LAB")  # the lab's name for the kernel under test
SLOW = int(os.environ.get("LARGEFS_LAB_SLOW", "1"))


def has_series() -> bool:
    """Whether the running kernel counts huge faults on text, as the series makes it."""
    return "thp_file_exec_fault" in Path("/proc/vmstat").read_text()


RUNS_HERE = bool(GUEST) or (has_series() and os.geteuid() == 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        if item.path.name == "test_lab.py":
            if GUEST:
                item.add_marker(pytest.mark.skip("this is the lab's guest"))
            elif RUNS_HERE:
                item.add_marker(pytest.mark.skip("the rest of the suite runs on this very kernel"))
        elif not RUNS_HERE:
            item.add_marker(
                pytest.mark.skip("not in a guest of kernel-patch/lab, nor root on such a kernel")
            )
        else:
            item.add_marker(pytest.mark.timeout(600 * SLOW))


@pytest.fixture(scope="session", autouse=True)
def thp_by_madvise() -> Iterator[None]:
    """What is mapped by huge pages with THP at 'always', as Debian has it, shows nothing: no hint is none."""
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    before = enabled.read_text().split("[")[1].split("]")[0] if RUNS_HERE else "madvise"
    if before == "madvise":
        yield
        return
    enabled.write_text("madvise")
    try:
        yield
    finally:
        enabled.write_text(before)


@pytest.fixture(autouse=True)
def name_in_kernel_log(request: pytest.FixtureRequest) -> None:
    """Tell the console which test runs, so that a complaint has its cause beside it."""
    if GUEST:
        Path("/dev/kmsg").write_text(f"test: {request.node.name}\n")


@pytest.fixture(scope="session")
def route() -> str:
    """How text gets 2 MiB pages through FUSE's own cache here: folio, collapse or none."""
    return os.environ.get("LARGEFS_LAB_ROUTE", "folio")


@pytest.fixture
def record_coverage(
    record_testsuite_property: Callable[[str, object], None],
) -> Callable[[str, pages.Coverage], None]:
    """For the lab's table: what was reached by a route."""

    def record(by: str, coverage: pages.Coverage) -> None:
        record_testsuite_property(f"coverage:{by}", f"{coverage.ratio:.2f}")

    return record


@dataclass
class Mounted:
    """A mounted passthrough.c: `source` is shown at `at`."""

    source: Path
    at: Path
    server: subprocess.Popen[str]
    offered: int  # the INIT flags that the kernel offers

    def command(self, line: str) -> int:
        """Send a notification (see passthrough.c); returns 0 or an errno."""
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(line + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


@pytest.fixture
def passthrough(tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    """Mount passthrough.c with some options; unmounted when the test ends, and it must end well."""
    with contextlib.ExitStack() as stack:

        def mount(*options: str) -> Mounted:
            number = len(list(tmp_path.glob("source*")))
            source, at = tmp_path / f"source{number}", tmp_path / f"mnt{number}"
            source.mkdir()
            at.mkdir()
            server = subprocess.Popen(
                [program("passthrough"), *options, source, at],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert server.stdout
            mounted = Mounted(source, at, server, int(server.stdout.readline(), 16))
            stack.callback(_unmount, mounted)
            return mounted

        yield mount


def _unmount(mounted: Mounted) -> None:
    try:
        subprocess.run(["umount", mounted.at], check=True)
        assert mounted.server.stdin
        mounted.server.stdin.close()
        assert mounted.server.wait(60) == 0, "the server failed"
    finally:
        if mounted.server.poll() is None:
            mounted.server.kill()
            subprocess.run(["umount", "-l", mounted.at], check=False)
        shutil.rmtree(mounted.source)


@dataclass
class Mapper:
    """A mapper.c at work: a file mapped as text."""

    process: subprocess.Popen[str]
    address: int
    length: int
    path: Path

    def command(self, line: str) -> list[int]:
        """Send a command (see mapper.c); returns the numbers that it answers."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return [int(word) for word in self.process.stdout.readline().split()]

    def pmd_mapped(self) -> int:
        """Bytes of the file that are PMD-mapped."""
        return sum(m.pmd_mapped for m in pages.mappings(self.process.pid, self.path))

    def read(self, offset: int, length: int) -> bytes:
        """What the mapping holds, read through its own page tables."""
        with open(f"/proc/{self.process.pid}/mem", "rb", buffering=0) as memory:
            return os.pread(memory.fileno(), length, self.address + offset)


@pytest.fixture
def mapper() -> Iterator[Callable[..., Mapper]]:
    """Map a file as text in a process of its own, which ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(path: Path, length: int, sharing: str = "private") -> Mapper:
            process = subprocess.Popen(
                [program("mapper"), path, str(length), sharing],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            assert process.stdout
            return Mapper(process, int(process.stdout.readline(), 16), length, path)

        yield start
