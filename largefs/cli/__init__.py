"""The commands, one module each. Imports the rest; nothing imports it."""

import importlib
import sys
from typing import Any

import click

from largefs import __version__

COMMANDS = {
    "mkfs": "mkfs",
    "import": "import_",
    "export": "export",
    "mount": "mount",
    "umount": "umount",
    "report": "report",
    "warm": "warm",
    "doctor": "doctor",
    "check": "check",
    "stress": "stress",
    "bench": "bench",
}
"""Each command, and the module that has it as `command`; loaded when it is needed."""


class Commands(click.Group):
    """The group: commands in the order above, each loaded by itself."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All of them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One of them, or None."""
        if cmd_name not in COMMANDS:
            return None
        module: Any = importlib.import_module(f"largefs.cli.{COMMANDS[cmd_name]}")
        command: click.Command = module.command
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="largefs")
def cli() -> None:
    """largefs keeps files so that Linux maps their executable text with 2 MiB pages."""


def main() -> None:
    """The entry point of the command `largefs`."""
    sys.exit(cli())
