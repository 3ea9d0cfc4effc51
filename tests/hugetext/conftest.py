"""Real filesystems, a real FUSE server, real processes."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from largefs.hugetext import routes
from tests.hugetext.support import HERE, mounted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs root, to mount and to read pagemap"))


@pytest.fixture(scope="session")
def filesystem() -> Iterator[Callable[[str], Path]]:
    """Directory on a filesystem: the host's, xfs, tmpfs, or one with small folios."""
    with ExitStack() as stack:
        known: dict[str, Path] = {}

        def make(fstype: str) -> Path:
            if fstype not in known:
                # Not below pytest's own directories: other users' processes must reach it.
                temporary = tempfile.TemporaryDirectory(dir="/var/tmp", prefix="largefs-test-")
                top = Path(stack.enter_context(temporary))
                top.chmod(0o755)
                directory = top / fstype
                directory.mkdir()
                if fstype in ("xfs", "small-folios"):
                    image = top / "image"
                    with open(image, "wb") as f:
                        f.truncate(1 << 30)
                    # ext4 has no large folios where it journals data.
                    make, options = ("mkfs.xfs", "loop")
                    if fstype == "small-folios":
                        make, options = ("mkfs.ext4", "loop,data=journal")
                    subprocess.run([make, "-q", image], check=True)
                    stack.enter_context(mounted("-o", options, str(image), str(directory)))
                elif fstype == "tmpfs":
                    options = ["-t", "tmpfs", "-o", "size=1g", "none"]
                    stack.enter_context(mounted(*options, str(directory)))
                known[fstype] = directory
            return known[fstype]

        yield make


@pytest.fixture
def disk(filesystem: Callable[[str], Path]) -> Iterator[Path]:
    """A fresh directory on the host's filesystem, if that has 2 MiB folios; else on xfs."""
    top = filesystem("host")
    offers = {offer.route: offer for offer in routes.probe(top).offers}
    if "no 2 MiB folio" in offers[routes.Route.PASSTHROUGH].reason:
        top = filesystem("xfs")
    with tempfile.TemporaryDirectory(dir=top) as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def servers() -> dict[Path, subprocess.Popen[bytes]]:
    """The processes that `serve` started, by mountpoint."""
    return {}


@pytest.fixture
def serve(
    tmp_path: Path, servers: dict[Path, subprocess.Popen[bytes]]
) -> Iterator[Callable[[Path, str], Path]]:
    """Serve a directory by FUSE with a route of fuse_server.py; the mountpoint."""
    with ExitStack() as stack:

        def make(source: Path, route: str) -> Path:
            if route == "passthrough" and routes.kernel_version() < (6, 9):
                pytest.skip("FUSE passthrough needs Linux 6.9")
            mountpoint = tmp_path / f"mnt-{route}"
            mountpoint.mkdir()
            server = subprocess.Popen(
                [sys.executable, HERE / "fuse_server.py", source, mountpoint, route],
                stdout=subprocess.PIPE,
            )
            servers[mountpoint] = server

            def end() -> None:
                subprocess.run(["umount", "--lazy", mountpoint], check=False)
                try:
                    server.wait(5)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()
                assert server.stdout
                server.stdout.close()

            stack.callback(end)
            assert server.stdout and server.stdout.readline() == b"ready\n"
            return mountpoint

        yield make


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process and wait for its first line of output; it is killed after the test."""
    children: list[subprocess.Popen[bytes]] = []

    def run(*command: object, **options: object) -> subprocess.Popen[bytes]:
        child: subprocess.Popen[bytes] = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **options,  # type: ignore[call-overload]
        )
        children.append(child)
        assert child.stdout
        assert child.stdout.readline(), f"{command} ended"
        return child

    yield run
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def map_file(start: Callable[..., subprocess.Popen[bytes]]) -> Callable[..., int]:
    """Start map_file.py with its arguments; the PID."""
    return lambda *arguments: start(sys.executable, HERE / "map_file.py", *arguments).pid
