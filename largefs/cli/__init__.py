"""The commands, one module each. Imports the rest; nothing imports it.

Little is imported before `main` runs, so that no interrupt comes too early to be explained.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
"""Exit code of an interrupted command, unless its help says otherwise."""


def main() -> NoReturn:
    """The entry point of the command `largefs`. What goes wrong is one line and an exit code."""
    try:
        _prepare_streams()
        for number in signal.SIGTERM, signal.SIGHUP:
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup(1) has SIGHUP ignored
                signal.signal(number, _interrupt)
        from largefs.cli.commands import run

        code = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("largefs: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except OSError as e:
        # What is still buffered would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(e, BrokenPipeError):  # as head(1) leaves behind
            print(f"largefs: {e.filename or 'output'}: {e.strerror}", file=sys.stderr)
        code = 1
    sys.exit(code)


def _prepare_streams() -> None:
    """Let nothing that is printed fail for its characters, or for a stream that the caller closed."""
    for name in "stdin", "stdout", "stderr":  # in this order each gets its own descriptor
        if getattr(sys, name) is None:
            null = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
            os.set_inheritable(null.fileno(), True)
            setattr(sys, name, null)
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """End as for Ctrl-C. A closing terminal may say SIGHUP twice; a second SIGTERM is meant."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise KeyboardInterrupt
