"""largefs mkfs: make an empty store."""

from pathlib import Path

import click

from largefs.cli.arguments import PATH
from largefs.cli.errors import explained
from largefs.store import Store


@click.command("mkfs", short_help="Make an empty store.")
@click.argument("store", type=PATH)
def command(store: Path) -> None:
    """Make an empty filesystem in the directory STORE, which must be empty or missing.

    Best on xfs, or on ext4 with Linux 6.16 and later: these keep file data in large folios.
    """
    with explained():
        Store.create(store.absolute())
