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
"""

# ruff: noqa: S608 - the parts that queries are put together from are all constants of this module

import contextlib
import ctypes
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from largefs.store import backing as b
from largefs.store import owner, schema
from largefs.store.backing import EXTENT_SIZE, BackingFiles
from largefs.store.errors import BusyError, RestoredError, StoreError
from largefs.store.schema import ROOT_INODE
from largefs.store.store import (
    NAME_MAX,
    REMOVED,
    SYMLINK_MAX,
    Store,
    connect,
    given,
    path_of,
    read_format,
)

XATTR_NAME_MAX, XATTR_SIZE_MAX = 255, 65536  # linux/limits.h

LOST_AND_FOUND = b"lost+found"

_DIRECTORY = f"mode & {0o170000} = {stat.S_IFDIR}"
_REGULAR = f"mode & {0o170000} = {stat.S_IFREG}"
_SYMLINK = f"mode & {0o170000} = {stat.S_IFLNK}"
_TYPES = (
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFLNK,
    stat.S_IFCHR,
    stat.S_IFBLK,
    stat.S_IFIFO,
    stat.S_IFSOCK,
)


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
            _put_in_order(path, report)
        with _hold(path, repair=repair) as db:
            _Check(path, db, report, repair=repair, progress=progress).run(data=data)
    except apsw.BusyError:
        holder = owner.read(path) or "by another process"
        raise BusyError(f"{path}: in use: {holder}; end that first") from None
    except (apsw.CorruptError, apsw.NotADBError) as e:
        _give_up(report, str(e))
    except apsw.Error as e:
        raise StoreError(f"{path}: meta.db cannot be checked: {e}") from e
    return report


def _give_up(report: Report, reason: str) -> None:
    """What is left when SQLite itself cannot read the database."""
    text = (
        f"meta.db: {reason}; restore meta.db from a backup, or rescue the files' data from extents/"
    )
    report.problems.append(Problem("database", text, 0, None, None, mended=False))


# ------------------------------------------------------------------------------- opening a store


@contextlib.contextmanager
def _hold(path: Path, *, repair: bool) -> Iterator[apsw.Connection]:
    """Keep others from a store and give its database: to look at only, or to repair."""
    meta = path / "meta.db"
    read_format(meta)
    if other := owner.foreign_and_alive(path):
        raise BusyError(f"{path}: in use: {other}; end that first")
    if repair:
        with contextlib.closing(connect(meta)) as db:
            holder = owner.Holder(path, "check --repair")
            try:
                yield db
            finally:
                holder.release()
        return
    with _to_look_at(meta) as db:
        yield db


@contextlib.contextmanager
def _to_look_at(meta: Path) -> Iterator[apsw.Connection]:
    """Open a database so that no byte of it changes; what is only in its log (WAL) is seen as well."""
    if not os.access(meta, os.W_OK):  # a disk that went read-only cannot be locked, either
        with tempfile.TemporaryDirectory(prefix="largefs-check-") as copy:
            for file in (meta, _log_of(meta)):
                if file.exists():
                    shutil.copy(file, copy)
            with _to_look_at(Path(copy) / meta.name) as db:
                yield db
        return
    has_log = _log_of(meta).exists()
    db = apsw.Connection(str(meta), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        if has_log:  # closing would move the log into the database and remove it
            yes = ctypes.c_int(1)
            db.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.addressof(yes))
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        db.pragma("locking_mode", "exclusive")
        db.execute("BEGIN IMMEDIATE; ROLLBACK")
        db.pragma("cache_spill", False)  # a transaction that is rolled back leaves no trace
        yield db
    finally:
        db.close()


def _log_of(meta: Path) -> Path:
    return meta.with_name(meta.name + "-wal")


def _put_in_order(path: Path, report: Report) -> None:
    """Before a repair: have the store recover from a crash, as a mount would."""
    with _hold(path, repair=True) as db:
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


# ------------------------------------------------------------------------------------ the checks


class _Check:
    """One check of a store that is held."""

    def __init__(
        self,
        path: Path,
        db: apsw.Connection,
        report: Report,
        *,
        repair: bool,
        progress: Progress,
    ) -> None:
        self._path = path
        self._db = db
        self._report = report
        self._repair = repair
        self._progress = progress
        self._lost_and_found = 0
        self._to_remove: list[int] = []
        self._known_bad: set[tuple[int, int]] = set()  # extents reported before their data is read
        self._backing: BackingFiles

    def run(self, *, data: bool) -> None:
        """Everything, in an order in which each check can rely on those before it."""
        self._db.execute("BEGIN IMMEDIATE")
        if not self._database():
            return
        self._directories()
        self._backing = BackingFiles(self._path / "extents")
        try:
            self._clean = self._superblock()
            for look in (
                self._age,
                self._root,
                self._inodes,
                self._dentries,
                self._names,
                self._strays,
                self._symlinks,
                self._xattrs,
                self._unnamed,
                self._cycles,
                self._nlinks,
                self._backing_files,
                self._orphans,
                self._numbers,
            ):
                look()
            self._note_what_a_mount_does()
            if self._repair:
                self._backing.flush_all()
                self._db.execute("COMMIT")
                for inode in self._to_remove:
                    self._backing.remove(inode)
            else:
                self._db.execute("ROLLBACK")
            self._report.inodes = self._value("SELECT count(*) FROM inodes")
            if data:
                self._data()
        finally:
            self._backing.close()

    # ------------------------------------------------------------------------------------ helpers

    def _all(self, query: str, *parameters: Any) -> list[Any]:
        return self._db.execute(query, parameters).fetchall()

    def _value(self, query: str, *parameters: Any) -> Any:
        """The first column of the first row, or None."""
        row = self._db.execute(query, parameters).fetchone()
        return None if row is None else row[0]

    def _problem(
        self,
        kind: str,
        text: str,
        inode: int = 0,
        *,
        offset: int | None = None,
        mend: Callable[[], object] | None = None,
        mend_files: Callable[[], object] | None = None,
    ) -> None:
        """Note a problem; mend it where that is possible: `mend` changes only the metadata."""
        path = path_of(self._db, inode) if inode else None
        if mend is not None:
            mend()
        if mend_files is not None and self._repair:
            mend_files()
        mended = self._repair and (mend or mend_files) is not None
        self._report.problems.append(Problem(kind, text, inode, path, offset, mended))

    def _sql(self, query: str, *parameters: Any) -> Callable[[], object]:
        """A change of the metadata, to be done when something is mended."""
        return lambda: self._db.execute(query, parameters)

    # ----------------------------------------------------------------------------- the database

    def _database(self) -> bool:
        """SQLite's own structure; False: what it holds cannot be trusted, so nothing else is checked."""
        found = left = self._integrity()
        if found and self._repair:
            with contextlib.suppress(apsw.ConstraintError):
                self._db.execute("REINDEX")
            if any(s.startswith("CHECK constraint") for s in found):
                self._db.execute("UPDATE inodes SET huge = huge != 0, writing = writing != 0")
                self._db.execute("UPDATE superblock SET clean = clean != 0")
            left = self._integrity()
        for text in found:
            self._report.problems.append(
                Problem("database", f"meta.db: {text}", 0, None, None, mended=text not in left)
            )
        lacking = self._schema()
        fatal = [s for s in left if not s.startswith("CHECK constraint")]
        if (fatal or lacking) and self._repair:
            self._db.execute("COMMIT")
        if fatal or lacking:
            self._report.notes.append(
                "the rest was not checked; restore meta.db from a backup, "
                "or rescue the files' data from extents/"
            )
        return not (fatal or lacking)

    def _integrity(self) -> list[str]:
        found = [row[0] for row in self._db.execute("PRAGMA integrity_check(100)")]
        return [] if found == ["ok"] else found

    def _schema(self) -> bool:
        """Compare the tables and indexes with the schema's; True: a table is missing or another."""
        wanted = apsw.Connection(":memory:")
        schema.create(wanted)
        query = "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'"
        there = {(kind, name): _plain(sql) for kind, name, sql in self._db.execute(query)}
        lacking = False
        for kind, name, sql in wanted.execute(query):
            if there.get((kind, name)) == _plain(sql):
                continue
            is_index = kind == "index" and (kind, name) not in there
            lacking = lacking or not is_index
            what = "missing" if (kind, name) not in there else "not as format version 1 has it"
            mend = self._sql(sql) if is_index else None
            self._problem("schema", f"meta.db: {kind} {name} is {what}", mend=mend)
        wanted.close()
        return lacking

    def _superblock(self) -> bool:
        """Exactly one row; returns whether the store was closed."""
        row = self._db.execute("SELECT clean FROM superblock").fetchone()
        if row is None:
            query = "INSERT INTO superblock VALUES (1, ?, ?, 0)"
            self._problem(
                "superblock",
                "meta.db: the superblock is missing; a repair gives the filesystem a new uuid",
                mend=self._sql(query, str(uuid.uuid4()), time.time_ns()),
            )
            return False
        return bool(row[0])

    def _age(self) -> None:
        """meta.db knows every number that was given; else it is a backup, and what it lacks is data."""
        if given(self._db) >= self._backing.given:
            return

        def mend() -> None:
            self._go_on_behind(self._backing.given)
            self._db.execute("UPDATE superblock SET clean = 1")  # else a mount would tidy up
            for (inode,) in self._all(f"SELECT id FROM inodes WHERE {REMOVED} AND {_REGULAR}"):
                if self._has_backing(inode):  # it may have got a name since
                    self._db.execute("UPDATE inodes SET nlink = 1 WHERE id = ?", (inode,))

        self._problem(
            "restored",
            f"meta.db is older than the data, as when it was restored from a backup: it knows of inodes"
            f" up to {given(self._db)}, but {self._backing.given} was given",
            mend=mend,
        )
        self._clean = True  # it was no crash that left this

    def _numbers(self) -> None:
        """The next inode number is beyond every number that was ever given."""
        highest = max(
            self._value("SELECT max(id) FROM inodes") or 0, max(self._backing.numbers(), default=0)
        )
        last = given(self._db)
        if last == 0 or (last < highest and self._clean):
            self._problem(
                "numbers",
                f"the next inode number would be {last + 1}, but {highest} is given already",
                mend=lambda: self._go_on_behind(highest),
            )

    def _go_on_behind(self, inode: int) -> None:
        """Let the next inode number be a higher one."""
        self._db.execute("DELETE FROM sqlite_sequence WHERE name = 'inodes'")
        self._db.execute("INSERT INTO sqlite_sequence VALUES ('inodes', ?)", (inode,))

    # ------------------------------------------------------------------------- inodes and names

    def _root(self) -> None:
        mode = self._value("SELECT mode FROM inodes WHERE id = ?", ROOT_INODE)
        if mode is None:
            self._problem(
                "root",
                "the root directory is missing",
                mend=self._make_root,
            )
        elif not stat.S_ISDIR(mode):
            self._problem(
                "root",
                f"the root is no directory (mode {mode:o})",
                mend=self._sql(
                    "UPDATE inodes SET mode = ?, size = 0, writing = 0, huge = 0 WHERE id = ?",
                    stat.S_IFDIR | stat.S_IMODE(mode),
                    ROOT_INODE,
                ),
            )
        for (entry,) in self._all("SELECT id FROM dentries WHERE inode = ?", ROOT_INODE):
            self._problem(
                "root",
                "the root directory has a name in another directory",
                mend=self._sql("DELETE FROM dentries WHERE id = ?", entry),
            )

    def _make_root(self) -> None:
        self._new_directory(ROOT_INODE)
        self._db.execute(
            "UPDATE inodes SET nlink = 2 + (SELECT count(*) FROM dentries d JOIN inodes c"
            f" ON c.id = d.inode WHERE d.parent = ?1 AND c.{_DIRECTORY}) WHERE id = ?1",
            (ROOT_INODE,),
        )

    def _inodes(self) -> None:
        """Types, and the columns that depend on them."""
        kinds = ", ".join(map(str, _TYPES))
        for inode, mode in self._all(
            f"SELECT id, mode FROM inodes WHERE mode & ~4095 NOT IN ({kinds})"
        ):
            right = self._guess_type(inode) | mode & 0o7777
            self._problem(
                "mode",
                f"mode {mode:o} is no file type",
                inode,
                mend=self._sql("UPDATE inodes SET mode = ? WHERE id = ?", right, inode),
            )
        self._columns(
            "owner", "uid NOT BETWEEN 0 AND 4294967295 OR gid NOT BETWEEN 0 AND 4294967295",
            "uid {} is no number of an owner", "uid",
            "uid = uid & 4294967295, gid = gid & 4294967295",
        )  # fmt: skip
        self._columns(
            "size", f"NOT ({_REGULAR} OR {_SYMLINK}) AND size != 0",
            "size is {}, but only files have one", "size", "size = 0",
        )  # fmt: skip
        self._columns(
            "rdev", f"mode & {0o170000} NOT IN ({stat.S_IFCHR}, {stat.S_IFBLK}) AND rdev != 0",
            "has a device number ({}), but is no device", "rdev", "rdev = 0",
        )  # fmt: skip
        self._columns(
            "writing", f"NOT {_REGULAR} AND (writing OR huge)",
            "has the marks of a regular file (mode {:o})", "mode", "writing = 0, huge = 0",
        )  # fmt: skip

    def _columns(self, kind: str, where: str, text: str, column: str, mended: str) -> None:
        """Inodes for which the condition `where` must not hold, and the assignments that mend it."""
        query = f"SELECT id, {column} FROM inodes WHERE {where}"
        for inode, value in self._all(query):
            mend = self._sql(f"UPDATE inodes SET {mended} WHERE id = ?", inode)
            self._problem(kind, text.format(value), inode, mend=mend)

    def _guess_type(self, inode: int) -> int:
        if self._value("SELECT 1 FROM dentries WHERE parent = ?", inode):
            return stat.S_IFDIR
        if self._value("SELECT 1 FROM symlinks WHERE inode = ?", inode):
            return stat.S_IFLNK
        if self._value("SELECT rdev FROM inodes WHERE id = ?", inode):
            return stat.S_IFCHR
        return stat.S_IFREG if self._has_backing(inode) else stat.S_IFIFO

    def _has_backing(self, inode: int) -> bool:
        try:
            return stat.S_ISREG(self._backing.stat(inode).st_mode)
        except OSError:
            return False

    def _dentries(self) -> None:
        """Each name is in a directory and names an inode."""
        for entry, name, parent, inode in self._all(
            "SELECT d.id, d.name, d.parent, d.inode FROM dentries d LEFT JOIN inodes i ON i.id = d.parent"
            f" WHERE i.id IS NULL OR NOT i.{_DIRECTORY}"
        ):
            text = f"its name {name!r} is in inode {parent}, which is no directory"
            self._problem("parent", text, inode, mend=self._mover(entry, inode, name))
        for entry, inode in self._all(
            "SELECT id, inode FROM dentries WHERE inode NOT IN (SELECT id FROM inodes)"
        ):
            if self._has_backing(inode):
                mend: Callable[[], object] = self._adopter(inode)
                text = f"inode {inode} is missing, but its data is there"
            else:
                mend = self._sql("DELETE FROM dentries WHERE id = ?", entry)
                text = f"names inode {inode}, which is missing"
            self._problem("dentry", text, inode, mend=mend)
        for inode, first in self._all(
            "SELECT d.inode, min(d.id) FROM dentries d JOIN inodes i ON i.id = d.inode"
            f" WHERE i.{_DIRECTORY} GROUP BY d.inode HAVING count(*) > 1"
        ):
            self._problem(
                "dentry",
                "a directory with more than one name",
                inode,
                mend=self._sql("DELETE FROM dentries WHERE inode = ? AND id != ?", inode, first),
            )

    def _names(self) -> None:
        for entry, parent, name, inode in self._all(
            "SELECT id, parent, name, inode FROM dentries WHERE length(name) NOT BETWEEN 1 AND ?"
            " OR name IN (x'2e', x'2e2e') OR instr(name, x'2f') OR instr(name, x'00')",
            NAME_MAX,
        ):
            better = self._free_name(parent, b"illegal-name")
            self._problem(
                "name",
                f"the name {name!r} is not legal",
                inode,
                mend=self._sql("UPDATE dentries SET name = ? WHERE id = ?", better, entry),
            )

    def _free_name(self, parent: int, name: bytes) -> bytes:
        candidate, n = name, 0
        query = "SELECT 1 FROM dentries WHERE parent = ? AND name = ?"
        while self._value(query, parent, candidate):
            n += 1
            candidate = name + b"-%d" % n
        return candidate

    def _strays(self) -> None:
        """Rows about inodes that are missing or of a type that has no such rows."""
        for table, type_, what in (
            ("symlinks", _SYMLINK, "symlink's target"),
            ("extents", _REGULAR, "checksum"),
            ("alignments", _REGULAR, "record of alignment"),
            ("xattrs", "1", "extended attribute"),
        ):
            for inode, count in self._all(
                f"SELECT inode, count(*) FROM {table}"
                f" WHERE inode NOT IN (SELECT id FROM inodes WHERE {type_}) GROUP BY inode"
            ):
                text = f"{count} rows of {table}, but inode {inode} has no {what}"
                mend = self._sql(f"DELETE FROM {table} WHERE inode = ?", inode)
                self._problem(table, text, inode, mend=mend)
        for (inode,) in self._all(
            "SELECT inode FROM alignments JOIN inodes ON id = inode WHERE writing = 1"
        ):
            self._problem(
                "alignments",
                "was written since the import aligned it, which is still on record",
                inode,
                mend=self._sql("DELETE FROM alignments WHERE inode = ?", inode),
            )

    def _symlinks(self) -> None:
        for inode, size, target in self._all(
            f"SELECT id, size, target FROM inodes LEFT JOIN symlinks ON inode = id WHERE {_SYMLINK}"
        ):
            if target is None or not 0 < len(target) <= SYMLINK_MAX or b"\0" in target:
                self._problem("symlinks", "a symlink without a legal target; remove it", inode)
            elif size != len(target):
                self._problem(
                    "size",
                    f"size is {size}, but the symlink's target has {len(target)} bytes",
                    inode,
                    mend=self._sql("UPDATE inodes SET size = ? WHERE id = ?", len(target), inode),
                )

    def _xattrs(self) -> None:
        for inode, name, size in self._all(
            "SELECT inode, name, length(value) FROM xattrs WHERE length(name) NOT BETWEEN 1 AND ?"
            " OR instr(name, x'00') OR length(value) > ?",
            XATTR_NAME_MAX,
            XATTR_SIZE_MAX,
        ):
            self._problem(
                "xattrs", f"the extended attribute {name!r} of {size} bytes is not legal", inode
            )

    def _unnamed(self) -> None:
        """Inodes that no directory names."""
        for (inode,) in self._all(
            "SELECT id FROM inodes WHERE id NOT IN (SELECT inode FROM dentries) AND id != ?"
            f" AND NOT ({REMOVED})",
            ROOT_INODE,
        ):
            self._problem(
                "unnamed",
                f"inode {inode} has no name",
                inode,
                mend=lambda inode=inode: self._save(inode),  # type: ignore[misc]
            )

    def _cycles(self) -> None:
        """Directories that contain themselves, so that no path from the root leads to them."""
        unreachable = dict(
            self._all(
                "WITH RECURSIVE live (id) AS (SELECT ? UNION"
                " SELECT d.inode FROM live JOIN dentries d ON d.parent = live.id)"
                " SELECT d.inode, d.parent FROM dentries d JOIN inodes i ON i.id = d.inode"
                f" WHERE i.{_DIRECTORY} AND d.inode NOT IN live ORDER BY d.inode DESC",
                ROOT_INODE,
            )
        )
        done: set[int] = set()
        for start in sorted(unreachable):
            walked: set[int] = set()
            inode = start
            while inode in unreachable and inode not in done:
                if inode in walked:
                    self._cycle(inode, unreachable[inode])
                    break
                walked.add(inode)
                inode = unreachable[inode]
            done |= walked

    def _cycle(self, inode: int, parent: int) -> None:
        def mend() -> None:
            self._db.execute("DELETE FROM dentries WHERE inode = ?", (inode,))
            self._db.execute("UPDATE inodes SET nlink = nlink - 1 WHERE id = ?", (parent,))
            self._save(inode)

        self._problem("cycle", f"directory {inode} is inside itself, in {parent}", inode, mend=mend)

    def _nlinks(self) -> None:
        for inode, nlink, counted in self._all(
            "SELECT id, nlink, counted FROM (SELECT id, nlink, CASE WHEN"
            f" {_DIRECTORY} THEN 2 + (SELECT count(*) FROM dentries d JOIN inodes c ON c.id = d.inode"
            f"   WHERE d.parent = i.id AND c.{_DIRECTORY})"
            " ELSE (SELECT count(*) FROM dentries d WHERE d.inode = i.id) END AS counted"
            f" FROM inodes i WHERE NOT ({REMOVED})) WHERE nlink != counted"
        ):
            self._problem(
                "nlink",
                f"nlink is {nlink}, but should be {counted}",
                inode,
                mend=self._sql("UPDATE inodes SET nlink = ? WHERE id = ?", counted, inode),
            )

    # ----------------------------------------------------------------------------- lost and found

    def _new_directory(self, inode: int | None) -> int:
        now = time.time_ns()
        self._db.execute(
            "INSERT INTO inodes VALUES (?, ?, ?, ?, 2, 0, 0, 0, ?, ?, ?, ?, 0, 0)",
            (inode, stat.S_IFDIR | 0o700, os.geteuid(), os.getegid(), now, now, now, now),
        )
        return self._db.last_insert_rowid()

    def _save(self, inode: int, name: bytes = b"") -> None:
        """Give an inode a name in lost+found."""
        if not self._lost_and_found:
            self._lost_and_found = self._make_lost_and_found()
        name = self._free_name(self._lost_and_found, name or b"#%d" % inode)
        self._name(self._lost_and_found, name, inode)
        self._db.execute(
            f"UPDATE inodes SET nlink = nlink + 1 WHERE id = ?"
            f" AND (SELECT {_DIRECTORY} FROM inodes WHERE id = ?)",
            (self._lost_and_found, inode),
        )

    def _mover(self, entry: int, inode: int, name: bytes) -> Callable[[], object]:
        """Move a name to lost+found."""

        def mend() -> None:
            self._db.execute("DELETE FROM dentries WHERE id = ?", (entry,))
            self._save(inode, name)

        return mend

    def _make_lost_and_found(self) -> int:
        found = self._value(
            "SELECT i.id FROM dentries d JOIN inodes i ON i.id = d.inode"
            f" WHERE d.parent = ? AND d.name = ? AND i.{_DIRECTORY}",
            ROOT_INODE,
            LOST_AND_FOUND,
        )
        if found:
            return int(found)
        inode = self._new_directory(None)
        self._name(ROOT_INODE, self._free_name(ROOT_INODE, LOST_AND_FOUND), inode)
        self._db.execute("UPDATE inodes SET nlink = nlink + 1 WHERE id = ?", (ROOT_INODE,))
        return inode

    def _name(self, parent: int, name: bytes, inode: int) -> None:
        self._db.execute(
            "INSERT INTO dentries (parent, name, inode) VALUES (?, ?, ?)", (parent, name, inode)
        )

    def _adopter(self, inode: int) -> Callable[[], object]:
        """Make an inode for a backing file that has none: only its owner can read it."""

        def mend() -> None:
            st = self._backing.stat(inode)
            self._db.execute(
                "INSERT OR IGNORE INTO inodes VALUES (?, ?, ?, ?, 1, ?, ?, 0, ?, ?, ?, ?, 0, 0)",
                (
                    inode,
                    stat.S_IFREG | 0o600,
                    *(os.geteuid(), os.getegid()),
                    *(st.st_size, st.st_blocks),
                    *(st.st_atime_ns, st.st_mtime_ns, time.time_ns(), time.time_ns()),
                ),
            )

        return mend

    # ------------------------------------------------------------------------------ backing files

    def _directories(self) -> None:
        """`extents/` and the directories in it."""
        for directory in [
            self._path / "extents",
            *(self._path / "extents" / f"{i:02x}" for i in range(256)),
        ]:
            if not directory.is_dir():
                self._problem(
                    "extents-directory",
                    f"{directory.relative_to(self._path)}: the directory is missing",
                    mend_files=lambda d=directory: d.mkdir(mode=0o700),  # type: ignore[misc]
                )
        if not (self._path / "extents").is_dir():
            raise StoreError(
                f"{self._path}: extents/ is missing, and with it the data of all files"
            )

    def _backing_files(self) -> None:
        """Each regular file that nobody had open has a backing file that looks as recorded."""
        for inode, size, mtime, atime in self._all(
            "SELECT id, size, mtime_ns, atime_ns FROM inodes"
            f" WHERE {_REGULAR} AND writing = 0 AND NOT ({REMOVED})"
        ):
            try:
                fd = self._backing.open(inode, os.O_RDONLY | os.O_NONBLOCK)
            except FileNotFoundError:
                self._missing(inode, size, mtime)
                continue
            except OSError as e:
                self._problem("unreadable", f"its backing file: {e.strerror}", inode)
                continue
            try:
                self._backing_file(fd, inode, size, (atime, mtime))
            except OSError as e:
                self._problem("unreadable", f"its backing file: {e.strerror}", inode)
            finally:
                os.close(fd)

    def _missing(self, inode: int, size: int, mtime: int) -> None:
        """A backing file that is gone: nothing is lost if it held none but holes."""

        def mend() -> None:
            fd = self._backing.make(inode)
            try:
                os.ftruncate(fd, size)
                os.utime(fd, ns=(mtime, mtime))
            finally:
                os.close(fd)

        if self._value("SELECT 1 FROM extents WHERE inode = ? LIMIT 1", inode):
            text = f"its data is lost: extents/{self._backing.name(inode)} is missing"
            self._problem("backing-missing", text, inode)
        else:
            text = f"extents/{self._backing.name(inode)} is missing; it held no data"
            self._problem("backing-missing", text, inode, mend_files=mend)

    def _backing_file(self, fd: int, inode: int, size: int, times: tuple[int, int]) -> None:
        st = os.fstat(fd)
        name = f"extents/{self._backing.name(inode)}"
        if not stat.S_ISREG(st.st_mode):
            self._problem("backing-missing", f"{name} is no regular file", inode)
            return
        if st.st_size < size:
            text = f"{size - st.st_size} of {size} bytes are lost: {name} is shorter"
            self._problem("backing-size", text, inode, offset=st.st_size)
            return
        sums = dict(self._all("SELECT number, checksum FROM extents WHERE inode = ?", inode))
        for number in [n for n in sums if not 0 <= n * EXTENT_SIZE < size]:
            del sums[number]
            self._problem(
                "extents",
                f"a checksum of extent {number}, which is beyond the size of {size} bytes",
                inode,
                mend=self._sql("DELETE FROM extents WHERE inode = ? AND number = ?", inode, number),
            )
        self._holes(fd, inode, size, sums)
        if st.st_size == size and (
            st.st_mtime_ns == times[1]
            or not self._clean  # a time that was set may have reached only one of the two
            or st.st_mtime_ns == self._backing.mtime_as_kept(times[1])
        ):
            return
        intact = self._is_intact(fd, inode, size)
        if st.st_size > size:
            self._longer(inode, size, st, intact=intact)
        else:
            self._problem(
                "backing-mtime",
                f"{name} was changed behind the store's back"
                + ("; its data is as recorded" if intact else ", and its data is not as recorded"),
                inode,
                mend_files=(lambda: self._backing.set_times(inode, *times)) if intact else None,
            )

    def _longer(self, inode: int, size: int, st: os.stat_result, *, intact: bool) -> None:
        """A backing file with more at its end than was recorded: take it in if the rest is intact."""

        def mend() -> None:
            self._record_checksums(inode)
            self._db.execute(
                "UPDATE inodes SET size = ?, blocks = ?, mtime_ns = ? WHERE id = ?",
                (st.st_size, st.st_blocks, st.st_mtime_ns, inode),
            )

        self._problem(
            "backing-size",
            f"size is {size}, but extents/{self._backing.name(inode)} has {st.st_size} bytes"
            + ("" if intact else ", and its data is not as recorded"),
            inode,
            offset=size,
            mend=mend if intact else None,
        )

    def _holes(self, fd: int, inode: int, size: int, sums: dict[int, bytes]) -> None:
        """Extents with data have a checksum, holes have none; zeros may be either."""
        with_data = set(b.extents_with_data(fd, size))
        for number in sorted(with_data - sums.keys()):
            found = _sum(fd, number, size)
            if found != _sum_of_zeros(number, size):
                self._problem(
                    "extents",
                    f"no checksum of the data at {number * EXTENT_SIZE}",
                    inode,
                    offset=number * EXTENT_SIZE,
                    mend=self._sql("INSERT INTO extents VALUES (?, ?, ?)", inode, number, found),
                )
        for number in sorted(sums.keys() - with_data):
            if sums[number] != _sum_of_zeros(number, size):
                self._known_bad.add((inode, number))
                self._problem(
                    "extents",
                    f"the data at {number * EXTENT_SIZE} is lost: there is a hole",
                    inode,
                    offset=number * EXTENT_SIZE,
                )

    def _is_intact(self, fd: int, inode: int, size: int) -> bool:
        """Whether a file's first `size` bytes are what was recorded."""
        sums = self._all("SELECT number, checksum FROM extents WHERE inode = ?", inode)
        try:
            return all(_sum(fd, n, size) == c for n, c in sums if 0 <= n * EXTENT_SIZE < size)
        except OSError:
            return False

    def _orphans(self) -> None:
        """Backing files without an inode."""
        if not self._clean:
            return  # a crash leaves such files, and the next mount removes them
        known = {i for (i,) in self._db.execute("SELECT id FROM inodes")}
        for inode in sorted(set(self._backing.numbers()) - known):
            name = f"extents/{self._backing.name(inode)}"
            if self._backing.stat(inode).st_size == 0:
                mend: Callable[[], object] = lambda inode=inode: self._to_remove.append(inode)  # type: ignore[misc]  # noqa: E731
                text = f"{name} belongs to no inode, and is empty"
            else:
                mend = lambda inode=inode: self._save_orphan(inode)  # type: ignore[misc]  # noqa: E731
                text = f"{name} belongs to no inode"
            self._problem("backing-orphan", text, mend=mend)

    def _save_orphan(self, inode: int) -> None:
        self._adopter(inode)()
        self._save(inode)
        self._record_checksums(inode)

    def _record_checksums(self, inode: int) -> None:
        with self._backing.opened(inode) as fd:
            sums = b.checksums(fd, os.fstat(fd).st_size)
        self._db.execute("DELETE FROM extents WHERE inode = ?", (inode,))
        self._db.executemany(
            "INSERT INTO extents VALUES (?, ?, ?)", [(inode, n, c) for n, c in sums]
        )

    def _note_what_a_mount_does(self) -> None:
        removed = self._value(f"SELECT count(*) FROM inodes WHERE {REMOVED}")
        written = self._value("SELECT count(*) FROM inodes WHERE writing = 1")
        if not self._clean and not self._repair:
            self._report.notes.append(
                "it was not closed; the next mount puts it in order by itself"
            )
        if removed:
            self._report.notes.append(
                f"{removed} files were removed while open; a mount frees them"
            )
        if written:
            self._report.notes.append(
                f"{written} files were open for writing: their data has no checksums until a mount"
            )

    # ----------------------------------------------------------------------------------- the data

    def _data(self) -> None:
        """Read every extent and compare it with its checksum."""
        total = self._value(
            "SELECT ifnull(sum(min(?1, size - number * ?1)), 0) FROM extents JOIN inodes ON id = inode"
            " WHERE writing = 0 AND number >= 0 AND number * ?1 < size",
            EXTENT_SIZE,
        )
        for inode, size in self._db.execute(
            f"SELECT id, size FROM inodes WHERE {_REGULAR} AND writing = 0 AND nlink > 0"
        ):
            try:
                fd = self._backing.open(inode, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                continue  # reported already
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # it is the disk that is checked
                self._file_data(fd, inode, size, total)
            finally:
                os.close(fd)

    def _file_data(self, fd: int, inode: int, size: int, total: int) -> None:
        for number, recorded in self._all(
            "SELECT number, checksum FROM extents WHERE inode = ? AND number >= 0 ORDER BY number",
            inode,
        ):
            offset = number * EXTENT_SIZE
            length = min(EXTENT_SIZE, size - offset)
            try:
                if (inode, number) in self._known_bad or offset + length > os.fstat(fd).st_size:
                    continue  # reported already
                if length > 0 and _sum(fd, number, size) != recorded:
                    text = f"damaged: {length} bytes at {offset} are not what was recorded"
                    self._problem("data", text, inode, offset=offset)
            except OSError as e:
                text = f"unreadable: {length} bytes at {offset}: {e.strerror}"
                self._problem("unreadable", text, inode, offset=offset)
            self._report.checked += max(0, length)
            self._progress(self._report.checked, total)


def _plain(sql: str) -> str:
    """A statement without its comments and line breaks."""
    return " ".join(re.sub(r"--[^\n]*", "", sql).split())


_buffer = memoryview(bytearray(EXTENT_SIZE))
_ZEROS = bytes(EXTENT_SIZE)


def _sum(fd: int, number: int, size: int) -> bytes:
    """The checksum of an extent of a file of `size` bytes; what is missing at the end counts as zeros."""
    offset = number * EXTENT_SIZE
    view = _buffer[: min(EXTENT_SIZE, size - offset)]
    got = b.read_full(fd, view, offset)
    view[got:] = _ZEROS[: len(view) - got]
    return b.checksum(view)


def _sum_of_zeros(number: int, size: int) -> bytes:
    length = min(EXTENT_SIZE, size - number * EXTENT_SIZE)
    return b.checksum(_ZEROS) if length == EXTENT_SIZE else b.checksum(_ZEROS[:length])
