"""The /dev/fuse connection: INIT negotiation, backing files, the operations pyfuse3 lacks.

A C companion stands in front of the libfuse functions that pyfuse3 calls (companion.c says how).
This is all that the filesystem sees of it:

    channel = load()                    # before anything imports pyfuse3
    channel.want(Wanted(...))           # before pyfuse3.init()
    nursery.start_soon(channel.serve, operations)       # beside pyfuse3.main()

and, in the handlers of open and create, `channel.pass_through(fh, backing_id)`. Where load() raises
Unavailable, or `negotiated` stays None, pyfuse3 and libfuse do what they do without it.

With a channel, the handlers of readdir and fsyncdir get the directory's node id for `fh` where its
handle is 0: so opendir may answer ENOSYS, and the kernel opens directories by itself from then on.

protocol.py has the messages, operations.py the dispatch of those that pyfuse3 does not know, trial.py
a connection that only finds out what the kernel offers.
"""

import ctypes
import logging
import os
import sys
from importlib import import_module
from types import ModuleType

import trio

from largefs.channel import protocol
from largefs.channel.protocol import Negotiated, Wanted
from largefs.channel.trial import max_pages_limit

__all__ = ["Channel", "Negotiated", "Unavailable", "Wanted", "load"]

log = logging.getLogger(__name__)

_HEADROOM = 4096
"""Bytes of a request beside the data of a WRITE: more than the kernel's fuse_dev_do_read() asks."""
_MIN_RECEIVE = 1 << 18
"""Bytes to receive into at least: what a request may have where max_pages is not negotiated."""


class Unavailable(Exception):  # noqa: N818
    """Why the companion cannot be used, in one line."""


class Channel:
    """The process's connection to the kernel: pyfuse3 has one session, so there is one of these."""

    def __init__(self, companion: ModuleType) -> None:
        self._companion = companion
        self._wanted = Wanted()
        self.negotiated: Negotiated | None = None
        """What the kernel was told at INIT; None until then, and where libfuse's reply was kept."""

    def want(self, wanted: Wanted) -> None:
        """Say what to ask of the kernel. Must be called before pyfuse3.init()."""
        if not 1 <= wanted.max_stack_depth <= 2 or wanted.max_write < 4096:
            raise ValueError(f"out of range: {wanted}")
        self._wanted = wanted
        self.negotiated = None
        size = max(wanted.max_write, _MIN_RECEIVE) + _HEADROOM
        self._companion.negotiate(size, self._edit_init)

    def _edit_init(self, request: bytes, reply: bytes) -> bytes:
        edited, self.negotiated = protocol.edit_init(
            request,
            reply,
            self._wanted,
            pages_limit=max_pages_limit() or protocol.MAX_MAX_PAGES,
            page_size=os.sysconf("SC_PAGESIZE"),
        )
        if self.negotiated is None:
            log.warning("the reply to FUSE_INIT has an unknown form: left as libfuse wrote it")
        return edited

    def backing_open(self, fd: int) -> int:
        """Register an open file as a backing file and return its id; FUSE_DEV_IOC_BACKING_OPEN.

        The kernel keeps its own reference to the file. Raises OSError: EPERM without CAP_SYS_ADMIN
        or without passthrough, ELOOP where the file's filesystem is stacked too deep, EOPNOTSUPP or
        EINVAL for a file that cannot serve.
        """
        return int(self._companion.backing_open(fd))

    def backing_close(self, backing_id: int) -> None:
        """Give an id back; open files that have it keep their backing file. Raises OSError."""
        self._companion.backing_close(backing_id)

    def pass_through(self, fh: int, backing_id: int) -> None:
        """Let the next reply to OPEN, CREATE or TMPFILE that carries `fh` pass its file through.

        FileInfo.keep_cache and nonseekable do not apply to it. With FileInfo.direct_io, reads and
        writes come to the filesystem and only mmap goes to the backing file. The kernel demands
        that all opens of an inode that live at one time have the same backing id.
        """
        if not 0 < backing_id < 2**31:
            raise ValueError(f"no backing id: {backing_id}")
        self._companion.backing[fh] = backing_id

    async def serve(self, operations: object) -> None:
        """Dispatch the requests that pyfuse3 does not know to `operations`, until cancelled.

        `operations` may have any of the methods of largefs.channel.operations.Operations. Runs in
        the nursery of the mount, from before pyfuse3.main() takes its first request.
        """
        from largefs.channel.operations import Dispatcher  # imports pyfuse3, so after load()

        def take_backing(fh: int) -> int:
            return int(self._companion.backing.pop(fh, 0))

        async with trio.open_nursery() as nursery:
            dispatch = Dispatcher(operations, nursery, self._companion.reply, take_backing)
            self._companion.serve(dispatch)
            try:
                await trio.sleep_forever()
            finally:
                self._companion.serve(None)


_channel: Channel | None = None


def load() -> Channel:
    """Load the companion, and pyfuse3 behind it; the same Channel at every call.

    Must run before anything imports pyfuse3. Raises Unavailable where the companion was not built,
    does not load or comes too late; the filesystem then runs without a channel.
    """
    global _channel
    if _channel is None:
        if "pyfuse3" in sys.modules:
            raise Unavailable("pyfuse3 was imported before the channel was loaded")
        try:
            companion = import_module("largefs.channel._companion")
        except ImportError as e:
            raise Unavailable(f"the companion does not load: {e}") from e
        # Python loads modules locally; from here on the dynamic linker looks into this one first.
        ctypes.CDLL(companion.__file__, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
        try:
            companion.attach(import_module("pyfuse3").__file__)
        except OSError as e:  # pyfuse3 has its libfuse inside, out of the companion's reach
            raise Unavailable(f"pyfuse3's libfuse is not to be found: {e}") from e
        _channel = Channel(companion)
    return _channel
