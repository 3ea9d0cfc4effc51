"""The checks of names: all inodes have one, all names lead from the root to an inode, links are counted."""

from largefs.store.check.context import DIRECTORY, Context
from largefs.store.check.lost_and_found import adopt, free_name, save
from largefs.store.schema import ROOT_INODE
from largefs.store.store import NAME_MAX, REMOVED


def dentries(c: Context) -> None:
    """Each name is in a directory and names an inode; a directory has one name."""
    for entry, name, parent, inode in c.all(
        "SELECT d.id, d.name, d.parent, d.inode FROM dentries d LEFT JOIN inodes i ON i.id = d.parent"
        f" WHERE i.id IS NULL OR NOT i.{DIRECTORY}"
    ):
        text = f"its name {name!r} is in inode {parent}, which is no directory"
        c.problem("parent", text, inode, mendable=True)
        c.db.execute("DELETE FROM dentries WHERE id = ?", (entry,))
        save(c, inode, name)
    for entry, inode in c.all(
        "SELECT id, inode FROM dentries WHERE inode NOT IN (SELECT id FROM inodes)"
    ):
        if c.has_backing(inode):
            adopt(c, inode)
            text = f"inode {inode} is missing, but its data is there"
            c.problem("dentry", text, inode, mendable=True)
        else:
            c.problem("dentry", f"names inode {inode}, which is missing", inode, mendable=True)
            c.db.execute("DELETE FROM dentries WHERE id = ?", (entry,))
    for inode, first in c.all(
        "SELECT d.inode, min(d.id) FROM dentries d JOIN inodes i ON i.id = d.inode"
        f" WHERE i.{DIRECTORY} GROUP BY d.inode HAVING count(*) > 1"
    ):
        c.problem("dentry", "a directory with more than one name", inode, mendable=True)
        c.db.execute("DELETE FROM dentries WHERE inode = ? AND id != ?", (inode, first))


def legal(c: Context) -> None:
    """Each name is one that POSIX allows."""
    for entry, parent, name, inode in c.all(
        "SELECT id, parent, name, inode FROM dentries WHERE length(name) NOT BETWEEN 1 AND ?"
        " OR name IN (x'2e', x'2e2e') OR instr(name, x'2f') OR instr(name, x'00')",
        NAME_MAX,
    ):
        c.problem("name", f"the name {name!r} is not legal", inode, mendable=True)
        better = free_name(c, parent, b"illegal-name")
        c.db.execute("UPDATE dentries SET name = ? WHERE id = ?", (better, entry))


def unnamed(c: Context) -> None:
    """Inodes that no directory names."""
    for (inode,) in c.all(
        "SELECT id FROM inodes WHERE id NOT IN (SELECT inode FROM dentries) AND id != ?"
        f" AND NOT ({REMOVED})",
        ROOT_INODE,
    ):
        c.problem("unnamed", f"inode {inode} has no name", inode, mendable=True)
        save(c, inode)


def cycles(c: Context) -> None:
    """Directories that contain themselves, so that no path from the root leads to them."""
    unreachable = dict(
        c.all(
            "WITH RECURSIVE live (id) AS (SELECT ? UNION"
            " SELECT d.inode FROM live JOIN dentries d ON d.parent = live.id)"
            " SELECT d.inode, d.parent FROM dentries d JOIN inodes i ON i.id = d.inode"
            f" WHERE i.{DIRECTORY} AND d.inode NOT IN live ORDER BY d.inode DESC",
            ROOT_INODE,
        )
    )
    done: set[int] = set()
    for start in sorted(unreachable):
        walked: set[int] = set()
        inode = start
        while inode in unreachable and inode not in done:
            if inode in walked:
                _cut(c, inode, unreachable[inode])
                break
            walked.add(inode)
            inode = unreachable[inode]
        done |= walked


def _cut(c: Context, inode: int, parent: int) -> None:
    c.problem("cycle", f"directory {inode} is inside itself, in {parent}", inode, mendable=True)
    c.db.execute("DELETE FROM dentries WHERE inode = ?", (inode,))
    c.db.execute("UPDATE inodes SET nlink = nlink - 1 WHERE id = ?", (parent,))
    save(c, inode)


def nlinks(c: Context) -> None:
    """A file has as many links as names, a directory 2 and one for each directory in it."""
    for inode, nlink, counted in c.all(
        "SELECT id, nlink, counted FROM (SELECT id, nlink, CASE WHEN"
        f" {DIRECTORY} THEN 2 + (SELECT count(*) FROM dentries d JOIN inodes c ON c.id = d.inode"
        f"   WHERE d.parent = i.id AND c.{DIRECTORY})"
        " ELSE (SELECT count(*) FROM dentries d WHERE d.inode = i.id) END AS counted"
        f" FROM inodes i WHERE NOT ({REMOVED})) WHERE nlink != counted"
    ):
        c.problem("nlink", f"nlink is {nlink}, but should be {counted}", inode, mendable=True)
        c.db.execute("UPDATE inodes SET nlink = ? WHERE id = ?", (counted, inode))
