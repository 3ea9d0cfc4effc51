"""largefs export: write what a store holds as a directory tree."""

import errno
import os
import sys
from pathlib import Path

import click

from largefs.cli.arguments import PATH
from largefs.cli.errors import die, explained, show
from largefs.cli.output import size
from largefs.cli.progress import line
from largefs.store import Store
from largefs.transfer.exporter import Exporter, export_original


@click.command("export", short_help="Write what a store holds as a directory tree.")
@click.argument("source", metavar="STORE[:PATH]")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option(
    "--original",
    is_flag=True,
    help="STORE[:PATH] is instead a FILE on a mounted largefs: write its original bytes to DIR.",
)
def command(source: str, directory: Path, original: bool) -> None:
    """Export PATH of STORE, or all of it, into DIR, which must be empty or missing.

    Programs get back the bytes they had before the import aligned them. The store must not be
    mounted; with --original a single file is taken from a mount.

    Exit code: 0 all exported; 1 something could not be written or set (as owners, by anyone but root),
    or the export ended early.
    """
    if original:
        with explained():
            _export_original(Path(source), directory)
        return
    store, path = _split(source)
    with explained(), Store.open(store.absolute(), "export") as opened, line() as moving:
        if directory.resolve().is_relative_to(store.resolve()):
            die(f"{directory}: belongs to the store itself; name a directory outside of it")
        exporter = Exporter(
            opened, lambda t: moving(lambda: f"{t.entries} names, {size(t.copied)}")
        )
        try:
            tally = exporter.run(os.fsencode(path), os.fsencode(directory))
        except OSError as e:
            if e.errno == errno.ENOTEMPTY:
                die(f"{directory}: not empty; name a directory that is empty or missing")
            if e.errno == errno.ENOENT and e.filename is None:
                die(f"{store}: holds no {path}")
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                die(
                    f"{directory}: {e.strerror} after {exporter.tally.entries} names: "
                    "make room, remove what is there, and run the same export again"
                )
            raise
    for name, reason in tally.failed:
        print(f"largefs: {show(name)}: {reason}", file=sys.stderr)
    for what, paths in tally.unset.items():
        where = f"{show(paths[0])}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        print(f"largefs: {where}: cannot set {what}", file=sys.stderr)
    print(f"{tally.entries} names, {size(tally.copied)} exported")
    sys.exit(1 if tally.failed or tally.unset else 0)


def _export_original(file: Path, directory: Path) -> None:
    """Write what FILE was before the import into DIR, with its metadata."""
    try:
        record = os.getxattr(file, "user.largefs.alignment")
    except OSError as e:
        if e.errno == errno.ENODATA:
            die(f"{file}: was not aligned: it is the original (or is on no mounted largefs)")
        raise
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / file.name
    lost = export_original(os.fsencode(file), record, os.fsencode(target))
    print(f"{target}: {size(target.stat().st_size)}")
    if lost:
        die(f"{target}: cannot set {', '.join(lost)}")


def _split(source: str) -> tuple[Path, str]:
    """STORE or STORE:PATH; a colon belongs to the store's name if such a store exists."""
    store, colon, path = source.rpartition(":")
    if not colon or (Path(source) / "meta.db").exists():
        return Path(source), "/"
    return Path(store), path or "/"
