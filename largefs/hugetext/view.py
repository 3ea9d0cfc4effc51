"""Bytes seen without copying them: a bounded view of a file, and a file laid out from another's
pieces.

A `Layout` says how to write one file from another: which pieces go where, which bytes are then
patched, how long the result is. What no piece covers is a hole. `invert` gives the layout that
leads back, bit for bit, and `encode` and `decode` keep a layout in a few hundred bytes. Nothing
here knows ELF.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class View:
    """`size` bytes, fetched where they are asked for; a file of 1 GiB costs what is read of it."""

    size: int
    pread: Callable[[int, int], bytes]
    """(length, offset) in bytes, as pread(2) has them; may return less, as pread(2) may at the end
    of a file.
    """

    @classmethod
    def of_bytes(cls, data: bytes | bytearray | memoryview) -> View:
        """A view of what is in memory, an mmap included (as a memoryview)."""
        return cls(len(data), lambda length, offset: bytes(data[offset : offset + length]))

    @classmethod
    def of_file(cls, fd: int) -> View:
        """A view of an open regular file, as long as it is now. Reading may raise OSError."""
        return cls(os.fstat(fd).st_size, lambda length, offset: os.pread(fd, length, offset))

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`, fewer than `length` only where the view, or the file under it,
        ends.
        """
        length = min(length, self.size - offset)
        return self.pread(length, offset) if length > 0 else b""


class Piece(NamedTuple):
    """`length` bytes from `source` in the one file stand at `destination` in the other."""

    source: int
    length: int
    destination: int


class Patch(NamedTuple):
    """Bytes that replace those at `offset` of the destination, once the pieces are in place."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """How to write a file of `size` bytes from another. Pieces ascend and do not overlap; holes are
    zeros.
    """

    size: int
    pieces: tuple[Piece, ...]
    patches: tuple[Patch, ...] = ()

    @classmethod
    def identity(cls, size: int) -> Layout:
        """The layout that changes nothing."""
        return cls(size, (Piece(0, size, 0),) if size else ())


def reshape(view: View, layout: Layout) -> View:
    """The file that `layout` makes of `view`, without writing it."""
    starts = [piece.destination for piece in layout.pieces]

    def pread(length: int, offset: int) -> bytes:
        length = max(0, min(length, layout.size - offset))
        out = bytearray(length)
        end = offset + length
        for source, size, start in layout.pieces[max(0, bisect_right(starts, offset) - 1) :]:
            if start >= end:
                break
            low, high = max(start, offset), min(start + size, end)
            if low < high:
                data = view.read(source + low - start, high - low)
                out[low - offset : low - offset + len(data)] = data
        for start, data in layout.patches:
            low, high = max(start, offset), min(start + len(data), end)
            if low < high:
                out[low - offset : high - offset] = data[low - start : high - start]
        return bytes(out)

    return View(layout.size, pread)


def chunks(view: View, layout: Layout, limit: int = 2 << 20) -> Iterator[tuple[int, bytes]]:
    """What to write, as (offset, bytes) of at most `limit` bytes, pieces first and then patches; no
    holes.
    """
    for source, length, destination in layout.pieces:
        for done in range(0, length, limit):
            yield destination + done, view.read(source + done, min(limit, length - done))
    yield from layout.patches


def invert(view: View, layout: Layout) -> Layout:
    """The layout that makes `view` again of the file that `layout` made of it.

    `layout` must be one that keeps every byte of `view`, and each patch must lie within one piece.
    """
    back = sorted(Piece(new, length, old) for old, length, new in layout.pieces)
    starts = [piece.source for piece in back]
    patches = []
    for offset, data in layout.patches:
        new, _, old = back[bisect_right(starts, offset) - 1]
        patches.append(Patch(offset - new + old, view.read(offset - new + old, len(data))))
    return Layout(
        view.size, tuple(sorted(back, key=lambda piece: piece.destination)), tuple(patches)
    )


class BadRecord(ValueError):  # noqa: N818
    """The bytes are not a record that `encode` wrote, or are damaged."""


# Version 1, little endian: version, then deflated: size of the file, counts of pieces and patches
# (u64 each); per piece source, length, destination (u64 each); per patch offset and length (u64
# each) and its bytes.
VERSION = 1
_HEAD, _PIECE, _PATCH = struct.Struct("<QQQ"), struct.Struct("<QQQ"), struct.Struct("<QQ")
_MAX_RECORD = 64 << 20
"""Bytes a record may inflate to: the largest tables that the ELF reader takes, with room to spare.
"""


def encode(layout: Layout) -> bytes:
    """A layout as bytes, for keeping: about 150 bytes and a tenth of the patches."""
    parts = [_HEAD.pack(layout.size, len(layout.pieces), len(layout.patches))]
    parts += [_PIECE.pack(*piece) for piece in layout.pieces]
    parts += [_PATCH.pack(patch.offset, len(patch.data)) + patch.data for patch in layout.patches]
    return bytes([VERSION]) + zlib.compress(b"".join(parts), 9)


def decode(record: bytes) -> Layout:
    """The layout that `encode` was given. Raises BadRecord."""
    if record[:1] != bytes([VERSION]):
        raise BadRecord(f"the record's version is not {VERSION}")
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(record[1:], _MAX_RECORD)
        if not inflate.eof or inflate.unused_data:
            raise BadRecord("the record is cut short, too long, or has something after it")
        size, n_pieces, n_patches = _HEAD.unpack_from(body)
        at = _HEAD.size
        if n_pieces * _PIECE.size > len(body):
            raise BadRecord("the record has fewer pieces than it says")
        pieces = tuple(
            Piece(*_PIECE.unpack_from(body, at + i * _PIECE.size)) for i in range(n_pieces)
        )
        at += n_pieces * _PIECE.size
        patches = []
        for _ in range(n_patches):
            offset, length = _PATCH.unpack_from(body, at)
            at += _PATCH.size
            patches.append(Patch(offset, body[at : at + length]))
            at += length
    except (zlib.error, struct.error) as error:
        raise BadRecord(f"the record is damaged: {error}") from None
    end = 0
    for _, length, destination in pieces:
        if destination < end:
            raise BadRecord("the record's pieces overlap")
        end = destination + length
    if at != len(body) or max([end, *(p.offset + len(p.data) for p in patches)]) > size:
        raise BadRecord("the record's pieces and patches do not fit its size")
    return Layout(size, pieces, tuple(patches))
