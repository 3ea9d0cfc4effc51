"""Real ELF files: Debian packages, unpacked into a cache outside the tree.

The cache is ${XDG_CACHE_HOME:-~/.cache}/largefs/packages/NAME_VERSION/, filled by `apt-get
download` and `dpkg-deb -x`; nothing is installed. Delete it whenever you like.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "largefs" / "packages"


def _listed(part: str) -> list[str]:
    return re.sub("#.*", "", part).split()


_parts = (Path(__file__).parent / "packages.list").read_text().split("====")
_default, PROGRAMS, _more = map(_listed, _parts)
PACKAGES = _default + _more * (os.environ.get("LARGEFS_PACKAGES") == "all")
"""What to check: `NAME` or `NAME|NAME-IN-A-NEWER-RELEASE`. PROGRAMS are what is run besides."""


class Unreachable(Exception):  # noqa: N818
    """The archive does not have the package, or cannot be reached. The text is the reason."""


class Package(NamedTuple):
    """A package of the archive, at the version that apt would install here."""

    name: str
    version: str
    arch: str = ""
    """Empty for the machine's own architecture, or another."""


def find(names: str) -> Package:
    """What "NAME[:ARCH]|NAME-IN-A-NEWER-RELEASE[:ARCH]" means here. Raises Unreachable."""
    for full in names.split("|"):
        name, _, arch = full.partition(":")
        if version := _candidates(arch).get(name):
            return Package(name, version, arch)
    raise Unreachable(f"apt knows no package {names}")


@functools.cache
def _candidates(arch: str) -> dict[str, str]:
    """Versions of every package of an architecture that the tests may name, by one call."""
    every = [n.partition(":") for names in [*PACKAGES, *PROGRAMS] for n in names.split("|")]
    names = sorted({name for name, _, its_arch in every if its_arch == arch})
    policy = ["apt-cache", *_apt(arch), "policy", *names]
    said = subprocess.run(policy, capture_output=True, text=True).stdout
    return dict(re.findall(r"(?m)^(\S+):\n.*\n  Candidate: ([^(\s]\S*)", said))


@functools.cache
def _apt(arch: str) -> tuple[str, ...]:
    """Options for apt's tools, once they have package lists.

    Another architecture has lists of its own in the cache: the machine's apt stays as it is.
    """
    lists, options = Path("/var/lib/apt/lists"), ["-oAPT::Sandbox::User=root"]
    if arch:
        home = CACHE / f".apt-{arch}"
        lists = home / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        (home / "status").touch()
        (home / "sources.list").write_text(_source())
        settings = {
            "APT::Architecture": arch,
            "APT::Architectures::": arch,
            "Acquire::Languages": "none",
            "Dir::State": home,
            "Dir::State::status": home / "status",
            "Dir::Cache": home,
            "Dir::Etc::sourcelist": home / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
        }
        options += [f"-o{key}={value}" for key, value in settings.items()]
    if not any(lists.glob("*_Packages*")):
        subprocess.run(["apt-get", *options, "-qq", "update"], capture_output=True)
    return tuple(options)


def _source() -> str:
    """A line of sources.list for Debian's main archive, from where the machine has its own."""
    show = ["apt-get", *_apt(""), "download", "--print-uris", "bash"]
    uri = re.search(r"'(\S+)/pool/", subprocess.run(show, capture_output=True, text=True).stdout)
    release = re.search(r"VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text())
    if not uri or not release:
        return ""
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    return f"deb [signed-by={key}] {uri[1]} {release[1]} main\n"


def needed(packages: list[Package]) -> list[Package]:
    """The packages, and what they depend on that this machine lacks. Raises Unreachable."""
    plan = [
        "apt-get",
        *_apt(""),
        "-s",
        "install",
        "--no-install-recommends",
        *(p.name for p in packages),
    ]
    said = subprocess.run(plan, capture_output=True, text=True)
    if said.returncode:
        raise Unreachable(f"apt cannot tell what programs need: {said.stderr.strip()[-300:]}")
    others = [Package(*m) for m in re.findall(r"(?m)^Inst (\S+) (?:\[\S+\] )?\((\S+)", said.stdout)]
    return sorted({*packages, *others})


def unpacked(package: Package) -> Path:
    """The directory that holds a package's files. Raises Unreachable."""
    fetch([package])
    return _home(package)


def fetch(packages: list[Package]) -> None:
    """Download and unpack what the cache lacks, in one go. Raises Unreachable."""
    missing = [package for package in packages if not _home(package).is_dir()]
    if not missing:
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".new-") as new:
        for arch in {package.arch for package in missing}:
            names = [f"{p.name}={p.version}" for p in missing if p.arch == arch]
            get = ["apt-get", *_apt(arch), "-q", "download", *names]
            download = subprocess.run(get, cwd=new, capture_output=True, text=True)
            if download.returncode:
                raise Unreachable(f"apt-get download fails: {download.stderr.strip()[-300:]}")
        for package in missing:
            (deb,) = Path(new).glob(f"{package.name}_*_{package.arch or '*'}.deb")
            tree = Path(new) / package.name
            subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
            deb.unlink()
            shutil.rmtree(tree / "usr/share/doc", ignore_errors=True)
            if not _home(package).is_dir():
                tree.rename(_home(package))


def _home(package: Package) -> Path:
    name = "_".join(filter(None, package))
    return CACHE / name.replace(":", "%3a")


def elf_files(tree: Path) -> Iterator[Path]:
    """Every regular file in `tree` that begins as an ELF file, in a stable order."""
    for directory, subdirectories, files in os.walk(tree):
        subdirectories.sort()
        for file in sorted(files):
            path = Path(directory) / file
            if path.is_symlink() or not path.is_file():
                continue
            with path.open("rb") as opened:
                if opened.read(4) == b"\x7fELF":
                    yield path
