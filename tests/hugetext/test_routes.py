"""The probe of routes: what it finds by trying, and that it leaves nothing behind."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from largefs.hugetext import routes
from largefs.hugetext.routes import FUSE_LARGE_FOLIOS, FUSE_PASSTHROUGH, Offer, Probe, Route, probe
from tests.hugetext.support import mounted

modern = pytest.mark.skipif(
    routes.kernel_version() < (6, 9), reason="FUSE passthrough needs Linux 6.9"
)


def offer(found: Probe, route: Route) -> Offer:
    return next(offer for offer in found.offers if offer.route is route)


@modern
@pytest.mark.parametrize("fstype", ["host", "xfs", "tmpfs"])
def test_passthrough_works(fstype: str, filesystem: Callable[[str], Path], disk: Path) -> None:
    found = probe(disk if fstype == "host" else filesystem(fstype))
    assert found.best.route is Route.PASSTHROUGH
    assert found.offered is not None and found.offered & FUSE_PASSTHROUGH
    assert found.stack_depth == 1


# The directories of / mounted below a directory that is itself no mountpoint, and that as the root.
CHROOT = """
set -eu
cd "$1"
for d in /*; do
    if [ -L "$d" ]; then cp -P "$d" .; elif [ -d "$d" ]; then mkdir ".$d"; mount --rbind "$d" ".$d"; fi
done
mkdir -p store
exec chroot . "$2" -c 'from largefs.hugetext.routes import *
print(filesystem_type("/store"), probe("/store").best.route.name)'
"""


@modern
def test_in_a_chroot_that_is_no_mountpoint(disk: Path) -> None:
    root = disk / "root"
    root.mkdir()
    argv = ["unshare", "-m", "sh", "-c", CHROOT, "sh", root, sys.executable]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == [routes.filesystem_type(disk), "PASSTHROUGH"], done.stderr


@modern
def test_store_without_large_folios(filesystem: Callable[[str], Path]) -> None:
    found = probe(filesystem("small-folios"))
    assert found.best.route is Route.NONE
    assert "no 2 MiB folio" in offer(found, Route.PASSTHROUGH).reason
    assert offer(found, Route.PASSTHROUGH).remedy


@modern
def test_store_on_overlayfs_needs_one_more_level(disk: Path) -> None:
    for name in "lower", "upper", "work", "top":
        (disk / name).mkdir()
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    with mounted("-t", "overlay", "-o", options, "none", str(disk / "top")):
        found = probe(disk / "top")
        assert found.stack_depth == 2
        assert found.best.route is Route.PASSTHROUGH
        for name in "upper2", "work2", "top2":
            (disk / name).mkdir()
        nested = f"lowerdir={disk}/top,upperdir={disk}/upper2,workdir={disk}/work2"
        with mounted("-t", "overlay", "-o", nested, "none", str(disk / "top2")):
            found = probe(disk / "top2")
            assert "too deep" in offer(found, Route.PASSTHROUGH).reason


def test_kernel_that_does_not_offer_passthrough(disk: Path) -> None:
    found = probe(disk, offered=0)
    assert "no passthrough" in offer(found, Route.PASSTHROUGH).reason
    assert found.best.route is Route.NONE


def test_folio_needs_requests_of_2_mib(disk: Path) -> None:
    found = probe(disk, offered=FUSE_LARGE_FOLIOS)
    folio = offer(found, Route.FOLIO)
    assert folio.works == ((routes.max_pages_limit() or 256) >= 512)
    assert not offer(probe(disk, offered=0), Route.FOLIO).works


def test_collapse_says_what_the_kernel_says(disk: Path, map_file: Callable[..., int]) -> None:
    """Against the kernel's own configuration, where it can be read."""
    if not os.path.exists("/proc/config.gz"):
        pytest.skip("the kernel does not show its configuration")
    config = subprocess.run(["zcat", "/proc/config.gz"], capture_output=True, text=True).stdout
    wanted = "CONFIG_READ_ONLY_THP_FOR_FS=y" in config
    assert offer(probe(disk), Route.COLLAPSE).works == wanted


def test_nothing_is_left(disk: Path) -> None:
    descriptors = os.listdir("/proc/self/fd")
    mounts = Path("/proc/self/mountinfo").read_text()
    for _ in range(3):
        probe(disk)
    assert os.listdir(disk) == []
    assert os.listdir("/proc/self/fd") == descriptors
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_unwritable_directory(disk: Path) -> None:
    with pytest.raises(OSError):
        probe(disk / "missing")


def test_without_privilege(disk: Path) -> None:
    disk.chmod(0o777)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.write(writer, pickle.dumps(probe(disk)))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as f:
        found: Probe = pickle.loads(f.read())
    assert os.waitpid(child, 0)[1] == 0
    assert found.best.route is Route.NONE
    assert found.offered is None
    if routes.kernel_version() >= (6, 9):
        assert offer(found, Route.PASSTHROUGH).remedy == "mount as root"
