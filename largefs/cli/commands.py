"""The group of all commands, and what is wrong with the arguments of one."""

import importlib
import sys
from typing import Any

import click

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

USAGE = {"mount": 1, "check": 16}
"""Exit codes for wrong arguments, where those of mount(8) and fsck(8) apply; 2 for all others."""


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
@click.version_option(package_name="largefs", prog_name="largefs")
def cli() -> None:
    """largefs keeps files so that Linux maps their executable text with 2 MiB pages."""


def run() -> int:
    """Run the command that the arguments name; its exit code. A wrong argument is one line, and 2.

    Raises KeyboardInterrupt, and OSError for output that cannot be written.
    """
    try:
        return cli.main(standalone_mode=False) or 0
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        return e.exit_code
    except click.ClickException as e:
        context = getattr(e, "ctx", None)
        command = context.command_path if context else "largefs"
        print(f"largefs: {e.format_message().rstrip('.')} (see {command} --help)", file=sys.stderr)
        return USAGE.get(context.info_name or "", e.exit_code) if context else e.exit_code
    except click.Abort:
        raise KeyboardInterrupt from None
