"""When the store's changes become durable: on fsync, and every few seconds by themselves.

The backing files of what was removed go after the commit that says so, in the background: there may be
many, and nobody's fsync has to wait for another's rm.
"""

import errno
import logging

import trio

from largefs.store import ReadOnlyError, Store, StoreError
from largefs.store.errors import fail

log = logging.getLogger(__name__)


class Commits:
    """Commits of a mounted store: the slow part in a thread, one at a time, never half."""

    def __init__(self, store: Store, interval: float) -> None:
        self._store = store
        self._interval = interval
        self._lock = trio.Lock()
        self._removing = trio.Lock()
        self._dropped = trio.Event()

    async def commit(self) -> None:
        """Make every change made before this call durable; raises StoreError.

        OSError (EROFS) instead if it can never be done any more.
        """
        async with self._lock:
            if not self._store.uncommitted:
                return
            try:
                if to_flush := self._store.to_flush():
                    with self._store.flushing():
                        await trio.to_thread.run_sync(self._store.backing.flush, to_flush)
                self._store.finish_commit()
            except ReadOnlyError as e:
                log.critical("%s", e)
                raise fail(errno.EROFS) from None
        if self._store.to_remove:
            self._dropped.set()

    async def remove_dropped(self) -> None:
        """Remove the backing files of what commits dropped; when this returns their room is free."""
        async with self._removing:
            if self._store.to_remove:
                await trio.to_thread.run_sync(self._store.remove_dropped)

    async def run(self) -> None:
        """Commit at every interval, for ever; a failure is logged and tried again."""
        while True:
            await trio.sleep(self._interval)
            try:
                await self.commit()
            except (OSError, StoreError) as e:
                log.error("commit failed: %s", e)

    async def run_removals(self) -> None:
        """Remove backing files as soon as that is safe, for ever; what fails waits for the next commit."""
        while True:
            await self._dropped.wait()
            self._dropped = trio.Event()
            await self.remove_dropped()
