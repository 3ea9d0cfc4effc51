"""Warm-up at open: a program's text is in 2 MiB folios of the page cache before it faults on it.

It happens when a file is opened for execution, or is a shared object and is opened for reading (ld.so's
open() tells nothing more). What is done depends on the route:

passthrough   the mapping is the backing file's: its eligible text is read in 2 MiB folios, in a thread
collapse      a helper process collapses the text through the mount
folio, none   nothing: the kernel does it by itself, or nothing can be done

Folios that are there already cost a look.
"""

import enum
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from largefs.hugetext import collapse, text, warm
from largefs.hugetext.eligible import Range
from largefs.hugetext.routes import Route
from largefs.store import Inode, Store, StoreError
from largefs.store.backing import has_writer

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

    def __init__(self, store: Store, when: When, mountpoint: Path) -> None:
        self._store = store
        self._when = when
        self._mountpoint = os.fsencode(mountpoint)
        self._helper = collapse.Helper()
        self.route = Route.NONE
        """What to do; to be set when it is known."""
        self._texts: dict[tuple[int, int], text.Text] = {}  # (inode, mtime) -> its text
        self._running: dict[int, trio.Event] = {}
        self._limiter = trio.CapacityLimiter(THREADS)
        self._stop = threading.Event()
        self._send, self._background = trio.open_memory_channel[tuple[int, list[Range]]](1000)

    async def on_open(self, row: Inode, fd: int, flags: int, pid: int) -> None:
        """Warm a file that process `pid` opens for reading, if its eligible text is about to run."""
        if self._when is When.OFF or pid == self._helper.pid:
            return
        if self.route not in (Route.PASSTHROUGH, Route.COLLAPSE):
            return
        if self._store.is_settled(row):
            found = self._text(row, fd) if row.huge else text.NONE
        elif not has_writer(fd):  # whoever linked or copied it has closed it, a moment ago
            found = text.of_file(fd)
        else:
            return
        if not found.ranges or not (flags & FMODE_EXEC or found.is_shared_object):
            return
        if self._when is When.OPEN:
            await self._warm(row.id, found.ranges)
        else:
            try:
                self._send.send_nowait((row.id, found.ranges))
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

    async def _warm(self, inode: int, ranges: list[Range]) -> None:
        """Warm ranges of one inode; callers that come while it is being warmed wait for the same."""
        if inode in self._running:
            await self._running[inode].wait()
            return
        done = self._running[inode] = trio.Event()
        try:
            work: Callable[[], object] = partial(self._warm_backing, inode, ranges)
            if self.route is Route.COLLAPSE:
                path = self._mountpoint + self._store.path_of(inode)
                work = partial(self._helper.collapse, path, ranges)
            await trio.to_thread.run_sync(work, limiter=self._limiter)
        except (OSError, StoreError) as e:
            if not self._stop.is_set():
                log.warning("inode %d: warm-up failed: %s", inode, e)
        finally:
            del self._running[inode]
            done.set()

    async def now(self, inode: int, ranges: list[Range]) -> warm.Warmed:
        """Warm ranges of one inode because somebody asks, where the route is passthrough."""
        return await trio.to_thread.run_sync(
            self._warm_backing, inode, ranges, limiter=self._limiter
        )

    def _warm_backing(self, inode: int, ranges: list[Range]) -> warm.Warmed:
        with self._store.backing.opened(inode) as fd:
            done = (warm.warm_range(fd, *r, self._stop.is_set) for r in ranges)
            return sum(done, warm.Warmed())

    async def run_background(self) -> None:
        """Do the warm-ups that no open waits for, for ever."""
        async for inode, ranges in self._background:
            await self._warm(inode, ranges)

    def stop(self) -> None:
        """Have running warm-ups end soon."""
        self._stop.set()
        self._helper.stop()
