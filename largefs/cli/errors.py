"""How commands fail: one line on stderr that says what to do, and an exit code."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from largefs.cli import INTERRUPTED
from largefs.store import StoreError
from largefs.store.errors import FULL

FAILED = 1
"""Exit code of a command that could not do what it was asked, unless its help says otherwise."""

CANNOT_RUN = 2
"""Exit code of a tool that could not begin its work, as of wrong arguments."""


def die(message: str, code: int = FAILED) -> NoReturn:
    """Print one line and end."""
    print(f"largefs: {message}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def explained(
    code: int = FAILED, interrupted: tuple[str, int] = ("interrupted", INTERRUPTED)
) -> Iterator[None]:
    """Turn what can be wrong with a store, a file or a disk into one line and an exit code.

    `interrupted` is the line and the code for an interrupt.
    """
    try:
        yield
    except StoreError as e:
        die(str(e), code)
    except OSError as e:
        where = "" if e.filename is None else f"{os.fsdecode(e.filename)}: "
        what_to_do = "; make room there and try again" if e.errno in FULL else ""
        die(f"{where}{e.strerror or e}{what_to_do}", code)
    except KeyboardInterrupt:
        die(*interrupted)


def show(path: bytes) -> str:
    """A path for people: what is not text in it is escaped."""
    return path.decode(errors="backslashreplace")
