"""Building a kernel: fragments on allnoconfig, one bzImage with no modules, into the cache."""

import os
import shutil
from pathlib import Path

from labkit import source
from labkit.cache import LabError, directory, lock, run, say
from labkit.matrix import Entry, key


def build(entry: Entry) -> Path:
    """Return the entry's bzImage, from the cache or else built from source (minutes)."""
    if entry.series and not entry.patches:
        raise LabError("there are no patches in kernel-patch/series")
    source.install_packages()
    tarball = source.fetch(entry)
    kernel = directory("kernels") / f"{entry.name}-{key(entry, source.version_of(tarball))}"
    with lock(f"build-{entry.name}"):
        if not (kernel / "bzImage").exists():
            _build(entry, tarball, kernel)
    return kernel / "bzImage"


def make(tree: Path, *arguments: str, log: Path) -> None:
    """Run make in a kernel tree with the lab's compiler cache; raises LabError if it fails.

    Building in the tree keeps every path relative: ccache serves one kernel with another's objects.
    """
    env = {
        "CCACHE_DIR": str(directory("ccache")),
        "CCACHE_MAXSIZE": "8G",
        "KBUILD_BUILD_TIMESTAMP": "@0",
        "KBUILD_BUILD_USER": "lab",
        "KBUILD_BUILD_HOST": "largefs",
    }
    jobs = f"-j{(os.cpu_count() or 1) + 1}"
    run("make", "-s", jobs, "CC=ccache gcc", *arguments, cwd=tree, env=env, log=log)


def configure(fragments: list[Path], tree: Path, log: Path) -> None:
    """Write .config from fragments on allnoconfig; raises LabError if Kconfig dropped a line."""
    wanted: dict[str, str] = {}
    for fragment in fragments:
        for line in fragment.read_text().splitlines():
            if line and not line.startswith("#"):
                wanted[line.partition("=")[0]] = line
    merged = tree / "fragments.config"
    merged.write_text("\n".join(wanted.values()) + "\n")
    make(tree, f"KCONFIG_ALLCONFIG={merged}", "allnoconfig", log=log)
    got = set((tree / ".config").read_text().splitlines())
    if dropped := [line for line in wanted.values() if line not in got]:
        raise LabError(f"Kconfig did not take {', '.join(dropped)}: see {log}")


def _build(entry: Entry, tarball: Path, kernel: Path) -> None:
    log = directory("runs") / f"build-{entry.name}.log"
    log.write_text("")
    say(f"building {entry.name} from {tarball.name}: some minutes the first time (log: {log})")
    tree = directory("build") / entry.name
    source.unpack(tarball, tree, entry.patches)
    configure(entry.fragment_files, tree, log)
    make(tree, "bzImage", log=log)

    for old in kernel.parent.glob(f"{entry.name}-[0-9]*"):
        shutil.rmtree(old)
    new = kernel.with_name(f".{kernel.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    shutil.copy(tree / ".config", new / "config")
    shutil.copy(tree / "arch/x86/boot/bzImage", new / "bzImage")
    new.rename(kernel)
    run("rm", "-rf", tree)
