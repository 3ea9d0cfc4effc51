"""Run the programs of unpacked packages at their real paths, before and after alignment.

A directory of hard links merges the packages; overlays put it in front of the machine's own /usr
and /etc, in a mount namespace of its own, without a network. Nothing is installed, nothing is left.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from largefs.hugetext.align import Mode, plan
from tests.elf.files import opened, write_sparse
from tests.elf.packages import CACHE, Package, elf_files, fetch, needed, unpacked


@dataclass(frozen=True)
class Result:
    """What a program did."""

    status: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class Roots:
    """The same packages twice, as they are and aligned."""

    before: Path
    after: Path
    changed: list[str]
    """Paths, from the root, of the files that alignment changed."""

    def run(self, root: Path, work: Path, *argv: str, seconds: int = 60) -> Result:
        """Run a program in one of the roots, with `work` as /tmp and as its directory."""
        script = """
            for top in usr etc; do
                [ -d "$1/$top" ] || continue
                mount -t overlay none -o "lowerdir=$1/$top:/$top" "/$top" || exit
            done
            mount --bind "$2" /tmp && cd /tmp && shift 2 && exec "$@"
        """
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/tmp",
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
        }
        # fmt: off
        command = [
            "unshare", "--mount", "--net", "--pid", "--mount-proc", "--fork", "--kill-child",
            "timeout", "-k", "5", str(seconds), "sh", "-c", script, "-",
            str(root), str(work), *argv,
        ]
        # fmt: on
        run = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, cwd="/"
        )
        return Result(run.returncode, run.stdout, run.stderr)


@contextmanager
def roots(packages: list[Package]) -> Iterator[Roots]:
    """The packages and what they need that the machine lacks. Raises Unreachable."""
    every = needed(packages)
    fetch(every)
    trees = [unpacked(package) for package in every]
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".roots-") as directory:
        before, after = Path(directory) / "before", Path(directory) / "after"
        for tree in trees:
            merge(tree, before)
        subprocess.run(["cp", "-al", before, after], check=True)
        yield Roots(before, after, align_all(after))


def merge(tree: Path, root: Path) -> None:
    """Hard links to all files of `tree` in `root`, /bin and /lib in /usr as on the machine."""
    for top in sorted(tree.iterdir()):
        usr = re.fullmatch("bin|sbin|lib(32|64|x32)?", top.name) and not top.is_symlink()
        target = root / "usr" if usr else root
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-alf", top, target], check=True)


def align_all(root: Path) -> list[str]:
    """Align every ELF file under `root` as an importer would; the cache's own stay whole."""
    changed = []
    for path in elf_files(root):
        with opened(path) as view:
            p = plan(view, Mode.AUTO)
            if not p.changed:
                continue
            new = path.with_name(path.name + ".aligned")
            write_sparse(view, p.layout, new)
            shutil.copymode(path, new)
        os.rename(new, path)
        changed.append(str(path.relative_to(root)))
    return changed


def why_not() -> str | None:
    """Why programs cannot be run this way here, or None."""
    if os.geteuid() != 0:
        return "needs root, for mount namespaces"
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as work:
        (Path(empty) / "usr").mkdir()
        tried = Roots(Path(empty), Path(empty), []).run(Path(empty), Path(work), "true")
    if tried.status:
        return f"no overlay in a mount namespace here: {tried.stderr.decode().strip()}"
    return None
