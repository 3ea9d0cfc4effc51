"""What a check found: its problems, its notes, and how much it looked at."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Problem:
    """One violated invariant."""

    kind: str
    """Which one, as a word that stays the same: docs/check.md lists them."""
    text: str
    """One line for people, without the path."""
    inode: int
    """0: of no single inode."""
    path: bytes | None
    """A path of the inode, or None where it has none that leads to the root."""
    offset: int | None
    """Of damaged data: where in the file it starts, in bytes."""
    mended: bool


@dataclass
class Report:
    """What a check found."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is no problem, but good to know."""
    inodes: int = 0
    checked: int = 0
    """Bytes of file data that were read and compared."""

    @property
    def mended(self) -> int:
        """Problems that were mended."""
        return sum(p.mended for p in self.problems)

    @property
    def left(self) -> int:
        """Problems that are still there."""
        return len(self.problems) - self.mended


Progress = Callable[[int, int], None]
"""Called with the bytes of file data compared so far, and in all."""
