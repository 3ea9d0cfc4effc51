"""Where a repair keeps what lost its name or its inode: lost+found in the root, made when it is needed."""

import os
import stat
import time

from largefs.store.check.context import DIRECTORY, Context
from largefs.store.schema import ROOT_INODE

LOST_AND_FOUND = b"lost+found"


def save(c: Context, inode: int, name: bytes = b"") -> None:
    """Give an inode a name in lost+found: `name`, or '#INODE'."""
    if not c.lost_and_found:
        c.lost_and_found = _find(c) or _make(c)
    name = free_name(c, c.lost_and_found, name or b"#%d" % inode)
    _link(c, c.lost_and_found, name, inode)
    c.db.execute(
        f"UPDATE inodes SET nlink = nlink + 1 WHERE id = ?"
        f" AND (SELECT {DIRECTORY} FROM inodes WHERE id = ?)",
        (c.lost_and_found, inode),
    )


def adopt(c: Context, inode: int) -> None:
    """Make an inode for a backing file that has none: only its owner can read it."""
    st = c.backing.stat(inode)
    c.db.execute(
        "INSERT OR IGNORE INTO inodes VALUES (?, ?, ?, ?, 1, ?, ?, 0, ?, ?, ?, ?, 0, 0)",
        (
            inode,
            stat.S_IFREG | 0o600,
            *(os.geteuid(), os.getegid()),
            *(st.st_size, st.st_blocks),
            *(st.st_atime_ns, st.st_mtime_ns, time.time_ns(), time.time_ns()),
        ),
    )


def free_name(c: Context, parent: int, name: bytes) -> bytes:
    """A name that is not yet in a directory: `name`, or with the first number that makes it so."""
    candidate, n = name, 0
    query = "SELECT 1 FROM dentries WHERE parent = ? AND name = ?"
    while c.value(query, parent, candidate):
        n += 1
        candidate = name + b"-%d" % n
    return candidate


def new_directory(c: Context, inode: int | None = None) -> int:
    """Make a directory that has no name yet, for its owner only; returns its inode number."""
    now = time.time_ns()
    c.db.execute(
        "INSERT INTO inodes VALUES (?, ?, ?, ?, 2, 0, 0, 0, ?, ?, ?, ?, 0, 0)",
        (inode, stat.S_IFDIR | 0o700, os.geteuid(), os.getegid(), now, now, now, now),
    )
    return c.db.last_insert_rowid()


def _find(c: Context) -> int:
    found = c.value(
        "SELECT i.id FROM dentries d JOIN inodes i ON i.id = d.inode"
        f" WHERE d.parent = ? AND d.name = ? AND i.{DIRECTORY}",
        ROOT_INODE,
        LOST_AND_FOUND,
    )
    return int(found or 0)


def _make(c: Context) -> int:
    inode = new_directory(c)
    _link(c, ROOT_INODE, free_name(c, ROOT_INODE, LOST_AND_FOUND), inode)
    c.db.execute("UPDATE inodes SET nlink = nlink + 1 WHERE id = ?", (ROOT_INODE,))
    return inode


def _link(c: Context, parent: int, name: bytes, inode: int) -> None:
    c.db.execute(
        "INSERT INTO dentries (parent, name, inode) VALUES (?, ?, ?)", (parent, name, inode)
    )
