"""The checks of meta.db as a whole: SQLite's structure, the tables, the superblock, inode numbers."""

import contextlib
import re
import time
import uuid

import apsw

from largefs.store import schema
from largefs.store.check.context import REGULAR, Context
from largefs.store.store import REMOVED, given


def structure(c: Context) -> bool:
    """SQLite's own structure and the schema; False: no row can be trusted, so nothing else is checked."""
    found = left = _integrity(c)
    if found and c.repair:
        with contextlib.suppress(apsw.ConstraintError):
            c.db.execute("REINDEX")
        if any(s.startswith("CHECK constraint") for s in found):
            c.db.execute("UPDATE inodes SET huge = huge != 0, writing = writing != 0")
            c.db.execute("UPDATE superblock SET clean = clean != 0")
        left = _integrity(c)
    for text in found:
        c.problem("database", f"meta.db: {text}", mendable=text not in left)
    lacking = _schema(c)
    fatal = [s for s in left if not s.startswith("CHECK constraint")]
    if fatal or lacking:
        c.report.notes.append(
            "the rest was not checked; restore meta.db from a backup, "
            "or rescue the files' data from extents/"
        )
    return not (fatal or lacking)


def _integrity(c: Context) -> list[str]:
    found = [row[0] for row in c.db.execute("PRAGMA integrity_check(100)")]
    return [] if found == ["ok"] else found


def _schema(c: Context) -> bool:
    """Compare the tables and indexes with the schema's; True: a table is missing or another."""
    wanted = apsw.Connection(":memory:")
    schema.create(wanted)
    query = "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'"
    there = {(kind, name): _plain(sql) for kind, name, sql in c.db.execute(query)}
    lacking = False
    for kind, name, sql in wanted.execute(query):
        if there.get((kind, name)) == _plain(sql):
            continue
        missing = (kind, name) not in there
        mendable = missing and kind == "index"
        what = "missing" if missing else "not as format version 1 has it"
        c.problem("schema", f"meta.db: {kind} {name} is {what}", mendable=mendable)
        if mendable:
            c.db.execute(sql)
        else:
            lacking = True
    wanted.close()
    return lacking


def _plain(sql: str) -> str:
    """A statement without its comments and line breaks."""
    return " ".join(re.sub(r"--[^\n]*", "", sql).split())


def superblock(c: Context) -> None:
    """Exactly one row; it tells whether the store was closed."""
    row = c.db.execute("SELECT clean FROM superblock").fetchone()
    if row is None:
        c.problem(
            "superblock",
            "meta.db: the superblock is missing; a repair gives the filesystem a new uuid",
            mendable=True,
        )
        c.db.execute(
            "INSERT INTO superblock VALUES (1, ?, ?, 0)", (str(uuid.uuid4()), time.time_ns())
        )
    c.clean = row is not None and bool(row[0])


def age(c: Context) -> None:
    """meta.db knows every number that was given; else it is a backup, and what it lacks is data."""
    if given(c.db) >= c.backing.given:
        return
    c.problem(
        "restored",
        f"meta.db is older than the data, as when it was restored from a backup: it knows of inodes"
        f" up to {given(c.db)}, but {c.backing.given} was given",
        mendable=True,
    )
    _go_on_behind(c, c.backing.given)
    c.db.execute("UPDATE superblock SET clean = 1")  # else a mount would tidy up
    for (inode,) in c.all(f"SELECT id FROM inodes WHERE {REMOVED} AND {REGULAR}"):
        if c.has_backing(inode):  # it may have got a name since
            c.db.execute("UPDATE inodes SET nlink = 1 WHERE id = ?", (inode,))
    c.clean = True  # it was no crash that left this


def numbers(c: Context) -> None:
    """The next inode number is beyond every number that was ever given."""
    highest = max(c.value("SELECT max(id) FROM inodes") or 0, max(c.backing.numbers(), default=0))
    last = given(c.db)
    if last == 0 or (last < highest and c.clean):
        c.problem(
            "numbers",
            f"the next inode number would be {last + 1}, but {highest} is given already",
            mendable=True,
        )
        _go_on_behind(c, highest)


def _go_on_behind(c: Context, inode: int) -> None:
    """Let the next inode number be a higher one."""
    c.db.execute("DELETE FROM sqlite_sequence WHERE name = 'inodes'")
    c.db.execute("INSERT INTO sqlite_sequence VALUES ('inodes', ?)", (inode,))


def note_what_a_mount_does(c: Context) -> None:
    """What a crash left is no problem: tell that the next mount puts it in order."""
    removed = c.value(f"SELECT count(*) FROM inodes WHERE {REMOVED}")
    written = c.value("SELECT count(*) FROM inodes WHERE writing = 1")
    if not c.clean and not c.repair:
        c.report.notes.append("it was not closed; the next mount puts it in order by itself")
    if removed:
        c.report.notes.append(f"{removed} files were removed while open; a mount frees them")
    if written:
        c.report.notes.append(
            f"{written} files were open for writing: their data has no checksums until a mount"
        )
