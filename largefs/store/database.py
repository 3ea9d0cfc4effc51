"""meta.db as a file: its header, the lock that keeps others out, its log, and room on the disk for that.

What is in its tables is the business of `schema` and `store`.
"""

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import apsw

from largefs.store import backing, schema
from largefs.store.errors import NewerFormatError, NotAStoreError, StoreError, fail

NEW = "meta.db.new"
"""What meta.db is called while it is being made."""

CACHE = 8 << 20
"""Bytes of meta.db that SQLite keeps in memory."""

LOG_RESERVE = 16 << 20
"""Bytes of disk that a store holds for SQLite's log, also while nobody has it open, so that a full disk
can be cleared up: to mount and to remove a file are changes, too. Room for a checkpointed log (4 MiB)
and for all of the cache."""


def create(meta: Path, fill: Callable[[apsw.Connection], None]) -> None:
    """Make meta.db under another name, have it filled, and move it into place: it exists wholly or not.

    Raises OSError or apsw.Error.
    """
    temporary = meta.with_name(NEW)
    temporary.unlink(missing_ok=True)
    db = open_database(temporary, apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
    try:
        fill(db)
    finally:
        db.close()
    temporary.chmod(0o600)
    temporary.rename(meta)
    fd = os.open(meta.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_format(meta: Path) -> None:
    """Check application_id and user_version straight from the file's header, before SQLite sees it.

    https://www.sqlite.org/fileformat2.html#the_database_header: user_version is at byte 60,
    application_id at byte 68, big endian. Raises NotAStoreError, NewerFormatError, StoreError.
    """
    store = meta.parent
    try:
        if not stat.S_ISREG(meta.stat().st_mode):
            raise FileNotFoundError
        with meta.open("rb") as f:
            header = f.read(100)
    except NotADirectoryError:
        raise NotAStoreError(f"{store}: not a directory, so no largefs store") from None
    except FileNotFoundError:
        raise NotAStoreError(f"{store}: no largefs store ({_what_to_name(store)})") from None
    except OSError as e:
        raise StoreError(f"{meta}: {e.strerror}") from e
    check_length(meta)
    if header[:16] != b"SQLite format 3\0" or header[68:72] != schema.APPLICATION_ID.to_bytes(4):
        raise NotAStoreError(f"{store}: no largefs store (its meta.db is something else)")
    version = int.from_bytes(header[60:64])
    if version > schema.FORMAT_VERSION:
        raise NewerFormatError(
            f"{store}: format version {version} is newer than this largefs, which knows "
            f"{schema.FORMAT_VERSION}; update largefs"
        )


def check_length(file: Path) -> None:
    """Refuse a path that SQLite cannot open; raises StoreError.

    MAX_PATHNAME in os_unix.c, less the 8 bytes that sqlite3PagerOpen() keeps for "-journal"; symlinks
    are resolved first.
    """
    most = 512 - 8
    length = len(os.fsencode(os.path.realpath(file)))
    if length > most:
        raise StoreError(
            f"{file.parent}: its path is too long for SQLite, by {length - most} bytes; "
            "choose a shorter one"
        )


def _what_to_name(place: Path) -> str:
    """What to do about a place that is no store."""
    if place.is_mount():
        return f"where one is mounted, its store is: findmnt -no SOURCE {place}"
    if place.is_dir() and any(place.iterdir()):
        return "name the directory that largefs mkfs made"
    return f"make one: largefs mkfs {place}"


def open_database(file: Path, flags: int = apsw.SQLITE_OPEN_READWRITE) -> apsw.Connection:
    """Open an SQLite database, whatever bytes its path has; raises apsw.Error.

    apsw takes only text. For other paths a descriptor of the directory serves: SQLite follows symlinks
    before it opens (unixFullPathname() in os_unix.c), so that what it keeps, and gives its log, is the
    true path, and the descriptor may go.
    """
    try:
        return apsw.Connection(str(file), flags=flags)
    except UnicodeEncodeError:
        directory = os.open(file.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return apsw.Connection(f"/proc/self/fd/{directory}/{file.name}", flags=flags)
    finally:
        os.close(directory)


def connect(meta: Path) -> tuple[apsw.Connection, int]:
    """Open meta.db and take its lock, until `disconnect`; with a descriptor of its log.

    Raises apsw.BusyError where another process has it, else apsw.Error or OSError.
    """
    db = open_database(meta)
    try:
        db.pragma("locking_mode", "exclusive")
        db.pragma("journal_mode", "wal")
        db.pragma("synchronous", "full")
        db.pragma("cache_size", -CACHE // 1024)
        db.pragma("cache_spill", False)  # before COMMIT nothing is written: see Store._make_room
        db.pragma("temp_store", 2)  # in memory
        db.pragma("wal_autocheckpoint", 1000)
        db.execute("BEGIN IMMEDIATE; ROLLBACK")
        return db, os.open(log_of(meta), os.O_RDWR | os.O_CLOEXEC)
    except BaseException:
        db.close()
        raise


def log_of(meta: Path) -> Path:
    """SQLite's write-ahead log."""
    return meta.with_name(meta.name + "-wal")


def keep_log(db: apsw.Connection) -> None:
    """Have the write-ahead log stay when the database is closed; what it holds is merged all the same."""
    yes = ctypes.c_int(1)
    db.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.addressof(yes))


def disconnect(db: apsw.Connection, log: int) -> None:
    """Close what `connect` gave, and give up the lock. The log is merged, and stays as room held."""
    with contextlib.suppress(apsw.Error):
        keep_log(db)
        db.pragma("journal_size_limit", 0)  # what stays is empty
    db.close()
    with contextlib.suppress(OSError):
        hold_room(log, LOG_RESERVE)
    os.close(log)


def hold_room(log: int, length: int) -> None:
    """Have the blocks of a log that grows to `length` bytes; raises OSError.

    Where the filesystem cannot (ext2, ext3, NFS before 4.2), see at least that there is as much now,
    and the blocks that it takes to find it.
    """
    try:
        backing.fallocate(log, backing.FALLOC_FL_KEEP_SIZE, 0, length)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        missing = length - os.fstat(log).st_blocks * 512
        room = os.fstatvfs(log)
        if missing > 0 and room.f_bavail * room.f_frsize < missing + missing // 64 + (64 << 10):
            raise fail(errno.ENOSPC) from None
