"""What all checks of one store share: its database, its backing files, and where problems go.

How a check mends. A change of the metadata needs no `if repair`: it is always made, in a transaction
that is rolled back without repair, so that what follows from a problem is not reported as another
one. It is made after problem(), which tells the path as it was found. What reads or changes a backing
file can fail with OSError, so it comes before problem(), which tells of success; and as no transaction
takes back a change of a file, that is made only `if repair`.
"""

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from largefs.store.backing import BackingFiles
from largefs.store.check.report import Problem, Progress, Report
from largefs.store.store import path_of

# Conditions on a row of inodes.
DIRECTORY = f"mode & {0o170000} = {stat.S_IFDIR}"
REGULAR = f"mode & {0o170000} = {stat.S_IFREG}"
SYMLINK = f"mode & {0o170000} = {stat.S_IFLNK}"


@dataclass
class Context:
    """One check of a store that is held."""

    path: Path
    db: apsw.Connection
    report: Report
    progress: Progress
    repair: bool
    backing: BackingFiles = field(init=False)
    """Open as soon as `extents/` is known to be there."""
    clean: bool = False
    """It was closed, so nothing is left that a crash would explain: database.superblock() finds out."""
    lost_and_found: int = 0
    """The inode of lost+found; 0 until something is saved there."""
    lost_extents: set[tuple[int, int]] = field(default_factory=set)
    """(inode, number) of those that are reported before their data is read."""
    to_remove: list[int] = field(default_factory=list)
    """Inodes whose backing files are removed once the repair is durable."""

    def all(self, query: str, *parameters: Any) -> list[Any]:
        """All rows, so that the tables may be changed while one goes through them."""
        return self.db.execute(query, parameters).fetchall()

    def value(self, query: str, *parameters: Any) -> Any:
        """The first column of the first row, or None."""
        row = self.db.execute(query, parameters).fetchone()
        return None if row is None else row[0]

    def problem(
        self,
        kind: str,
        text: str,
        inode: int = 0,
        *,
        offset: int | None = None,
        mendable: bool = False,
    ) -> None:
        """Report a problem; one that is `mendable` counts as mended if this is a repair."""
        path = path_of(self.db, inode) if inode else None
        mended = mendable and self.repair
        self.report.problems.append(Problem(kind, text, inode, path, offset, mended))

    def has_backing(self, inode: int) -> bool:
        """Whether an inode has a backing file."""
        try:
            return stat.S_ISREG(self.backing.stat(inode).st_mode)
        except OSError:
            return False
