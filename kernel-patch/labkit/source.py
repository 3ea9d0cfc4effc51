"""Kernel sources: Debian's source packages, fetched through a private apt configuration.

The machine's own apt sources are not touched: the lab keeps a list and a state directory in its
cache, with the mirror that this machine already uses for Debian. A tarball put into the cache by
hand (`sources/PACKAGE_VERSION.tar.xz`) is used as it is, on any distribution.
"""

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from labkit.cache import CannotRunError, LabError, directory, lock, run, say
from labkit.matrix import Entry

# What building and booting needs beyond tests/set-up's packages
PACKAGES = (
    *("bc", "bison", "ccache", "cpio", "e2fsprogs", "flex", "gcc", "git", "libelf-dev"),
    *("libssl-dev", "make", "patch", "perl", "python3-venv", "qemu-system-x86", "xz-utils"),
)

# Signs every Debian release, so that an older one can fetch a newer one's source
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def install_packages(*more: str) -> None:
    """Install the Debian packages that the lab needs; raises CannotRunError if it may not."""
    if platform.machine() != "x86_64":
        raise CannotRunError(f"the lab builds kernels for x86_64, and this is {platform.machine()}")
    if not shutil.which("dpkg-query"):
        return  # not Debian: whatever is missing will say so itself
    missing = [p for p in (*PACKAGES, *more) if not _installed(p)]
    if not missing:
        return
    if os.geteuid():
        raise CannotRunError(f"as root, first: apt-get install {' '.join(missing)}")
    say(f"installing {' '.join(missing)}")
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    log = directory("runs") / "apt.log"
    apt = ("apt-get", "-q", "-o", "DPkg::Lock::Timeout=600")
    run(*apt, "update", env=env, log=log)
    run(*apt, "install", "-y", "--no-install-recommends", *missing, env=env, log=log)


def fetch(entry: Entry) -> Path:
    """Return the entry's source tarball, from the cache or else from Debian's archive."""
    sources = directory("sources")
    have = sorted(sources.glob(f"{entry.package}_*.tar.xz"), key=lambda p: p.stat().st_mtime)
    if have:
        return have[-1]
    with lock("apt"):
        env = _private_apt(entry)
        say(f"fetching {entry.package} from {entry.suite}")
        run("apt-get", "-q", "update", env=env)
        download = directory("apt/download")
        for old in download.glob("*.deb"):
            old.unlink()
        run("apt-get", "-q", "download", entry.package, cwd=download, env=env)
        (deb,) = download.glob("*.deb")
        version = run("dpkg-deb", "-f", deb, "Version").strip()
        unpacked = download / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        run("dpkg-deb", "-x", deb, unpacked)
        tarball = sources / f"{entry.package}_{version}.tar.xz"
        (unpacked / "usr/src" / f"{entry.package}.tar.xz").replace(tarball)
        shutil.rmtree(download)
    return tarball


def version_of(tarball: Path) -> str:
    """The Debian version in a tarball's name."""
    return tarball.name.removesuffix(".tar.xz").partition("_")[2]


def unpack(tarball: Path, tree: Path, patches: Sequence[Path] = ()) -> None:
    """Make `tree` the source in `tarball` with the patches, in place of whatever is there."""
    run("rm", "-rf", tree)  # many times quicker than shutil.rmtree() on 90,000 files
    tree.mkdir(parents=True)
    run("tar", "-xf", tarball, "-C", tree, "--strip-components=1")
    for patch in patches:
        run("patch", "-p1", "-F0", "-f", "-i", patch, cwd=tree)


def _installed(package: str) -> bool:
    try:
        out = run("dpkg-query", "-W", "-f=${Status}", package)
    except LabError:
        return False
    return "ok installed" in out


def _private_apt(entry: Entry) -> dict[str, str]:
    """Write the private apt configuration for the entry's suite; return the environment for it."""
    uri = _debian_mirror()
    apt = directory("apt")
    directory("apt/sources.list.d")
    directory("apt/lists/partial")
    directory("apt/cache/archives/partial")
    (apt / "sources.list.d" / f"{entry.suite}.sources").write_text(
        f"Types: deb\nURIs: {uri}\nSuites: {entry.suite}\nComponents: main\n"
        + (f"Signed-By: {KEYRING}\n" if KEYRING.exists() else "")
    )
    conf = apt / "apt.conf"
    conf.write_text(
        f'Dir::Etc::SourceList "/dev/null";\n'
        f'Dir::Etc::SourceParts "{apt}/sources.list.d";\n'
        f'Dir::State::Lists "{apt}/lists";\n'
        f'Dir::Cache "{apt}/cache";\n'
        f'APT::Sandbox::User "root";\n'
    )
    return {"APT_CONFIG": str(conf)}


def _debian_mirror() -> str:
    """URI of the archive that this machine's own apt sources name for its release."""
    try:
        codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
        targets = run("apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)")
    except (OSError, KeyError, LabError):
        codename, targets = "", ""
    for line in targets.splitlines():
        release, component, uri = line.split(maxsplit=2)
        if (release, component) == (codename, "main"):
            return uri
    raise CannotRunError(
        "no Debian mirror in this machine's apt sources: put the source tarball into "
        f"{directory('sources')} as PACKAGE_VERSION.tar.xz"
    )
