"""What went wrong, named by its class, and where.

The classes (docs/stress.md tells what each one means for a filesystem):

``lost-write``   data written is not there: what had been there before still is
``stale``        bytes that were truncated, punched or zeroed away are back
``misplaced``    the data of another place of the file, or of another file
``garbage``      bytes that nobody wrote
``tail``         something else than zeros between the end of the file and the end of its last page
``short``        fewer (or more) bytes than the file has there
``size``         a wrong size
``mode``         other permissions than were set
``hole``         SEEK_HOLE names a hole where there is data, or the walk makes no sense
``sigbus``       a page inside the file cannot be had
``no-sigbus``    a page wholly beyond the end can be had
``errno``        an operation failed that must not
``crash``        a program executed from the filesystem died
``hang``         an operation did not end in time
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from largefs.stress.syscalls import PMD, Arena


@dataclass
class Difference(Exception):  # noqa: N818  it is a finding of the tool, not an error in it
    """What the filesystem got wrong; ``operation`` is the number of the one that showed it."""

    kind: str
    text: str
    operation: int = -1
    path: str = ""
    offset: int = -1
    expected: str = ""
    found: str = ""
    folios: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.text}"]
        if self.offset >= 0:
            block, rest = divmod(self.offset, PMD)
            lines.append(
                f"  {self.path} at offset {self.offset:#x} (2 MiB block {block}, {rest:#x} inside)"
            )
        if self.expected or self.found:
            lines += [f"  expected {self.expected}", f"  found    {self.found}"]
        return "\n".join(lines + [f"  {line}" for line in self.folios])

    def as_dict(self) -> dict[str, Any]:
        """For a replay file and for --json."""
        return asdict(self)


_RECOGNISABLE = 6  # bytes: fewer are found in the pool by chance


@dataclass(frozen=True)
class Write:
    """Where the bytes [source, source + length) of the pool went."""

    operation: int
    inode: int
    name: str
    offset: int
    length: int
    source: int


def explain(
    pool: Arena, writes: list[Write], inode: int, offset: int, expected: bytes, found: bytes
) -> tuple[str, str]:
    """The class of a difference in content, and a sentence, by finding whose data it is."""
    run = next((i for i, byte in enumerate(found) if byte == expected[i]), len(found))
    found = found[:run]  # what differs; the rest may be right
    if not any(found):
        return "lost-write", "zeros where there must be data"
    for w in reversed(writes):
        if w.inode == inode and w.offset <= offset < w.offset + w.length:
            at = w.source + offset - w.offset
            n = min(len(found), w.offset + w.length - offset)
            if pool.memory[at : at + n] == found[:n]:
                what = f"data that operation {w.operation} had written here"
                if any(expected[:n]):
                    return "lost-write", f"still the older {what}"
                return "stale", f"{what}, where there must be zeros now"
    at = pool.memory.find(found) if len(found) >= _RECOGNISABLE else -1
    for w in reversed(writes):
        if w.source <= at < w.source + w.length:
            was_at = w.offset + at - w.source
            where = f"offset {was_at:#x} of {w.name}"
            if w.inode == inode:
                where = f"offset {was_at:#x}, {offset - was_at:+#x} bytes away"
            return "misplaced", f"data that operation {w.operation} wrote at {where}"
    return "garbage", "bytes that no operation wrote there or elsewhere"
