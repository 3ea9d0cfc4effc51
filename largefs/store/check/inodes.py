"""The checks of inodes by themselves: the root, types and what depends on them, rows of other tables."""

import stat

from largefs.store.check.context import DIRECTORY, REGULAR, SYMLINK, Context
from largefs.store.check.lost_and_found import new_directory
from largefs.store.schema import ROOT_INODE
from largefs.store.store import SYMLINK_MAX

XATTR_NAME_MAX, XATTR_SIZE_MAX = 255, 65536  # linux/limits.h

_TYPES = (
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFLNK,
    stat.S_IFCHR,
    stat.S_IFBLK,
    stat.S_IFIFO,
    stat.S_IFSOCK,
)


def root(c: Context) -> None:
    """There is a root, it is a directory, and no directory names it."""
    mode = c.value("SELECT mode FROM inodes WHERE id = ?", ROOT_INODE)
    if mode is None:
        c.problem("root", "the root directory is missing", mendable=True)
        new_directory(c, ROOT_INODE)
        c.db.execute(
            "UPDATE inodes SET nlink = 2 + (SELECT count(*) FROM dentries d JOIN inodes c"
            f" ON c.id = d.inode WHERE d.parent = ?1 AND c.{DIRECTORY}) WHERE id = ?1",
            (ROOT_INODE,),
        )
    elif not stat.S_ISDIR(mode):
        c.problem("root", f"the root is no directory (mode {mode:o})", mendable=True)
        c.db.execute(
            "UPDATE inodes SET mode = ?, size = 0, writing = 0, huge = 0 WHERE id = ?",
            (stat.S_IFDIR | stat.S_IMODE(mode), ROOT_INODE),
        )
    for (entry,) in c.all("SELECT id FROM dentries WHERE inode = ?", ROOT_INODE):
        c.problem("root", "the root directory has a name in another directory", mendable=True)
        c.db.execute("DELETE FROM dentries WHERE id = ?", (entry,))


def types(c: Context) -> None:
    """Each inode has a type."""
    kinds = ", ".join(map(str, _TYPES))
    for inode, mode in c.all(f"SELECT id, mode FROM inodes WHERE mode & ~4095 NOT IN ({kinds})"):
        c.problem("mode", f"mode {mode:o} is no file type", inode, mendable=True)
        right = _guess_type(c, inode) | mode & 0o7777
        c.db.execute("UPDATE inodes SET mode = ? WHERE id = ?", (right, inode))


def _guess_type(c: Context, inode: int) -> int:
    if c.value("SELECT 1 FROM dentries WHERE parent = ?", inode):
        return stat.S_IFDIR
    if c.value("SELECT 1 FROM symlinks WHERE inode = ?", inode):
        return stat.S_IFLNK
    if c.value("SELECT rdev FROM inodes WHERE id = ?", inode):
        return stat.S_IFCHR
    return stat.S_IFREG if c.has_backing(inode) else stat.S_IFIFO


def columns(c: Context) -> None:
    """The columns that have but one value in an inode of some type."""
    _column(
        c, "owner", "uid NOT BETWEEN 0 AND 4294967295 OR gid NOT BETWEEN 0 AND 4294967295",
        "uid {} is no number of an owner", "uid",
        "uid = uid & 4294967295, gid = gid & 4294967295",
    )  # fmt: skip
    _column(
        c, "size", f"NOT ({REGULAR} OR {SYMLINK}) AND size != 0",
        "size is {}, but only files have one", "size", "size = 0",
    )  # fmt: skip
    _column(
        c, "rdev", f"mode & {0o170000} NOT IN ({stat.S_IFCHR}, {stat.S_IFBLK}) AND rdev != 0",
        "has a device number ({}), but is no device", "rdev", "rdev = 0",
    )  # fmt: skip
    _column(
        c, "writing", f"NOT {REGULAR} AND (writing OR huge)",
        "has the marks of a regular file (mode {:o})", "mode", "writing = 0, huge = 0",
    )  # fmt: skip


def _column(c: Context, kind: str, where: str, text: str, column: str, mended: str) -> None:
    """Inodes for which the condition `where` must not hold, and the assignments that mend it."""
    for inode, value in c.all(f"SELECT id, {column} FROM inodes WHERE {where}"):
        c.problem(kind, text.format(value), inode, mendable=True)
        c.db.execute(f"UPDATE inodes SET {mended} WHERE id = ?", (inode,))


def strays(c: Context) -> None:
    """Rows about inodes that are missing or of a type that has no such rows."""
    for table, type_, what in (
        ("symlinks", SYMLINK, "symlink's target"),
        ("extents", REGULAR, "checksum"),
        ("alignments", REGULAR, "record of alignment"),
        ("xattrs", "1", "extended attribute"),
    ):
        for inode, count in c.all(
            f"SELECT inode, count(*) FROM {table}"
            f" WHERE inode NOT IN (SELECT id FROM inodes WHERE {type_}) GROUP BY inode"
        ):
            text = f"{count} rows of {table}, but inode {inode} has no {what}"
            c.problem(table, text, inode, mendable=True)
            c.db.execute(f"DELETE FROM {table} WHERE inode = ?", (inode,))
    for (inode,) in c.all(
        "SELECT inode FROM alignments JOIN inodes ON id = inode WHERE writing = 1"
    ):
        text = "was written since the import aligned it, which is still on record"
        c.problem("alignments", text, inode, mendable=True)
        c.db.execute("DELETE FROM alignments WHERE inode = ?", (inode,))


def symlinks(c: Context) -> None:
    """Each symlink has a target that POSIX allows, and its length as size."""
    for inode, size, target in c.all(
        f"SELECT id, size, target FROM inodes LEFT JOIN symlinks ON inode = id WHERE {SYMLINK}"
    ):
        if target is None or not 0 < len(target) <= SYMLINK_MAX or b"\0" in target:
            c.problem("symlinks", "a symlink without a legal target; remove it", inode)
        elif size != len(target):
            text = f"size is {size}, but the symlink's target has {len(target)} bytes"
            c.problem("size", text, inode, mendable=True)
            c.db.execute("UPDATE inodes SET size = ? WHERE id = ?", (len(target), inode))


def xattrs(c: Context) -> None:
    """Names and sizes are within the kernel's limits."""
    for inode, name, size in c.all(
        "SELECT inode, name, length(value) FROM xattrs WHERE length(name) NOT BETWEEN 1 AND ?"
        " OR instr(name, x'00') OR length(value) > ?",
        XATTR_NAME_MAX,
        XATTR_SIZE_MAX,
    ):
        text = f"the extended attribute {name!r} of {size} bytes is not legal"
        c.problem("xattrs", text, inode)
