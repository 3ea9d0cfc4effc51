"""Requests that pyfuse3 does not dispatch: from the kernel's message to a handler and back.

A handler is a method of the filesystem's operations, run in a task of its own. FUSEError becomes
its errno, any other exception EIO and a logged traceback; no exception ends the mount. A request
for which the operations have no method is left to libfuse, which answers ENOSYS: the kernel then
tells programs EOPNOTSUPP, or does the work itself in a generic way, and does not ask again.
"""

import logging
import sys
from collections.abc import Awaitable, Callable
from errno import EINTR, EIO
from functools import partial
from typing import Any, Protocol

import trio
from pyfuse3 import FUSEError

from largefs.channel import protocol
from largefs.channel.protocol import Request

log = logging.getLogger(__name__)

_MAX_COPY = 0xFFFF_F000
"""Bytes that COPY_FILE_RANGE's 32-bit answer can tell of, in whole pages."""


class Operations(Protocol):
    """The handlers; a filesystem may lack any. All raise pyfuse3.FUSEError for an errno."""

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """Allocate, punch or zero. `mode` has FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, or none.

        The kernel answers EOPNOTSUPP for all others itself (fuse_file_fallocate()).
        """

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Return the offset that SEEK_DATA or SEEK_HOLE leads to; ENXIO beyond the end."""

    async def copy_file_range(
        self, fh_in: int, offset_in: int, fh_out: int, offset_out: int, length: int, flags: int
    ) -> int:
        """Copy within the filesystem; return the number of bytes copied, at most `length`."""

    async def tmpfile(self, parent: int, mode: int, flags: int, ctx: Any) -> tuple[Any, Any]:
        """Create a nameless file (O_TMPFILE); return pyfuse3's FileInfo and EntryAttributes."""

    def kill_privileges(self, inode: int) -> None:
        """Clear S_ISUID, S_ISGID (if the group may execute) and security.capability of a file.

        Called, with Wanted.kill_privileges, before the write or truncation that asks for it is
        handed on: so it is no coroutine, and must be quick. Attributes that the kernel may have
        cached are the filesystem's to invalidate.
        """


class Dispatcher:
    """Takes requests in the task that reads them, and answers them in tasks of `nursery`."""

    def __init__(
        self,
        operations: Any,
        nursery: trio.Nursery,
        send: Callable[[bytes], None],
        take_backing: Callable[[int], int],
    ) -> None:
        self._nursery = nursery
        self._send = send
        self._take_backing = take_backing
        self._pending: set[int] = set()
        self._kill_privileges: Callable[[int], None] = getattr(
            operations, "kill_privileges", lambda inode: None
        )
        handlers: dict[int, tuple[str, Callable[[Any, Request], Awaitable[bytes]]]] = {
            protocol.FALLOCATE: ("fallocate", self._fallocate),
            protocol.LSEEK: ("lseek", _lseek),
            protocol.COPY_FILE_RANGE: ("copy_file_range", self._copy_file_range),
            protocol.COPY_FILE_RANGE_64: ("copy_file_range", self._copy_file_range),
            protocol.TMPFILE: ("tmpfile", self._tmpfile),
        }
        self._handlers = {
            opcode: partial(handler, getattr(operations, name))
            for opcode, (name, handler) in handlers.items()
            if hasattr(operations, name)
        }

    def __call__(self, opcode: int, message: bytes) -> bool:
        """Take a request, or return False to leave it to libfuse."""
        request = protocol.parse(message)
        if request is None:
            return False
        if opcode == protocol.INTERRUPT:
            # libfuse does not know of ours. An interrupt needs no answer; the request goes on.
            return int.from_bytes(request.body[:8], sys.byteorder) in self._pending
        if opcode in (protocol.OPEN, protocol.SETATTR, protocol.WRITE):
            return not self._killed(request)
        if opcode not in self._handlers:
            return False
        self._pending.add(request.unique)
        self._nursery.start_soon(self._answer, request)
        return True

    def _killed(self, request: Request) -> bool:
        """Clear the file's privileges for a request that pyfuse3 serves, or refuse it."""
        try:
            self._kill_privileges(request.nodeid)
        except Exception:
            log.exception("unforeseen error in kill_privileges(%d)", request.nodeid)
            self._send(protocol.failure(request.unique, EIO))
            return False
        return True

    async def _answer(self, request: Request) -> None:
        message = protocol.failure(request.unique, EINTR)  # if cancelled: the mount is ending
        try:
            body = await self._handlers[request.opcode](request)
            message = protocol.reply(request.unique, body)
        except FUSEError as e:
            message = protocol.failure(request.unique, e.errno)
        except Exception:
            log.exception("unforeseen error in the handler of FUSE opcode %d", request.opcode)
            message = protocol.failure(request.unique, EIO)
        finally:
            self._pending.discard(request.unique)
            try:
                self._send(message)
            except OSError as e:  # the connection is gone, and with it whoever asked
                log.warning("no answer to FUSE opcode %d: %s", request.opcode, e)

    async def _fallocate(self, fallocate: Any, request: Request) -> bytes:
        fh, offset, length, mode = protocol.FALLOCATE_IN.unpack_from(request.body)
        self._modify(request.nodeid, request)
        await fallocate(fh, mode, offset, length)
        return b""

    async def _copy_file_range(self, copy: Any, request: Request) -> bytes:
        fields = protocol.COPY_FILE_RANGE_IN.unpack_from(request.body)
        fh_in, offset_in, inode_out, fh_out, offset_out, length, flags = fields
        wide = request.opcode == protocol.COPY_FILE_RANGE_64
        self._modify(inode_out, request)
        length = min(length, 2**63 - 1 if wide else _MAX_COPY)
        copied = await copy(fh_in, offset_in, fh_out, offset_out, length, flags)
        return (protocol.COPY_FILE_RANGE_OUT if wide else protocol.WRITE_OUT).pack(copied)

    def _modify(self, inode: int, request: Request) -> None:
        """Clear the privileges of a file about to be changed by a request with no flag for that.

        As in the kernel, root may keep them; unlike there, CAP_FSETID alone is not enough.
        """
        if request.context.uid:
            self._kill_privileges(inode)

    async def _tmpfile(self, tmpfile: Any, request: Request) -> bytes:
        flags, mode, umask, _ = protocol.CREATE_IN.unpack_from(request.body)
        context = request.context._replace(umask=umask)
        info, entry = await tmpfile(request.nodeid, mode, flags, context)
        return protocol.create_out(info, entry, self._take_backing(info.fh))


async def _lseek(lseek: Any, request: Request) -> bytes:
    return protocol.LSEEK_OUT.pack(await lseek(*protocol.LSEEK_IN.unpack_from(request.body)))
