"""largefs warm: read files into the page cache in 2 MiB folios."""

import errno
import os
import stat
import sys
from collections.abc import Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from largefs.hugetext import text
from largefs.hugetext.eligible import Range
from largefs.hugetext.mappings import PMD
from largefs.hugetext.warm import Warmed, warm_file


@click.command(short_help="Read files into the page cache in 2 MiB folios.")
@click.argument(
    "paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(exists=True, path_type=str)
)
def command(paths: tuple[str, ...]) -> None:
    """Read files into the page cache in 2 MiB folios, so that programs started later map them by 2
    MiB pages.

    PATH is a file, or a directory of which all regular files are read, without crossing into other
    filesystems. Of a program or library its eligible text is read, of other files everything. Files
    shorter than 2 MiB have nothing to warm. The filesystem must have large
    folios: see largefs doctor. A mounted largefs does this by itself.

    Exit code: 0 if all is in 2 MiB folios, 1 if some is not, 2 for a wrong argument.
    """
    files = {path: size for root in paths for path, size in _files(root) if size >= PMD}
    done, failed = Warmed(), 0
    with _progress() as progress:
        task = progress.add_task("warming", total=sum(files.values()))
        for path, size in files.items():
            try:
                done += _warm(path)
            except OSError as e:
                failed += 1
                click.echo(f"largefs: {path}: {e.strerror}", err=True)
            progress.advance(task, size)
    mib = 1 << 20
    click.echo(
        f"{done.in_pmd // mib} of {done.wanted // mib} MiB in 2 MiB folios "
        f"({done.already // mib} MiB were before), {len(files)} files"
    )
    if done.in_pmd < done.wanted:
        click.echo(
            "largefs: the rest is mapped by running programs (stop them first), or the"
            " filesystem has no large folios, or free memory is fragmented: see largefs doctor",
            err=True,
        )
    sys.exit(1 if failed or done.in_pmd < done.wanted else 0)


def _warm(path: str) -> Warmed:
    """Warm one file; one of a mounted largefs is warmed by its daemon. Raises OSError.

    What FUSE passes through is cached in the backing file, and only from there can what is cached in
    small folios be dropped.
    """
    try:
        said = os.getxattr(path, "user.largefs.warm")
    except OSError as e:
        if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return warm_file(path, _text(path))
    return Warmed(*map(int, said.split()))


def _text(path: str) -> list[Range] | None:
    """The eligible text of a program or library; None for any other file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return text.of_file(fd).ranges or None
    finally:
        os.close(fd)


def _files(root: str) -> Iterator[tuple[str, int]]:
    """(path, size in bytes) of the regular files at and below `root`."""
    st = os.stat(root)
    if stat.S_ISREG(st.st_mode):
        yield os.path.realpath(root), st.st_size
    for directory, names, filenames in os.walk(root):
        names[:] = [n for n in names if not os.path.ismount(os.path.join(directory, n))]
        for name in filenames:
            path = os.path.join(directory, name)
            try:
                st = os.lstat(path)
            except OSError:  # gone meanwhile
                continue
            if stat.S_ISREG(st.st_mode):
                yield path, st.st_size


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
