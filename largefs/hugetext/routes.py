"""Routes: which ways to a 2 MiB page the running kernel offers to a store, found by trying them.

probe() makes a 4 MiB file in the store's directory, warms it, looks at its folios, opens a FUSE
connection of its own in a private mount namespace, and hands it that file as a backing file.
Nothing of it remains. docs/routes.md tells users the rules.
"""

import contextlib
import errno
import mmap
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from largefs.channel import trial
from largefs.channel.protocol import LARGE_FOLIOS, MAX_MAX_PAGES, PASSTHROUGH
from largefs.channel.trial import Trial
from largefs.hugetext import mappings, warm
from largefs.hugetext.mappings import PMD
from largefs.store.backing import has_writer

THP = Path("/sys/kernel/mm/transparent_hugepage")

_TRIAL_SIZE = 2 * PMD
_CAP_SYS_ADMIN = 21


class Route(Enum):
    """A way to get a 2 MiB folio under a mapping, best first."""

    PASSTHROUGH = "passthrough"
    FOLIO = "folio"
    COLLAPSE = "collapse"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Offer:
    """Whether a route is open, why, and what would open it."""

    route: Route
    works: bool  # the kernel and the store allow it
    reason: str
    remedy: str = ""  # empty if there is nothing to do


@dataclass(frozen=True, slots=True)
class Probe:
    """What probe() found."""

    offers: tuple[Offer, ...]  # in the order of preference
    offered: (
        int | None
    )  # FUSE INIT flags that the kernel offers, flags2 in the upper half; None if not known
    backing: bool  # whether passthrough to this store is right, whatever its folios

    @property
    def best(self) -> Offer:
        """The first route that works; Route.NONE always does."""
        return next(offer for offer in self.offers if offer.works)


def probe(store_dir: str | os.PathLike[str], offered: int | None = None) -> Probe:
    """Try every route for a store in `store_dir`, which must be a writable directory; OSError if it
    is not.

    `offered`: the INIT flags of a connection that is already there; else they are asked for, which
    takes CAP_SYS_ADMIN.
    """
    with _trial_file(store_dir) as fd:
        writers_seen = _try_writer(fd)
        warmed = _try_warm(fd)
        fuse = _try_fuse(fd)
        collapse_error = _try_collapse(fd)
    fstype = filesystem_type(store_dir)
    if offered is None:
        offered = fuse.offered
    return Probe(
        offers=(
            _passthrough(offered, warmed, fuse, fstype, writers_seen),
            _folio(offered),
            _collapse(collapse_error, fstype),
            Offer(Route.NONE, True, "everything works, in 4 KiB pages"),
        ),
        offered=offered,
        backing=fuse.registered and writers_seen,
    )


def kernel_version() -> tuple[int, int]:
    """Major and minor version of the running kernel."""
    major, minor = re.findall(r"\d+", platform.release())[:2]
    return int(major), int(minor)


def has_cap_sys_admin() -> bool:
    """Whether this process has CAP_SYS_ADMIN in the initial user namespace, as passthrough asks
    for.
    """
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read("/proc/self/status"), re.MULTILINE)
    whole = _read("/proc/self/uid_map").split() == ["0", "0", "4294967295"]
    return whole and effective is not None and bool(int(effective[1], 16) >> _CAP_SYS_ADMIN & 1)


def filesystem_type(path: str | os.PathLike[str]) -> str:
    """Type of the filesystem that holds `path`, as in mountinfo; 'unknown' if not found."""
    inside = os.path.realpath(path)
    found = ""
    longest = -1
    for mount in mappings.mounts():
        root = mount.mountpoint.rstrip("/") + "/"
        if (inside + "/").startswith(root) and len(root) >= longest:
            found, longest = mount.fstype, len(root)
    return found or _filesystem_type_outside(inside)


def _filesystem_type_outside(path: str) -> str:
    """The same in a chroot, from where the mount that holds `path` cannot be seen."""
    with contextlib.suppress(OSError):
        device = os.stat(path).st_dev
        for mount in mappings.mounts(1):
            if mount.device == device:
                return mount.fstype
    return "unknown"


