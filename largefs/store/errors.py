"""What can be wrong with a store, as one line that says what to do; and POSIX failures, by errno."""

import errno
import os
from pathlib import Path

import apsw

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when there is no room."""


class StoreError(Exception):
    """A store that cannot be used as asked. The text is one line, fit for stderr."""

    errno = errno.EIO
    """What a system call on the mounted store ends with."""


class NotAStoreError(StoreError):
    """The path holds no largefs store."""


class NewerFormatError(StoreError):
    """The store was written by a newer largefs, in a format that this one does not know."""


class RestoredError(StoreError):
    """meta.db is older than the data, so that opening the store would take data for leftovers."""


class BusyError(StoreError):
    """The store is in use: mounted, or being imported into, exported or checked."""

    def __init__(self, store: Path, holder: object) -> None:
        """`holder`: the `Owner` that has it, or None if that is not known."""
        super().__init__(f"{store}: in use: {holder or 'by another process'}; end that first")


class ReadOnlyError(StoreError):
    """The store failed to write and takes no more changes until it is opened again."""


class DiskFullError(StoreError):
    """There is no room to commit. Nothing is lost: it can be tried again when there is room."""

    errno = errno.ENOSPC

    def __init__(self, store: Path) -> None:
        super().__init__(f"{store}: its disk is full; make room there and try again")


def of_database(store: Path, e: apsw.Error) -> StoreError:
    """What SQLite says of a store's meta.db that is open, as the error that the store raises."""
    if isinstance(e, apsw.FullError):
        return DiskFullError(store)
    return StoreError(
        f"{store}: meta.db cannot be read or written ({e}); see to the disk (dmesg), "
        f"then run: largefs check {store}"
    )


def fail(number: int) -> OSError:
    """An OSError with the errno's own text."""
    return OSError(number, os.strerror(number))
