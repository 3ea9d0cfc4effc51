"""Open files: which backing file serves an inode, who writes it, and what is recorded afterwards.

A handle is the inode number and one bit, so that it means the same to a daemon that was restarted.

An inode is *in writing* from the first open for writing until its last writer has closed it and no
shared mapping writes it any more. In that time the backing file is the truth about size and mtime, and
the kernel may keep no attributes. Then the inode is *settled*: size, times and blocks go to the store at
once, checksums as soon as they are computed.
"""

import errno
import logging
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, repeat

import pyfuse3
import trio

from largefs.channel import Channel, Negotiated
from largefs.filesystem.commits import Commits
from largefs.hugetext import text
from largefs.store import Inode, Store, StoreError
from largefs.store.backing import has_writer

log = logging.getLogger(__name__)

SETTLE_AT_ONCE = 128 * 1024
"""Bytes: files up to this size are read and summed without a thread, which would cost more."""

LEASE_RETRY = (0.01, 0.1, 0.5, 1.0, 2.0)
"""Seconds between looks whether a shared mapping still writes a closed file; the last one repeats."""


def handle(inode: int, *, writable: bool) -> pyfuse3.FileHandleT:
    """The file handle of an inode, as the kernel keeps it."""
    return pyfuse3.FileHandleT(inode << 1 | writable)


def inode_of(fh: int) -> int:
    """The inode number of a file handle."""
    return fh >> 1


def is_writable(fh: int) -> bool:
    """Whether a file handle was opened for writing."""
    return bool(fh & 1)


@dataclass
class OpenFile:
    """What all handles of one inode share."""

    inode: int
    fd: int
    """The backing file, O_RDONLY."""
    write_fd: int = -1
    """The backing file, O_RDWR, once the daemon itself had to write; else -1."""
    backing_id: int = 0
    """The kernel's number for the backing file where it passes through, else 0."""
    opens: int = 0
    writers: int = 0


