"""Warm-up at open: a program's text is in 2 MiB folios of the page cache before it faults on it.

On the `passthrough` route the mapping is the backing file's, so the daemon reads the backing file's
eligible text in 2 MiB folios when the file is opened for execution, or is a shared object and is opened
for reading (ld.so's open() tells nothing more). Folios that are there already cost a look.
"""

import enum
import logging
import os
import threading
from functools import partial

import trio

from largefs.hugetext import text, warm
from largefs.store import Inode, Store

log = logging.getLogger(__name__)

FMODE_EXEC = 0x20
"""In the flags of OPEN when the kernel opens a file to execute it (include/linux/fs.h)."""

THREADS = 2


class When(enum.Enum):
    """The mount option hugetext=: whether an open waits for the warm-up."""

    OPEN = "open"
    BACKGROUND = "background"
    OFF = "off"


class Warmup:
    """The warm-ups of a mount."""

    def __init__(self, store: Store, when: When) -> None:
        self._store = store
        self.when = when
        self._texts: dict[tuple[int, int], text.Text] = {}  # (inode, mtime) -> its text
        self._running: dict[int, trio.Event] = {}
        self._limiter = trio.CapacityLimiter(THREADS)
        self._stop = threading.Event()
        self._send, self._background = trio.open_memory_channel[int](1000)

    async def on_open(self, row: Inode, fd: int, flags: int) -> None:
        """Warm a file that is opened for reading, if it has eligible text that is about to run."""
        if not row.huge or row.writing or self.when is When.OFF:
            return
        found = self._text(row, fd)
        if not found.ranges or not (flags & FMODE_EXEC or found.is_shared_object):
            return
        if self.when is When.OPEN:
            await self._warm(row.id)
        else:
            try:
                self._send.send_nowait(row.id)
            except trio.WouldBlock:
                pass  # a thousand programs wait already

    def _text(self, row: Inode, fd: int) -> text.Text:
        key = (row.id, row.mtime_ns)
        found = self._texts.get(key)
        if found is None:
            if len(self._texts) >= 10_000:
                self._texts.clear()
            found = self._texts[key] = text.of_file(fd)
        return found

    async def _warm(self, inode: int) -> None:
        """Warm one inode; callers that come while it is being warmed wait for the same."""
        if inode in self._running:
            await self._running[inode].wait()
            return
        done = self._running[inode] = trio.Event()
        try:
            await trio.to_thread.run_sync(
                partial(self._warm_in_thread, inode), limiter=self._limiter
            )
        except OSError as e:
            log.warning("inode %d: warm-up failed: %s", inode, e)
        finally:
            del self._running[inode]
            done.set()

    def _warm_in_thread(self, inode: int) -> None:
        fd = self._store.backing.open(inode, os.O_RDONLY)
        try:
            for r in text.of_file(fd).ranges:
                warm.warm_range(fd, r.offset, r.length, self._stop.is_set)
        finally:
            os.close(fd)

    async def run_background(self) -> None:
        """Do the warm-ups that no open waits for, for ever."""
        async for inode in self._background:
            await self._warm(inode)

    def stop(self) -> None:
        """Have running warm-ups end soon."""
        self._stop.set()
