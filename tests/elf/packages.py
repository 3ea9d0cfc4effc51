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

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "largefs" / "packages"

_EVERY_DAY, _MORE = (Path(__file__).parent / "packages.list").read_text().split("# Only with")
_ALL = os.environ.get("LARGEFS_PACKAGES") == "all"
PACKAGES = re.sub("#.*|LARGEFS.*", "", _EVERY_DAY + _MORE * _ALL).split()


class Unreachable(Exception):  # noqa: N818
    """The archive does not have the package, or cannot be reached. The text is the reason."""


@functools.cache
def candidate(names: str) -> tuple[str, str]:
    """Name and version that apt would install of "NAME|NEWER-NAME". Raises Unreachable."""
    for name in names.split("|"):
        for attempt in range(2):
            policy = subprocess.run(["apt-cache", "policy", name], capture_output=True, text=True)
            match = re.search(r"Candidate: ([^(\s]\S*)", policy.stdout)
            if match:
                return name, match[1]
            if attempt == 0 and not _have_lists():
                update = ["apt-get", "-qq", "update"]
                if subprocess.run(update, capture_output=True).returncode:
                    raise Unreachable("apt has no package lists here, and cannot get them")
    raise Unreachable(f"apt knows no package {names}")


@functools.cache
def _have_lists() -> bool:
    return any(Path("/var/lib/apt/lists").glob("*_Packages*"))


def unpacked(names: str) -> Path:
    """The directory that holds a package's files. Raises Unreachable."""
    name, version = candidate(names)
    home = CACHE / f"{name}_{version.replace(':', '%3a')}"
    if home.is_dir():
        return home
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".new-") as new:
        download = subprocess.run(
            ["apt-get", "-q", "download", f"{name}={version}"],
            cwd=new,
            capture_output=True,
            text=True,
        )
        debs = list(Path(new).glob("*.deb"))
        if download.returncode or not debs:
            raise Unreachable(f"cannot download {name} {version}: {download.stderr.strip()[-200:]}")
        tree = Path(new) / "tree"
        subprocess.run(["dpkg-deb", "-x", debs[0], tree], check=True)
        shutil.rmtree(tree / "usr/share/doc", ignore_errors=True)
        if not home.is_dir():
            tree.rename(home)
    return home


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
