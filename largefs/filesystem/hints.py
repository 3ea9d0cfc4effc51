"""What programs can ask of a file: the virtual, read-only xattrs user.largefs.*.

extent_size         bytes of an extent, decimal
text_ranges         OFFSET:LENGTH of each range of eligible text, in bytes, separated by spaces
route               how this mount gets 2 MiB pages: passthrough, folio, collapse or none
coverage_possible   eligible text divided by all text of the file, 0.00 to 1.00
alignment           what the import changed of the file, for `largefs export --original`; binary
warm                reading it warms the file's text: bytes wanted, in 2 MiB folios now, and before
checksum            xxh3-128 of each extent that holds data, NUMBER:HEX, separated by spaces
"""

import errno
import stat

import trio

from largefs.filesystem.files import text_of
from largefs.filesystem.warmup import Warmup
from largefs.hugetext.routes import Route
from largefs.hugetext.text import Text
from largefs.store import EXTENT_SIZE, Inode, Store
from largefs.store.errors import fail

PREFIX = b"user.largefs."


class Hints:
    """The virtual xattrs of a mount."""

    def __init__(self, store: Store, warmup: Warmup) -> None:
        self._store = store
        self._warmup = warmup

    async def value(self, row: Inode, name: bytes) -> bytes:
        """The value of user.largefs.NAME for a regular file; ENODATA for others and other names."""
        kind = name.removeprefix(PREFIX)
        if kind == b"route":
            return self._warmup.route.value.encode()
        if not stat.S_ISREG(row.mode):
            raise fail(errno.ENODATA)
        if kind == b"extent_size":
            return str(EXTENT_SIZE).encode()
        if kind == b"checksum":
            return self._checksum(row)
        if kind == b"alignment" and (alignment := self._store.alignment(row.id)):
            return alignment[1]
        if kind == b"warm" and self._warmup.route is Route.PASSTHROUGH:
            warmed = await self._warmup.now(row.id, (await self._text(row)).ranges)
            return b"%d %d %d" % (warmed.wanted, warmed.in_pmd, warmed.already)
        if kind == b"text_ranges":
            ranges = (await self._text(row)).ranges
            return b" ".join(b"%d:%d" % r for r in ranges)
        if kind == b"coverage_possible":
            text = await self._text(row)
            return b"%.2f" % (text.eligible / text.size if text.size else 0.0)
        raise fail(errno.ENODATA)

    async def _text(self, row: Inode) -> Text:
        return await trio.to_thread.run_sync(text_of, self._store, row.id)

    def _checksum(self, row: Inode) -> bytes:
        if not self._store.is_settled(row):
            raise fail(errno.ENODATA)
        sums = self._store.checksums(row.id)
        return " ".join(f"{n}:{c.hex()}" for n, c in sorted(sums.items())).encode()