def _passthrough(
    offered: int | None, warmed: "_Warmed", fuse: Trial, fstype: str, writers_seen: bool
) -> Offer:
    def closed(reason: str, remedy: str) -> Offer:
        return Offer(Route.PASSTHROUGH, False, reason, remedy)

    if (offered is not None and not offered & PASSTHROUGH) or kernel_version() < (6, 9):
        return closed(
            "this kernel's FUSE has no passthrough",
            "run Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH",
        )
    if not has_cap_sys_admin():
        return closed("no CAP_SYS_ADMIN in the initial user namespace", "mount as root")
    if fuse.error == errno.ELOOP:
        return closed(
            f"the store's filesystem ({fstype}) is stacked on another",
            "put the store on ext4, xfs or tmpfs itself",
        )
    if fuse.error:
        return closed(f"trial of a backing file: {os.strerror(fuse.error)}", "")
    if not writers_seen:
        return closed(
            f"on the store's filesystem ({fstype}) read leases do not tell who still writes a file",
            "put the store on ext4, xfs or tmpfs; give the daemon CAP_LEASE, or its user the store",
        )
    if not THP.exists():
        return closed(
            "this kernel has no transparent huge pages", "run one with CONFIG_TRANSPARENT_HUGEPAGE"
        )
    if warmed.error:
        return closed(f"trial of a warm-up in the store: {os.strerror(warmed.error)}", "")
    if "THP_enabled:\t0\n" in _read("/proc/self/status"):
        return closed(
            "2 MiB pages are switched off for this process (PR_SET_THP_DISABLE)",
            "start it without that",
        )
    if not warmed.in_pmd:
        return closed(
            f"the store's filesystem ({fstype}) gave a trial file no 2 MiB folio",
            "put the store on xfs, on ext4 (Linux 6.16 or later), or on tmpfs",
        )
    return Offer(Route.PASSTHROUGH, True, f"a trial file on {fstype} was mapped by 2 MiB pages")


def _folio(offered: int | None) -> Offer:
    if offered is None:
        return Offer(
            Route.FOLIO, False, "what the kernel's FUSE offers is not known", "ask as root"
        )
    if not offered & LARGE_FOLIOS:
        return Offer(
            Route.FOLIO,
            False,
            "this kernel's FUSE does not offer large folios",
            "run a kernel with the patches in kernel-patch/",
        )
    limit = trial.max_pages_limit() or MAX_MAX_PAGES
    if limit < PMD // mappings.PAGE:
        return Offer(
            Route.FOLIO,
            False,
            f"the kernel offers large folios, but requests end at {limit} pages",
            f"sysctl fs.fuse.max_pages_limit={PMD // mappings.PAGE}",
        )
    return Offer(Route.FOLIO, True, "this kernel's FUSE offers large folios")


def _collapse(error: int, fstype: str) -> Offer:
    if kernel_version() >= (7, 2):
        return Offer(
            Route.COLLAPSE, False, "this kernel collapses no text of FUSE: 7.2 dropped the option"
        )
    if error:
        return Offer(
            Route.COLLAPSE,
            False,
            f"trial of MADV_COLLAPSE on a file: {os.strerror(error)}",
            "run Linux 6.1 to 7.1 with CONFIG_READ_ONLY_THP_FOR_FS",
        )
    if fstype == "tmpfs":  # collapses on any kernel, and so tells nothing of other filesystems
        return Offer(Route.COLLAPSE, False, "a store on tmpfs cannot be used to try MADV_COLLAPSE")
    return Offer(Route.COLLAPSE, True, "MADV_COLLAPSE works on files")


@contextlib.contextmanager
def _trial_file(directory: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor, for reading only, of a file of incompressible data that has no name, and belongs to
    the owner of the directory.
    """
    with tempfile.TemporaryFile(dir=directory) as writer:
        writer.write(os.urandom(_TRIAL_SIZE))
        writer.flush()
        with contextlib.suppress(OSError):
            os.fchown(writer.fileno(), os.stat(directory).st_uid, -1)
        reader = _reopen(writer.fileno(), os.O_RDONLY)
    try:
        yield reader
    finally:
        os.close(reader)


def _reopen(fd: int, flags: int) -> int:
    """open(2) of an open file that may have no name."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def _try_writer(fd: int) -> bool:
    """Whether has_writer() tells a shared mapping of the file, which outlives its descriptor, from none."""
    with contextlib.ExitStack() as mapped:
        writer = _reopen(fd, os.O_RDWR)
        try:
            mapped.enter_context(warm.mapped(writer, 0, PMD, mmap.PROT_READ | mmap.PROT_WRITE))
        finally:
            os.close(writer)
        seen = has_writer(fd)
    return seen and not has_writer(fd)


@dataclass(frozen=True, slots=True)
class _Warmed:
    in_pmd: int = 0
    error: int = 0


def _try_warm(fd: int) -> _Warmed:
    try:
        return _Warmed(in_pmd=warm.warm_range(fd, 0, _TRIAL_SIZE).in_pmd)
    except OSError as e:
        return _Warmed(error=e.errno or errno.EIO)


def _try_collapse(fd: int) -> int:
    """Error number of MADV_COLLAPSE on an executable mapping of the file; 0 if it worked."""
    protection = mmap.PROT_READ | mmap.PROT_EXEC
    try:
        with warm.mapped(fd, 0, PMD, protection) as start:
            warm.madvise(start, PMD, warm.MADV_COLLAPSE)
    except OSError as e:
        return e.errno or errno.EIO
    return 0


def _try_fuse(fd: int) -> Trial:
    """What FUSE offers, and whether it takes `fd` as a backing file; with no privilege, nothing is
    known.
    """
    return trial.connect(fd) if has_cap_sys_admin() else Trial()


def _read(path: str | Path) -> str:
    """Text of a file of /proc or /sys; '' if it is not there."""
    try:
        with open(path) as f:
            return f.read()
    except OSError:
        return ""
