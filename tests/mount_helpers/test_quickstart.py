"""mount-helpers/quickstart, from an import to the report, in places of its own (LARGEFS_ROOT)."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from largefs.hugetext import routes
from tests.installed import CHECKOUT
from tests.mounts import reason_not_to_mount

pytestmark = pytest.mark.resident

Quickstart = Callable[..., subprocess.CompletedProcess[str]]


def start(places: Path, *arguments: object) -> "subprocess.Popen[str]":
    """As an unkind user would: no HOME, no PATH to speak of, no stdin, from the root directory."""
    return subprocess.Popen(
        [
            "/bin/bash",
            "-c",
            'exec "$@" <&-',
            "bash",
            CHECKOUT / "mount-helpers/quickstart",
            *map(str, arguments),
        ],
        env={"PATH": "/usr/sbin:/usr/bin", "LARGEFS_ROOT": str(places)},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def places(here: Path, root: Path) -> Iterator[Path]:
    """A LARGEFS_ROOT in which largefs itself is there already."""
    made = here / "root"
    (made / "opt").mkdir(parents=True)
    (made / "opt/largefs").symlink_to(root / "opt/largefs")
    yield made
    start(made, "--down").communicate(timeout=60)


@pytest.fixture
def quickstart(places: Path) -> Quickstart:
    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = start(places, *arguments)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == code, f"{process.returncode}\n{said}"
        return subprocess.CompletedProcess(process.args, code, said)

    return run


@pytest.fixture
def full(here: Path) -> int:
    """What quickstart's exit code must be for a program with text: 0 where there is a route, else 3."""
    return 0 if any(o.works for o in routes.probe(here).offers) else 3


def coverages(said: str) -> list[float]:
    """The totals of the reports."""
    return [float(c) for c in re.findall(r" (\d\.\d{3})  total", said)]


def test_up_again_and_down(
    quickstart: Quickstart, places: Path, here: Path, compiler: Path, full: int
) -> None:
    programs = here / "my programs, all"
    programs.mkdir()
    shutil.copy2(compiler, programs)
    said = quickstart(programs, code=full).stdout
    assert "running" in said
    if not full:
        assert coverages(said)[-1] >= 0.95
    name = str(programs)[1:].replace("/", "-").replace(" ", "_").replace(",", "_")
    mountpoint = places / "mnt/largefs" / name
    assert (mountpoint / "cc1plus").read_bytes() == compiler.read_bytes() or full == 0
    assert (
        subprocess.run([mountpoint / "cc1plus", "--version"], capture_output=True).returncode == 0
    )
    assert len(said.split("What next:\n")[1].splitlines()) == 3

    store = places / "var/lib/largefs" / name
    inode = mountpoint.stat().st_ino, (mountpoint / "cc1plus").stat().st_ctime_ns
    begun = time.monotonic()
    said = quickstart(programs, code=full).stdout
    assert "already" in said
    assert "importing" not in said
    assert time.monotonic() - begun < 30
    assert inode == (mountpoint.stat().st_ino, (mountpoint / "cc1plus").stat().st_ctime_ns)

    said = quickstart("--down").stdout
    assert f"rm -r {store}" in said
    assert not mountpoint.exists()
    assert "nothing is mounted" in quickstart("--down").stdout

    (programs / "new").write_text("new\n")
    said = quickstart(programs, code=full).stdout
    assert re.search(r"2 names \(1 unchanged\), 4 B copied", said), said
    assert (mountpoint / "new").read_text() == "new\n"
    quickstart("--down", mountpoint)


def test_two_at_once(places: Path, here: Path, compiler: Path, full: int) -> None:
    (here / "programs").mkdir()
    shutil.copy2(compiler, here / "programs")
    both = [start(places, here / "programs", here / "m n") for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [full, full], said
    assert sum("already" in text for text in said) == 1, said


def test_a_program_that_nobody_knows_is_mapped_and_not_run(
    quickstart: Quickstart, here: Path, compiler: Path, full: int
) -> None:
    (here / "unknown").mkdir()
    shutil.copy2(compiler, here / "unknown/dangerous")
    said = quickstart(here / "unknown", code=full).stdout
    assert "no program here that quickstart knows how to run" in said
    assert full or coverages(said)[-1] >= 0.95


def test_nothing_to_gain(quickstart: Quickstart, here: Path) -> None:
    (here / "small").mkdir()
    (here / "small/file").write_text("text\n")
    assert "nothing to gain" in quickstart(here / "small").stdout


def test_a_killed_daemon_is_mended(quickstart: Quickstart, places: Path, here: Path) -> None:
    from largefs.store import owner
    from tests.mount_helpers.conftest import end

    (here / "small").mkdir()
    quickstart(here / "small", here / "mnt")
    (store,) = (places / "var/lib/largefs").glob("*/meta.db")
    holder = owner.read(store.parent)
    assert holder
    end(holder.pid)
    time.sleep(0.3)
    assert "mounted at" in quickstart(here / "small", here / "mnt").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/none"], "no such directory"),
        (["/etc/passwd"], "no such directory"),
        (["a", "b", "c"], "too many arguments"),
        (["--up"], "unknown option '--up'"),
        (["--down", "/none"], "nothing of quickstart's is mounted here"),
        (["/usr/lib/ssl", "/proc"], "something else is mounted here"),
    ],
)
def test_bad_arguments_get_one_line(
    quickstart: Quickstart, arguments: list[str], says: str
) -> None:
    said = quickstart(*arguments, code=1).stdout
    assert says in said
    assert said.count("\n") == 1, said


def test_help_tells_the_arguments(quickstart: Quickstart) -> None:
    assert "--down" in quickstart("--help").stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize(
    ("wrapper", "says"),
    [
        ("setpriv --reuid 65534 --clear-groups --", "needs root"),
        # modprobe must not help: this machine's module stays loaded
        ("unshare -m sh -c 'mount -t tmpfs none /dev; exec \"$@\"' sh", "/dev/fuse is missing"),
    ],
)
def test_what_it_needs_gets_one_line(places: Path, here: Path, wrapper: str, says: str) -> None:
    for parent in (here, *here.parents[:3]):
        parent.chmod(0o755)
    copy = here / "quickstart"
    shutil.copy2(CHECKOUT / "mount-helpers/quickstart", copy)
    done = subprocess.run(
        f"{wrapper} {copy} /usr/lib/ssl", shell=True, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_no_network(here: Path) -> None:
    """An empty place, and a network namespace with nothing in it."""
    if reason := reason_not_to_mount():
        pytest.skip(reason)
    done = subprocess.run(
        ["unshare", "-n", CHECKOUT / "mount-helpers/quickstart", "/usr/lib/ssl"],
        env={
            "PATH": "/usr/sbin:/usr/bin",
            "LARGEFS_ROOT": str(here / "root"),
            "PIP_RETRIES": "0",
            "PIP_NO_CACHE_DIR": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "is the network up" in done.stderr.splitlines()[-1]


def test_uninstall(places: Path, quickstart: Quickstart, here: Path) -> None:
    (here / "small").mkdir()
    quickstart(here / "small")
    quickstart("--down")
    done = subprocess.run(
        [CHECKOUT / "mount-helpers/install", "--uninstall"],
        env={**os.environ, "LARGEFS_ROOT": str(places)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Stores are where they were" in done.stdout
    left = [
        str(p.relative_to(places)) for p in places.rglob("*") if not p.is_dir() or p.is_symlink()
    ]
    assert all(p.startswith(("var/lib/largefs/", "run/lock/")) for p in left), left
