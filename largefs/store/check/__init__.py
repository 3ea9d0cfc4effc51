"""Check and repair of a store: every invariant that schema.py states, and that each extent is as recorded.

Guarantees
    Without repair nothing of the store changes, not even by SQLite's recovery: the log that a crash left
    is read, but stays as it is. What the next mount puts in order by itself is a note, no problem.
    The metadata is mended then as well, but in a transaction that is rolled back: so what follows from a
    problem is not reported as another one.
    Repair never deletes data and never takes damaged data for good. What has lost its name comes to
    lost+found in the root directory as '#INODE'. A file whose content is not what was recorded stays
    reported until it is written anew or removed.
    Repair of the metadata is one transaction: it happens wholly or not at all.

report.py          what a check found
hold.py            how it holds the store, so that nothing changes
context.py         what the checks share; how a problem is told and mended
database.py        checks of meta.db as a whole, the superblock, inode numbers
inodes.py          checks of the root, of types, of what belongs to an inode
names.py           checks of directory entries, link counts, cycles
lost_and_found.py  where names go that lost their place
backing_files.py   checks of the files under extents/
extents.py         checks of their data

What is here is the order of the checks.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import apsw

from largefs.store import owner
from largefs.store.backing import BackingFiles
from largefs.store.check import backing_files, database, extents, inodes, names
from largefs.store.check.context import Context
from largefs.store.check.hold import hold, put_in_order
from largefs.store.check.report import Problem, Progress, Report
from largefs.store.errors import BusyError, of_database

__all__ = ["Problem", "Progress", "Report", "check"]

_ORDER: tuple[Callable[[Context], None], ...] = (
    # What a crash left, or a backup of meta.db lacks, is no damage: so first whether it was one of these.
    database.superblock,
    database.age,
    # A root is needed for lost+found, where the others save inodes to.
    inodes.root,
    # From here on the type of an inode is right: every query after these goes by it.
    inodes.types,
    inodes.columns,
    # A name may bring a missing inode back from its backing file: its rows in other tables are no strays
    # then. The rows that stay belong to an inode of the right type.
    names.dentries,
    names.legal,
    inodes.strays,
    inodes.symlinks,
    inodes.xattrs,
    # A directory has at most one name by now. With just one, the way up ends at the root or in a circle;
    # and when every name is in its place, links can be counted.
    names.unnamed,
    names.cycles,
    names.nlinks,
    # The inodes are settled, and so is which backing files there should be.
    backing_files.files,
    backing_files.orphans,
    # All inodes that the repair makes have their numbers.
    database.numbers,
    database.note_what_a_mount_does,
)
"""Each check relies on those before it."""


def check(
    path: Path,
    *,
    data: bool = False,
    repair: bool = False,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Check a store that nobody uses; with `data` read every extent, with `repair` mend what can be.

    Raises NotAStoreError, NewerFormatError, BusyError, or StoreError where it cannot be read at all.
    """
    report = Report()
    try:
        if repair:
            put_in_order(path, report)
        with hold(path, repair=repair) as db:
            _run(Context(path, db, report, progress, repair), data=data)
    except apsw.BusyError:
        raise BusyError(path, owner.read(path)) from None
    except (apsw.CorruptError, apsw.NotADBError) as e:
        _give_up(report, str(e))
    except apsw.Error as e:
        raise of_database(path, e) from e
    return report


def _run(c: Context, *, data: bool) -> None:
    """Everything, of a store that is held: first what all checks need to look at anything."""
    c.db.execute("BEGIN IMMEDIATE")
    if not database.structure(c):
        if c.repair:
            c.db.execute("COMMIT")
        return
    backing_files.directories(c)
    with contextlib.closing(BackingFiles(c.path / "extents")) as c.backing:
        for look in _ORDER:
            look(c)
        if c.repair:
            c.backing.flush_all()
            c.db.execute("COMMIT")
            for inode in c.to_remove:
                c.backing.remove(inode)
        else:
            c.db.execute("ROLLBACK")
        c.report.inodes = c.value("SELECT count(*) FROM inodes")
        if data:
            extents.compare_data(c)


def _give_up(report: Report, reason: str) -> None:
    """What is left when SQLite itself cannot read the database."""
    text = (
        f"meta.db: {reason}; restore meta.db from a backup, or rescue the files' data from extents/"
    )
    report.problems.append(Problem("database", text, 0, None, None, mended=False))
