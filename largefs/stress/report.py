"""What went wrong, named by its class, and where.

The classes (docs/stress.md tells what each one means for a filesystem):

``lost-write``   data written is not there: what had been there before still is
``stale``        bytes that were truncated, punched or zeroed away are back
``misplaced``    the data of another place of the file, or of another file
``garbage``      bytes that nobody wrote
``tail``         something else than zeros between the end of the file and the end of its last page
``short``        fewer (or more) bytes than the file has there
``size``         a wrong size
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
    if any(found):
        origin = _origin(pool, writes, inode, offset, found)
        if origin is None:
            return "garbage", "bytes that no operation wrote there or elsewhere"
        same = origin.inode == inode
        was_at = origin.offset + _pool_offset(pool, found) - origin.source
        if same and was_at == offset:
            what = f"data that operation {origin.operation} had written here"
            if any(expected):
                return "lost-write", f"still the older {what}"
            return "stale", f"{what}, where there must be zeros now"
        where = f"offset {was_at:#x}" + ("" if same else f" of {origin.name}")
        shift = f" ({offset - was_at:+#x})" if same else ""
        return "misplaced", f"data that operation {origin.operation} wrote at {where}{shift}"
    return "lost-write", "zeros where there must be data"


def _pool_offset(pool: Arena, found: bytes) -> int:
    return pool.memory.find(found)


def _origin(
    pool: Arena, writes: list[Write], inode: int, offset: int, found: bytes
) -> Write | None:
    if len(found) < 6:  # too short to know it again
        return None
    at = _pool_offset(pool, found)
    if at < 0:
        return None
    candidates = [w for w in writes if w.source <= at < w.source + w.length]
    here = [w for w in candidates if w.inode == inode and w.offset + at - w.source == offset]
    best = here or candidates
    return best[-1] if best else None
