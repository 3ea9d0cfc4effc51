"""The /dev/fuse connection: INIT negotiation, backing files, the operations pyfuse3 lacks."""

import logging
import os
import sys
from importlib import import_module
from typing import Any, Protocol

from largefs.channel import protocol
from largefs.channel.protocol import Negotiated, Wanted

__all__ = ["Channel", "Negotiated", "Unavailable", "Wanted", "load"]

log = logging.getLogger(__name__)

_RECEIVE_HEADROOM = 4096
"""Bytes a request may have beside max_write (fuse_dev_do_read() in fs/fuse/dev.c asks for less)."""


class Unavailable(Exception):
    """Why the companion cannot be used, in one line."""


_channel: "Channel | None" = None


def load() -> "Channel":
    """Load the companion, and pyfuse3 behind it; the same Channel at every call.

    Must run before anything imports pyfuse3. Raises Unavailable where the companion was not built,
    does not load, or comes too late: the filesystem then runs without a channel.
    """
    global _channel
    if _channel is None:
        if "pyfuse3" in sys.modules:
            raise Unavailable("pyfuse3 was imported before the channel was loaded")
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
        try:
            companion = import_module("largefs.channel._companion")
        except ImportError as e:
            raise Unavailable(f"the companion does not load: {e}") from e
        finally:
            sys.setdlopenflags(flags)
        companion.attach(import_module("pyfuse3").__file__)
        _channel = Channel(companion)
    return _channel


class Channel:
    def __init__(self, companion: Any) -> None:
        self._companion = companion
        self._wanted = Wanted()
        self.negotiated: Negotiated | None = None

    def want(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.negotiated = None
        self._companion.negotiate(wanted.max_write + _RECEIVE_HEADROOM, self._edit_init)

    def _edit_init(self, request: bytes, reply: bytes) -> bytes:
        edited, self.negotiated = protocol.edit_init(
            request,
            reply,
            self._wanted,
            pages_limit=_pages_limit(),
            page_size=os.sysconf("SC_PAGESIZE"),
        )
        return edited

    def backing_open(self, fd: int) -> int:
        return int(self._companion.backing_open(fd))

    def backing_close(self, backing_id: int) -> None:
        self._companion.backing_close(backing_id)

    def pass_through(self, fh: int, backing_id: int) -> None:
        self._companion.backing[fh] = backing_id

    async def serve(self, operations: Any) -> None:
        import trio

        await trio.sleep_forever()


def _pages_limit() -> int:
    """fs.fuse.max_pages_limit, in pages."""
    try:
        with open("/proc/sys/fs/fuse/max_pages_limit") as f:
            return int(f.read())
    except OSError:
        return protocol.MAX_MAX_PAGES
