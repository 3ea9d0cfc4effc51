"""Tables for people: fitted to a terminal; elsewhere one line a row, without trailing blanks."""

import io
import sys

import click
from rich.console import Console, RenderableType


def show(renderable: RenderableType) -> None:
    """Print to standard output."""
    if sys.stdout.isatty():
        Console().print(renderable)
        return
    # Wide enough that no path is ever folded: the reader is grep(1).
    console = Console(width=1 << 16, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())
