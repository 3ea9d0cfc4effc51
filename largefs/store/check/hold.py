"""How a check holds a store: nobody else may use it, and without repair no byte of it changes.

That includes what SQLite would do by itself: the log that a crash left is read, but neither merged
nor removed.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import apsw

from largefs.store import owner
from largefs.store.check.report import Report
from largefs.store.database import connect, disconnect, keep_log, log_of, open_database, read_format
from largefs.store.errors import BusyError, RestoredError, StoreError
from largefs.store.store import Store


@contextlib.contextmanager
def hold(path: Path, *, repair: bool) -> Iterator[apsw.Connection]:
    """Keep others from a store and give its database: to look at only, or to repair."""
    meta = path / "meta.db"
    read_format(meta)
    if other := owner.foreign_and_alive(path):
        raise BusyError(path, other)
    if repair:
        db, log = connect(meta)
        try:
            holder = owner.Holder(path, "check --repair")
            try:
                yield db
            finally:
                holder.release()
        finally:
            disconnect(db, log)
        return
    with _to_look_at(meta) as db:
        yield db


def put_in_order(path: Path, report: Report) -> None:
    """Before a repair: have the store recover from a crash, as a mount would."""
    with hold(path, repair=True) as db:
        try:
            clean = db.execute("SELECT clean FROM superblock").fetchone()
            sound = db.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
        except apsw.SQLError:
            return  # no such table: the check will say so
    if not sound or clean is None or clean[0]:
        return
    try:
        with Store.open(path, "check --repair"):
            pass
        report.notes.append("it was not closed; it has been put in order, as a mount does")
    except BusyError:
        raise
    except RestoredError:
        pass  # the check says so
    except StoreError as e:
        report.notes.append(f"it was not closed, and cannot be put in order yet: {e}")


@contextlib.contextmanager
def _to_look_at(meta: Path) -> Iterator[apsw.Connection]:
    """Open a database so that no byte of it changes; what is only in its log (WAL) is seen as well."""
    if not os.access(meta, os.W_OK):  # a disk that went read-only cannot be locked, either
        with tempfile.TemporaryDirectory(prefix="largefs-check-") as copy:
            for file in (meta, log_of(meta)):
                if file.exists():
                    shutil.copy(file, copy)
            with _to_look_at(Path(copy) / meta.name) as db:
                yield db
        return
    has_log = log_of(meta).exists()
    db = open_database(meta)
    try:
        if has_log:  # closing would merge it into the database, and remove it
            keep_log(db)
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        db.pragma("locking_mode", "exclusive")
        db.execute("BEGIN IMMEDIATE; ROLLBACK")
        db.pragma("cache_spill", False)  # a transaction that is rolled back leaves no trace
        yield db
    finally:
        db.close()