class Files:
    """The open files of a mount."""

    def __init__(self, store: Store, commits: Commits, channel: Channel | None) -> None:
        self._store = store
        self._commits = commits
        self._channel = channel
        self._open: dict[int, OpenFile] = {}
        self.writing: set[int] = set()
        self._tickets: dict[int, int] = {}  # inodes to be summed -> which closing it was
        self._ticket = 0
        self._to_sum, self._sum_queue = trio.open_memory_channel[int](math.inf)
        self._watched: set[int] = set()  # closed inodes that a mapping may write
        self._to_watch, self._watch_queue = trio.open_memory_channel[int](math.inf)

    @property
    def passthrough(self) -> bool:
        """Whether the kernel reads and writes backing files itself."""
        return self._negotiated is not None and self._negotiated.passthrough

    @property
    def large_folios(self) -> bool:
        """Whether the kernel's own cache of these files may hold 2 MiB folios."""
        return self._negotiated is not None and self._negotiated.large_folios

    @property
    def told_of_privileges(self) -> bool:
        """Whether the kernel asks the filesystem to clear set-ID bits, rather than doing it itself."""
        return self._negotiated is not None and self._negotiated.kill_privileges

    @property
    def _negotiated(self) -> Negotiated | None:
        return self._channel.negotiated if self._channel else None

    def is_open(self, inode: int) -> bool:
        """Whether any handle of the inode is open."""
        return inode in self._open

    def fd(self, fh: int) -> int:
        """The descriptor to read a handle's backing file with."""
        return self._open[inode_of(fh)].fd

    def write_fd(self, fh: int) -> int:
        """The descriptor to write a handle's backing file with; raises OSError."""
        file = self._open[inode_of(fh)]
        if file.write_fd < 0:
            file.write_fd = self._store.backing.open(file.inode, os.O_RDWR)
        return file.write_fd

    # --------------------------------------------------------------------------------- attributes

    def stat_in_writing(self, inode: int) -> os.stat_result:
        """What the backing file says of an inode in writing; raises OSError."""
        file = self._open.get(inode)
        return os.fstat(file.fd) if file else self._store.backing.stat(inode)

    # ---------------------------------------------------------------------------- opening, closing

    async def open(self, inode: int, *, writable: bool, new: bool = False) -> OpenFile:
        """Open a regular file once more; `new`: it was made by this very request. Raises OSError."""
        file = self._open.get(inode)
        if file is None:
            file = OpenFile(inode, self._store.backing.open(inode, os.O_RDONLY))
            self._open[inode] = file
            if self.passthrough:
                self._register(file)
        file.opens += 1
        file.writers += writable
        fh = handle(inode, writable=writable)
        try:
            if writable:
                await self.begin_writing(inode, new=new)
        except BaseException:
            self.release(fh)
            raise
        return file

    def announce(self, file: OpenFile, fh: int) -> None:
        """Have the reply that opens `fh`, which must follow at once, carry the backing file."""
        if file.backing_id:
            assert self._channel is not None
            self._channel.pass_through(fh, file.backing_id)

    def _register(self, file: OpenFile) -> None:
        assert self._channel is not None
        try:
            file.backing_id = self._channel.backing_open(file.fd)
        except OSError as e:  # served by the daemon instead
            log.warning("inode %d: no passthrough: %s", file.inode, e.strerror)

    def release(self, fh: int) -> None:
        """Close a handle; the last writer's starts the settling."""
        file = self._open[inode_of(fh)]
        file.opens -= 1
        try:
            if is_writable(fh):
                file.writers -= 1
                if file.writers == 0:
                    self._last_writer_closed(file)
        finally:
            if file.opens == 0:
                self._close(file)

    def _close(self, file: OpenFile) -> None:
        del self._open[file.inode]
        try:
            if file.backing_id:
                assert self._channel is not None
                self._channel.backing_close(file.backing_id)
        finally:
            if file.write_fd >= 0:
                os.close(file.write_fd)
            os.close(file.fd)

    # ------------------------------------------------------------------------------------ writing

    async def begin_writing(self, inode: int, *, new: bool = False) -> None:
        """Before the first write: nothing recorded of the content holds from here on."""
        self._tickets.pop(inode, None)
        first = inode not in self.writing
        self.writing.add(inode)
        if self._store.begin_writing(inode):
            await self._commits.commit()
        if first and not new:
            invalidate_attributes(inode)

    async def change(self, inode: int, change: Callable[[int], None]) -> None:
        """Change a backing file through a descriptor open for writing, whoever has it open.

        For truncation and the like by path: opens and closes a writer around it.
        """
        await self.open(inode, writable=True)
        fh = handle(inode, writable=True)
        try:
            change(self.write_fd(fh))
        finally:
            self.release(fh)

    def _last_writer_closed(self, file: OpenFile) -> None:
        if file.write_fd >= 0:
            os.close(file.write_fd)
            file.write_fd = -1
        if file.backing_id and has_writer(file.fd):
            self.settle_later(file.inode)
        else:
            self._settle(file.inode, file.fd)

    def _settle(self, inode: int, fd: int) -> None:
        """Record what a file is now that nobody writes it; `fd` is open on its backing file."""
        st = os.fstat(fd)
        try:
            self._store.record_stat(inode, st)
        except FileNotFoundError:
            self.forget(inode)
            return
        if st.st_size <= SETTLE_AT_ONCE:
            self._record_checksums(inode, self._store.sum(inode), huge=False)
        else:
            self.sum_later(inode)
        self.writing.discard(inode)  # not before: what could not be recorded is no truth to reply

    def _settle_unless_written(self, inode: int) -> bool:
        """Settle a closed file, or return False because a mapping still writes it.

        What cannot be settled stays in writing, and so its attributes true; the next mount tries again.
        """
        try:
            with self._store.backing.opened(inode) as fd:
                if has_writer(fd):
                    return False
                self._settle(inode, fd)
        except (OSError, StoreError) as e:
            log.error("inode %d: not settled: %s", inode, e)
        return True

    def settle_later(self, inode: int) -> None:
        """Settle a file as soon as no mapping writes it any more.

        Passed through, a program may write it long after it was closed, and after a daemon before
        this one, which left it open for writing, is gone.
        """
        self.writing.add(inode)
        if inode not in self._watched:
            self._watched.add(inode)
            self._to_watch.send_nowait(inode)

    def sum_later(self, inode: int) -> None:
        """Have the checksums of a file that nobody writes made by `run_checksums`."""
        self._ticket += 1
        self._tickets[inode] = self._ticket
        self._to_sum.send_nowait(inode)

    async def run_checksums(self) -> None:
        """Sum settled files, for ever, one after the other; run one or two of these."""
        async for inode in self._sum_queue:
            try:
                await self._sum(inode)
            except (OSError, StoreError) as e:
                if e.errno != errno.ENOENT:
                    log.error("inode %d: no checksums: %s", inode, e)
            except Exception:  # the files after it are to be summed all the same
                log.exception("inode %d: no checksums", inode)

    async def _sum(self, inode: int) -> None:
        ticket = self._tickets.get(inode)
        if ticket is None:
            return  # written again, or removed
        try:
            checksums, huge = await trio.to_thread.run_sync(self._look_at, inode)
        except OSError:
            if self._tickets.get(inode) == ticket:
                raise
            return  # as ENXIO of lseek(2): it was cut off while it was read
        if self._tickets.get(inode) == ticket:
            del self._tickets[inode]
            self._record_checksums(inode, checksums, huge=huge)

    def _look_at(self, inode: int) -> tuple[list[tuple[int, bytes]], bool]:
        """A file's checksums, and whether it has eligible text. Blocks; raises OSError."""
        return self._store.sum(inode), bool(text_of(self._store, inode).ranges)

    def _record_checksums(
        self, inode: int, checksums: list[tuple[int, bytes]], *, huge: bool
    ) -> None:
        changed = bool(self._store.get(inode).huge) != huge
        self._store.record_checksums(inode, checksums, huge=huge)
        if changed:
            invalidate_attributes(inode)

    async def run_watch(self) -> None:
        """Settle files that were closed while a shared mapping still wrote them, for ever."""
        async with trio.open_nursery() as nursery:
            async for inode in self._watch_queue:
                nursery.start_soon(self._watch, inode)

    async def _watch(self, inode: int) -> None:
        for seconds in chain(LEASE_RETRY, repeat(LEASE_RETRY[-1])):
            await trio.sleep(seconds)
            file = self._open.get(inode)
            if (
                (file and file.writers)  # its next closing sees to it
                or inode not in self.writing
                or self._settle_unless_written(inode)
            ):
                break
        self._watched.discard(inode)

    def forget(self, inode: int) -> None:
        """The inode is gone: nothing of it is to be settled."""
        self.writing.discard(inode)
        self._tickets.pop(inode, None)

    def finish(self) -> None:
        """At the end of the mount: record what can be, so that the store is clean. Blocks.

        Inodes that a mapping still writes stay marked; the next mount settles them.
        """
        for inode in list(self.writing):
            self._settle_unless_written(inode)
        for inode in self._tickets:
            try:
                checksums, huge = self._look_at(inode)
                self._record_checksums(inode, checksums, huge=huge)
            except (OSError, StoreError) as e:
                log.error("inode %d: no checksums: %s", inode, e)
        self._tickets.clear()


def text_of(store: Store, inode: int) -> text.Text:
    """The text of an inode's backing file; reads headers only, but blocks. Raises OSError."""
    with store.backing.opened(inode) as fd:
        return text.of_file(fd)


def invalidate_attributes(inode: int) -> None:
    """Have the kernel forget what it knows of the inode's attributes. Never blocks on pages."""
    try:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(inode), attr_only=True)
    except (OSError, RuntimeError):
        pass  # the kernel does not know the inode, or the mount is gone


def write_back(inode: int) -> None:
    """Have the kernel write back what its own cache holds of the inode, and drop it.

    Waits for WRITE requests, so never on the event loop.
    """
    try:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(inode))
    except OSError:
        pass  # the kernel does not know the inode, or the mount is gone


def drop_privilege_bits(row: Inode) -> int:
    """The mode without set-user-ID, and without set-group-ID where it means execution (chown(2))."""
    mode = row.mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return mode
