"""-o verify: a file's checksums are checked before its first open is answered."""

import errno
import logging

import trio
from pyfuse3 import FUSEError

from largefs.store import Inode, Store
from largefs.store.store import path_of

log = logging.getLogger(__name__)


REMEMBERED = 100_000
"""Files known to be good, at most; beyond that all are forgotten, and read again when next opened."""


class Verify:
    """Which files were found to hold what was recorded, in this mount."""

    def __init__(self, store: Store, *, enabled: bool) -> None:
        self._store = store
        self._enabled = enabled
        self._good: dict[int, int] = {}  # inode -> mtime

    async def on_open(self, row: Inode) -> None:
        """Raise EIO if the file's extents are not what was recorded when it was last written."""
        if not self._enabled or row.writing or self._good.get(row.id) == row.mtime_ns:
            return
        expected = self._store.checksums(row.id)
        found = dict(await trio.to_thread.run_sync(self._store.sum, row.id))
        size = self._store.backing.stat(row.id).st_size
        if size != row.size or found != expected:
            bad = sorted({n for n, _ in expected.items() ^ found.items()})
            path = path_of(self._store.db, row.id) or b"a removed file"
            name = path.decode(errors="backslashreplace")
            log.error("inode %d, %s: damaged: size %d, extents %s", row.id, name, size, bad)
            raise FUSEError(errno.EIO)  # an OSError would log a traceback as well
        if len(self._good) >= REMEMBERED:
            self._good.clear()
        self._good[row.id] = row.mtime_ns
