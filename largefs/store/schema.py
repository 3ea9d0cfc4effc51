"""The schema of `meta.db`: what is on disk besides the file data, and what every column means.

`meta.db` is an SQLite database in WAL mode. All its tables are STRICT. `application_id` tells it from
other SQLite files, `user_version` is the format version of the whole store (`meta.db` and `extents/`).

Conventions
    times     nanoseconds since 1970-01-01 UTC (signed 64 bit, so until the year 2262)
    sizes     bytes
    names     BLOB: POSIX names are bytes without NUL and '/', not text
    inode     `inodes.id`; also the FUSE node id, and the name of the backing file in hexadecimal
"""

import apsw

APPLICATION_ID = 0x6C617266  # "larf"
FORMAT_VERSION = 1

ROOT_INODE = 1
"""The inode number of the root directory; FUSE_ROOT_ID in include/uapi/linux/fuse.h."""

SCHEMA = """
-- One row per inode of any type.
-- Invariants:
--   nlink is the number of dentries that name the inode; for a directory 2 plus its subdirectories
--     (denormalised: `largefs check` counts again). 0 only for an inode that was removed while open.
--   A regular file has a backing file extents/XX/ID; its st_size is this row's size, and its st_mtime
--     is this row's mtime_ns (as that filesystem can keep it), whenever writing = 0. While
--     writing = 1 the backing file is the truth.
--     (A crash between utimensat() and its commit leaves two mtimes: recovery makes them this row's.)
--   A number is never used again (AUTOINCREMENT), so a stale file handle never meets another file.
--     extents/given holds the highest one that was committed: more than is known here means that this
--     database was restored from a backup.
CREATE TABLE inodes (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    mode     INTEGER NOT NULL,   -- st_mode: type and permission bits
    uid      INTEGER NOT NULL,
    gid      INTEGER NOT NULL,
    nlink    INTEGER NOT NULL,
    size     INTEGER NOT NULL,   -- st_size: bytes; of a symlink, the target's length; of a directory, 0
    blocks   INTEGER NOT NULL,   -- st_blocks of the backing file (units of 512 bytes) when it was last
                                 -- settled: a copy of the store may differ; 0 without one
    rdev     INTEGER NOT NULL,   -- st_rdev of a device node, else 0
    atime_ns INTEGER NOT NULL,   -- set by utimensat() and at creation; reading does not move it
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    btime_ns INTEGER NOT NULL,   -- creation of the inode in this store
    huge     INTEGER NOT NULL CHECK (huge IN (0, 1)),
                                 -- 1: has eligible text, or was made executable and is being written:
                                 -- st_blksize is 2 MiB, and space comes in extents
    writing  INTEGER NOT NULL CHECK (writing IN (0, 1))
                                 -- 1: may have been written since its extents rows were made
) STRICT;
CREATE INDEX inodes_writing ON inodes (id) WHERE writing = 1;
CREATE INDEX inodes_unlinked ON inodes (id) WHERE nlink = 0;

-- The names of a directory. id is the position that readdir() resumes from: a directory is listed in
-- its order, and an entry keeps it until it is removed.
-- The entries '.' and '..' are not stored. No (parent, name) twice; parent is a directory.
CREATE TABLE dentries (
    id     INTEGER PRIMARY KEY,
    parent INTEGER NOT NULL REFERENCES inodes (id),
    name   BLOB NOT NULL,        -- 1 to 255 bytes
    inode  INTEGER NOT NULL REFERENCES inodes (id),
    UNIQUE (parent, name)
) STRICT;
CREATE INDEX dentries_by_parent ON dentries (parent);  -- with the row id: a directory in its order
CREATE INDEX dentries_by_inode ON dentries (inode);    -- '..', and the paths of an inode

-- The target of each symlink, exactly one row per inode of that type.
CREATE TABLE symlinks (
    inode  INTEGER PRIMARY KEY REFERENCES inodes (id),
    target BLOB NOT NULL         -- 1 to 4095 bytes
) STRICT;

CREATE TABLE xattrs (
    inode INTEGER NOT NULL REFERENCES inodes (id),
    name  BLOB NOT NULL,         -- with its namespace: user.…, security.…, system.posix_acl_…
    value BLOB NOT NULL,         -- at most 64 KiB
    PRIMARY KEY (inode, name)
) STRICT, WITHOUT ROWID;

-- The checksum of each extent that holds data. No row: the extent is a hole (or, while writing = 1,
-- unknown). Bytes of the extent beyond the file's size are not part of it.
CREATE TABLE extents (
    inode    INTEGER NOT NULL REFERENCES inodes (id),
    number   INTEGER NOT NULL,   -- file offset divided by 2 MiB
    checksum BLOB NOT NULL,      -- xxh3-128, canonical (big endian), 16 bytes
    PRIMARY KEY (inode, number)
) STRICT, WITHOUT ROWID;

-- What the import changed of an ELF file to make its text eligible: enough to give back the original
-- bytes. No row: the file is as it came. Dropped as soon as the file is written.
CREATE TABLE alignments (
    inode         INTEGER PRIMARY KEY REFERENCES inodes (id),
    original_size INTEGER NOT NULL,  -- bytes
    record        BLOB NOT NULL      -- largefs.hugetext.align reads it
) STRICT;

-- Exactly one row.
CREATE TABLE superblock (
    id      INTEGER PRIMARY KEY CHECK (id = 1),
    uuid    TEXT NOT NULL,       -- of the filesystem, made by mkfs
    created INTEGER NOT NULL,    -- when, in ns
    clean   INTEGER NOT NULL CHECK (clean IN (0, 1))
                                 -- 0: a process holds the store, or ended without closing it
) STRICT;
"""


def create(db: apsw.Connection) -> None:
    """Make the tables of format version 1 in an empty database."""
    db.execute(SCHEMA)
    db.pragma("application_id", APPLICATION_ID)
    db.pragma("user_version", FORMAT_VERSION)
