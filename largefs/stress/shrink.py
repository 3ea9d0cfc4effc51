"""Make a failing list of operations short: delta debugging, bounded in time.

Any part of a list of operations is itself a valid list (``session``), so parts are left out, first
big ones and then single operations, as long as the same class of difference still shows. Then
lengths are halved in the same way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

from largefs.stress.report import Difference
from largefs.stress.session import Operation

_SHORTEST = 64  # bytes: shorter data is hard to recognise in a report
Reproduce = Callable[[list[Operation]], Difference | None]


def shrink(
    operations: list[Operation], difference: Difference, reproduce: Reproduce, seconds: float
) -> tuple[list[Operation], Difference | None]:
    """A shorter list with the same class of difference, and that; None if it never came again."""
    deadline = time.monotonic() + seconds
    best, shown = operations, None

    def fails(candidate: list[Operation]) -> bool:
        nonlocal best, shown
        found = reproduce(candidate)
        if found is None or found.kind != difference.kind:
            return False
        end = [op.number for op in candidate].index(found.operation) + 1
        best, shown = candidate[:end], found
        return True

    for _ in range(3):  # a fault that comes by chance may need another try
        if fails(operations):
            break
    else:
        return operations, None
    # the user has what there is by then when they cannot wait any longer
    with contextlib.suppress(KeyboardInterrupt):
        _leave_out(lambda: best, fails, deadline)
        _shorten(lambda: best, fails, deadline)
    return best, shown


def _leave_out(
    current: Callable[[], list[Operation]],
    fails: Callable[[list[Operation]], bool],
    deadline: float,
) -> None:
    """Remove what does not matter: halves first, then ever smaller parts."""
    size = max(1, len(current()) // 2)
    while time.monotonic() < deadline:
        before = end = len(current())
        while end > 0 and time.monotonic() < deadline:
            start = max(0, end - size)
            fails(current()[:start] + current()[end:])
            end = min(start, len(current()))
        if size == 1 and len(current()) == before:
            break
        size = max(1, min(size // 2, len(current()) // 2))


def _shorten(
    current: Callable[[], list[Operation]],
    fails: Callable[[list[Operation]], bool],
    deadline: float,
) -> None:
    """Halve the lengths of single operations."""
    index = 0
    while index < len(current()) and time.monotonic() < deadline:
        operations = current()
        op = operations[index]
        length = op.arguments.get("len", 0)
        if length > _SHORTEST and op.kind != "build":
            shorter = replace(op, arguments={**op.arguments, "len": length // 2})
            if fails([*operations[:index], shorter, *operations[index + 1 :]]):
                continue
        index += 1
