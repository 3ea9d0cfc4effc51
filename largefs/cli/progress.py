"""A line that moves on a terminal, and nothing where there is none."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

INTERVAL = 0.1
"""Seconds between two changes of the line."""


@contextlib.contextmanager
def line() -> Iterator[Callable[[Callable[[], str]], None]]:
    """Give a function that shows what its argument returns, at most every INTERVAL."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    last = 0.0

    def show(text: Callable[[], str]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= INTERVAL:
            last = now
            sys.stderr.write(f"\r\x1b[K{text()}")
            sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
