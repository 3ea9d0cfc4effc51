"""Run largefs stress on one filesystem after another, and print the table of docs/stress.md.

As root: .venv/bin/python -m tests.stress.table [--seconds N] [--results DIR] [FILESYSTEM…], with N seconds
(600) for each of the FILESYSTEMs: all that are listed below, by default. What `largefs stress` printed, and
the replay file of a difference, stay in DIR (by default the working directory).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.mounts import LARGEFS, Mounts

IMAGE = 8 << 30  # bytes, sparse


@contextlib.contextmanager
def kernel_mount(scratch: Path, *arguments: str) -> Iterator[Path]:
    """A filesystem of the kernel, by arguments of mount(8)."""
    target = scratch / "mnt"
    target.mkdir()
    subprocess.run(["mount", *arguments, target], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True)


@contextlib.contextmanager
def on_image(scratch: Path, kind: str) -> Iterator[Path]:
    """A new filesystem in a file."""
    image = scratch / "image"
    with image.open("wb") as out:
        out.truncate(IMAGE)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    with kernel_mount(scratch, "-o", "loop", str(image)) as target:
        yield target


@contextlib.contextmanager
def largefs_mount(scratch: Path, route: str) -> Iterator[Path]:
    """A new largefs; when it goes, its log must be silent and its store clean."""
    mounts = Mounts(scratch)
    try:
        yield mounts.make(f"route={route}").path
        mounts.verify()
    finally:
        mounts.tear_down()


Filesystem = Callable[[Path], contextlib.AbstractContextManager[Path]]
FILESYSTEMS: dict[str, Filesystem] = {
    "ext4": lambda scratch: on_image(scratch, "ext4"),
    "xfs": lambda scratch: on_image(scratch, "xfs"),
    "tmpfs": lambda scratch: kernel_mount(scratch, "-t", "tmpfs", "-o", "huge=always", "tmpfs"),
    "largefs-passthrough": lambda scratch: largefs_mount(scratch, "passthrough"),
    "largefs-daemon": lambda scratch: largefs_mount(scratch, "none"),
    "largefs-folio": lambda scratch: largefs_mount(scratch, "folio"),
}
BY_DEFAULT = [name for name in FILESYSTEMS if name != "largefs-folio"]  # a patched kernel's


def main() -> int:
    """Returns 1 if there was any difference."""
    parser = argparse.ArgumentParser("python -m tests.stress.table", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--results", type=Path, default=Path())
    parser.add_argument("filesystems", nargs="*", default=BY_DEFAULT, metavar="FILESYSTEM")
    args = parser.parse_args()
    if unknown := set(args.filesystems) - set(FILESYSTEMS):
        parser.error(f"{', '.join(unknown)}: none of {', '.join(FILESYSTEMS)}")
    print(f"Linux {os.uname().release}, {args.seconds:g} seconds each\n")
    print(
        "| filesystem | operations | a second | in races | huge pages seen | split | removed | result |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    failed = False
    for name in args.filesystems:
        with (
            tempfile.TemporaryDirectory(prefix="largefs-table-") as scratch,
            FILESYSTEMS[name](Path(scratch)) as root,
        ):
            result = stress(root, args.seconds, args.results, name)
        print(f"| {name} | {row(result) if result else 'could not run'} |", flush=True)
        failed |= not result or bool(result["difference"])
    return failed


def stress(root: Path, seconds: float, results: Path, name: str) -> dict[str, Any] | None:
    """The summary of one run; None when it could not run, and has said why."""
    save = results / f"stress-{name}.jsonl"
    command = [LARGEFS, "stress", root, "--seconds", str(seconds), "--save", save, "--json"]
    done = subprocess.run([*command, "--timeout", "300"], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        return None
    (results / f"stress-{name}.json").write_text(done.stdout)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def row(result: dict[str, Any]) -> str:
    """The cells of a run: what was done, huge pages, failures."""
    pmd, difference = result["pmd_mapped"], result["difference"]
    taken = {
        how: sum(n for name, n in pmd["taken"].items() if name.endswith(how))
        for how in ("split", "removed")
    }
    races = sum(n for name, n in result["counts"].items() if name.startswith("race "))
    cells = [f"{result['operations']:,}", f"{result['operations_per_second']:,}", f"{races:,}"]
    cells += [f"in {pmd['seen']:,} of {pmd['looked']:,} looks"]
    cells += [f"{taken['split']:,}", f"{taken['removed']:,}"]
    cells += [difference["text"] if difference else "no difference"]
    return " | ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
