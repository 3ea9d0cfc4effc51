"""`lab check`: the series as a maintainer would first try it.

On the pristine source: `git am` takes every patch; checkpatch.pl --strict finds nothing in any;
after each patch the kernel builds with the option off and, from where it exists, on; and the files
that the patch touches bring no new warning from `make W=1` nor from sparse.
"""

import re
import subprocess
from pathlib import Path

from labkit import source
from labkit.build import configure, make
from labkit.cache import LabError, directory, lock, run, say
from labkit.matrix import ENTRIES, Entry

_GIT = ("git", "-c", "user.name=lab", "-c", "user.email=lab@localhost", "-c", "gc.auto=0")


def check() -> int:
    """Check the series; returns 0 when nothing was found, 1 with the findings printed otherwise."""
    entry = ENTRIES["7.3-series"]
    source.install_packages("sparse")
    tarball = source.fetch(entry)
    tree, log = directory("build") / "check", directory("runs") / "check.log"
    found = []
    with lock("check"):
        log.write_text("")
        say(f"unpacking {tarball.name} into a repository (log: {log})")
        source.unpack(tarball, tree)
        run(*_GIT, "init", "-q", cwd=tree)
        run(*_GIT, "add", "-A", "-f", cwd=tree)
        run(*_GIT, "commit", "-q", "-m", "pristine", cwd=tree)
        for patch in entry.patches:
            say(f"checking {patch.name}")
            found += [f"{patch.name}: {f}" for f in _check_patch(entry, patch, tree, log)]
        run("rm", "-rf", tree)
    print("\n".join(found) or f"{len(entry.patches)} patches: 0 errors, 0 warnings, all build")
    return bool(found)


def _check_patch(entry: Entry, patch: Path, tree: Path, log: Path) -> list[str]:
    """Apply one patch to the tree and return what is wrong with it, a line each."""
    found = _checkpatch(tree, patch)
    touched = _objects(patch, tree)
    configure(_fragments(entry, tree)[-1], tree, log)
    before = _warnings(tree, touched)
    run(*_GIT, "am", "-q", patch, cwd=tree)
    for fragments in _fragments(entry, tree):
        names = "+".join(f.stem for f in fragments)
        try:
            configure(fragments, tree, log)
            make(tree, "bzImage", log=log)
        except LabError as e:
            found.append(f"does not build with {names}: {e}")
        else:
            found += sorted(_warnings(tree, touched) - before)
    return found


def _fragments(entry: Entry, tree: Path) -> list[list[Path]]:
    """The configurations to build: without the series' option and, once it exists, with it."""
    *base, series = entry.fragment_files
    exists = "config RO_EXEC_FILEMAP_HUGE_FAULT_THP" in (tree / "mm/Kconfig").read_text()
    return [base, [*base, series]] if exists else [base]


def _checkpatch(tree: Path, patch: Path) -> list[str]:
    command = ["perl", "scripts/checkpatch.pl", "--strict", "--terse", "--no-summary", str(patch)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return lines or ([f"checkpatch failed: {done.stderr.strip()}"] if done.returncode else [])


def _objects(patch: Path, tree: Path) -> list[str]:
    """The objects of the C files that a patch changes, where the kernel itself is built of them."""
    names = re.findall(r"^\+\+\+ b/((?:fs|mm)/\S+)\.c$", patch.read_text(), re.MULTILINE)
    return [f"{name}.o" for name in names if (tree / f"{name}.c").exists()]


def _warnings(tree: Path, objects: list[str]) -> set[str]:
    """What W=1 and sparse say of some objects, without line numbers, which every patch moves."""
    said = set()
    for name in objects:
        (tree / name).unlink(missing_ok=True)
        command = ["make", "-s", "W=1", "C=2", name]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        for line in (done.stdout + done.stderr).splitlines():
            if "warning:" in line or "error:" in line:
                said.add(re.sub(r":\d+(:\d+)?:", ":", line))
    return said
