"""The probe of routes: what it finds by trying, and that it leaves nothing behind."""

import ctypes
import mmap
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from largefs.channel.protocol import LARGE_FOLIOS, MAX_MAX_PAGES, PASSTHROUGH
from largefs.channel.trial import max_pages_limit
from largefs.hugetext import routes, warm
from largefs.hugetext.routes import Offer, Probe, Route, probe
from tests.hugetext.support import mounted
from tests.mounts import Mounts, largefs
from tests.users import NOBODY, become

pytestmark = pytest.mark.resident

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
    assert found.offered is not None and found.offered & PASSTHROUGH
    assert found.backing


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
def test_store_on_overlayfs(disk: Path) -> None:
    """The lease on the overlay's file is given while a mapping writes the one below it."""
    for name in "lower", "upper", "work", "top":
        (disk / name).mkdir()
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    with mounted("-t", "overlay", "-o", options, "none", str(disk / "top")):
        found = probe(disk / "top")
    assert "stacked on another" in offer(found, Route.PASSTHROUGH).reason
    assert not found.backing


@modern
def test_a_mapping_that_outlives_its_file_on_overlayfs(disk: Path, mounts: Mounts) -> None:
    for name in "lower", "upper", "work", "top":
        (disk / name).mkdir()
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    with mounted("-t", "overlay", "-o", options, "none", str(disk / "top")):
        store = disk / "top/store"
        largefs("mkfs", store)
        m = mounts.make(store=store)
        fd = os.open(m.path / "file", os.O_RDWR | os.O_CREAT)
        os.write(fd, bytes(1 << 20))
        with warm.mapped(fd, 0, 1 << 20, mmap.PROT_READ | mmap.PROT_WRITE) as address:
            os.close(fd)
            time.sleep(1.5)
            before = os.stat(m.path / "file").st_mtime_ns
            ctypes.memset(address, 1, 4096)
        assert os.stat(m.path / "file").st_mtime_ns > before
        m.unmount()
        largefs("check", store, "--data")


WITHOUT_CAP_LEASE = """
import sys
from largefs.hugetext.routes import *
found = probe(sys.argv[1])
print(found.backing, found.best.route.name, found.offers[0].reason)
"""


@modern
def test_store_of_another_user_needs_cap_lease(disk: Path) -> None:
    def found(*bounds: str) -> str:
        argv = ["setpriv", *bounds, sys.executable, "-c", WITHOUT_CAP_LEASE, disk]
        return subprocess.run(
            argv, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
        ).stdout

    os.chown(disk, 65534, 65534)
    assert found("--bounding-set=+all").startswith("True PASSTHROUGH")
    refused = found("--bounding-set=-lease")
    assert refused.startswith("False NONE")
    assert "read leases" in refused


def test_kernel_that_does_not_offer_passthrough(disk: Path) -> None:
    found = probe(disk, offered=0)
    assert "no passthrough" in offer(found, Route.PASSTHROUGH).reason
    assert found.best.route is Route.NONE


def test_folio_needs_requests_of_2_mib(disk: Path) -> None:
    found = probe(disk, offered=LARGE_FOLIOS)
    folio = offer(found, Route.FOLIO)
    assert folio.works == ((max_pages_limit() or MAX_MAX_PAGES) >= 512)
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
            become(NOBODY)
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
