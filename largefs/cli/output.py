"""Sizes, and tables: fitted to a terminal; elsewhere one line a row, without trailing blanks."""

import io
import sys

import click
from rich.console import Console, RenderableType


def size(amount: float) -> str:
    """Bytes in the unit that reads best: '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


WIDE = 1 << 16
"""Columns where there is no terminal: no path is ever folded, for the reader is grep(1)."""


def width() -> int:
    """Columns that `show` has."""
    return Console().width if sys.stdout.isatty() else WIDE


def show(renderable: RenderableType) -> None:
    """Print to standard output."""
    if sys.stdout.isatty():
        Console().print(renderable)
        return
    console = Console(width=WIDE, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())
