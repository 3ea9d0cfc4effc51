"""The seeded source of operations.

Sizes and offsets crowd around the places where page caches go wrong: the borders of pages and of 2
MiB blocks, one byte to either side, the middle of a folio, the end of the file. The same seed,
limits and unsupported operations give the same operations.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

from largefs.stress import program, syscalls
from largefs.stress.checks import POPULATE, map_name, mode_name
from largefs.stress.model import Handle, Mapping, Model
from largefs.stress.session import CannotRunError, Limits, Operation, Tally
from largefs.stress.syscalls import PAGE, PMD

POOL = 12 << 20  # bytes of random data that all writes are taken from
_LONGEST = (
    5 << 19
)  # bytes: a write of two and a half megabytes covers a whole block wherever it starts

FALLOCATE_MODES = (
    0,
    syscalls.KEEP_SIZE,
    syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE,
    syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE,
    syscalls.ZERO_RANGE,
    syscalls.ZERO_RANGE | syscalls.KEEP_SIZE,
    syscalls.COLLAPSE_RANGE,
    syscalls.INSERT_RANGE,
)
_ADVICE = (
    mmap.MADV_HUGEPAGE,
    mmap.MADV_HUGEPAGE,
    mmap.MADV_NOHUGEPAGE,
    syscalls.MADV_COLLAPSE,
    syscalls.MADV_PAGEOUT,
    mmap.MADV_DONTNEED,
)

# how often each operation is chosen, of about a thousand; "huge" and "run" make several
_WEIGHTS = {
    "read": 200,
    "write": 190,
    "mread": 190,
    "mwrite": 120,
    "truncate": 60,
    "probe": 60,
    "fallocate": 50,
    "seek": 25,
    "fsync": 12,
    "fadvise": 12,
    "copy": 20,
    "open": 12,
    "close": 9,
    "map": 18,
    "remap": 5,
    "unmap": 8,
    "madvise": 16,
    "fork": 4,
    "tail": 12,
    "rename": 3,
    "unlink": 2,
    "chmod": 2,
    "huge": 8,
    "run": 2,
    "sum": 2,
    "busy": 2,
    "clone": 1,
    "end": 2,
}  # fmt: skip


_OF_PROGRAMS = ("run", "sum", "busy", "clone", "end")
_FLAGS = {"append": os.O_APPEND, "o-trunc": os.O_TRUNC, "o-direct": os.O_DIRECT}
MODE_NAMES = tuple(sorted({mode_name(mode) for mode in FALLOCATE_MODES}))


def choices() -> tuple[str, ...]:
    """The names that ``--skip`` takes: operations, modes of fallocate, flags of open."""
    return (*sorted(_WEIGHTS), *MODE_NAMES, *_FLAGS, "race", "programs")


def source_of(number: int, length: int) -> int:
    """Where in the pool the data of a write begins: spread so that no two writes look alike.

    Whole pages come from whole pages, as O_DIRECT wants its memory aligned.
    """
    source = (number * 0x9E3779B97F4A7C15 >> 7) % (POOL - length)
    return source if length % PAGE else source // PAGE * PAGE


def _aligned(offset: int, length: int) -> tuple[int, int]:
    """The whole pages around a range, as O_DIRECT wants them."""
    start = offset // PAGE * PAGE
    return start, -(-(offset + length) // PAGE) * PAGE - start


class Generator:
    """Makes operations that fit the model as it is when each is asked for."""

    def __init__(
        self, seed: str, model: Model, limits: Limits, tally: Tally, skip: set[str]
    ) -> None:
        self._random = random.Random(seed)  # noqa: S311
        self._model = model
        self._limits = limits
        self._tally = tally
        self._names = [f"file{i}" for i in range(limits.files)]
        self._programs = ["program0", "program1"]
        self._made = 0
        self._waiting: list[Operation] = []
        weights = {k: v for k, v in _WEIGHTS.items() if k not in skip}
        if not program.supported() or "exec" in tally.unsupported:
            weights = {k: v for k, v in weights.items() if k not in _OF_PROGRAMS}
        self._skip = skip
        self._kinds, self._weights = list(weights), list(weights.values())
        if not weights:
            raise CannotRunError("--skip leaves nothing to do")
        for index in range(limits.workers):
            for name in self._names:
                self._open(index, name, os.O_RDWR | os.O_CREAT)

    def __iter__(self) -> Iterator[Operation]:
        idle = 0
        while idle < 10_000:
            while self._waiting:
                idle = 0
                yield self._waiting.pop(0)
            idle += 1
            kind = self._random.choices(self._kinds, self._weights)[0]
            getattr(self, "_" + kind)()
        raise CannotRunError("--skip leaves nothing to do")

    def whole(self) -> Iterator[Operation]:
        """The comparison of all files, by each way to read them."""
        for cold in (False, True):
            for name in sorted(self._model.names):
                if cold and "fadvise" in self._skip:
                    continue
                for via in ("read", "mmap") if not cold else ("exec", "read"):
                    yield self._make(
                        "whole", self._worker(), path=name, via=via, cold=cold and via == "exec"
                    )

    # -- choosing ----------------------------------------------------------------------------------

    def _make(self, kind: str, index: int, **arguments: Any) -> Operation:
        self._made += 1
        return Operation(self._made, kind, index, arguments)

    def _emit(self, kind: str, index: int, **arguments: Any) -> int:
        self._waiting.append(self._make(kind, index, **arguments))
        return self._made

    def _emit_read(self, number: int, handle: Handle, offset: int, length: int, via: str) -> None:
        if handle.direct:
            (offset, length), via = _aligned(offset, length), "pread"
        self._emit("read", handle.worker, h=number, off=offset, len=length, via=via)

    def _emit_write(self, kind: str, index: int, length: int, **arguments: Any) -> None:
        source = source_of(self._made + 1, length)
        self._emit(kind, index, len=length, **arguments, **{"from": source})

    def _way(self, kind: str, ways: tuple[str, ...]) -> str:
        """One of the ways to read or write that the filesystem has."""
        return self._random.choice(
            [via for via in ways if f"{kind} {via}" not in self._tally.unsupported]
        )

    def _worker(self) -> int:
        return self._random.randrange(self._limits.workers)

    def _handle(
        self, accept: Callable[[Handle], bool] = lambda _: True
    ) -> tuple[int, Handle] | None:
        found = [(n, h) for n, h in self._model.handles.items() if accept(h)]
        return self._random.choice(found) if found else None

    def _mapping(
        self, accept: Callable[[Mapping], bool] = lambda _: True
    ) -> tuple[int, Mapping] | None:
        found = [(n, m) for n, m in self._model.mappings.items() if accept(m)]
        return self._random.choice(found) if found else None

    def _length(self, most: int) -> int:
        r = self._random
        if most <= 1:
            return most
        p = r.random()
        if p < 0.80:
            length = r.randint(1, 4 * PAGE)
        elif p < 0.90:
            length = PAGE * r.randint(1, 16) + r.choice((-1, 0, 0, 0, 1))
        elif p < 0.99:
            length = r.randint(1, 128 << 10)
        else:
            length = r.choice((PMD, PMD - 1, PMD + 1, r.randint(1, _LONGEST)))
        return min(length, most)

    def _offset(self, size: int, most: int) -> int:
        """An offset in [0, most), near what matters in a file of ``size`` bytes."""
        r = self._random
        p = r.random()
        if p < 0.35:
            place = r.randint(0, max(0, most - 1) // PMD) * PMD
        elif p < 0.55:
            place = size
        elif p < 0.75:
            place = r.randint(0, max(0, most - 1) // PAGE) * PAGE
        else:
            return r.randrange(most) if most > 0 else 0
        place += r.choice((0, 0, 0, 1, -1, PAGE, -PAGE, PAGE - 1, 1 - PAGE, PMD // 2, -PMD // 2))
        return min(max(place, 0), max(0, most - 1))

    def _range(self, size: int, most: int) -> tuple[int, int]:
        """Offset and length, below ``most``; often up to a border, exactly or by a byte."""
        offset = self._offset(size, most)
        length = self._length(most - offset)
        if self._random.random() < 0.15:  # end where something ends
            end = self._random.choice(
                (size, (offset // PMD + 1) * PMD, (offset // PAGE + 1) * PAGE)
            )
            end += self._random.choice((0, 0, 1, -1))
            if offset < end <= most and end - offset <= PMD // 4:
                length = end - offset
        return offset, max(1, length)

    # -- operations on open files ------------------------------------------------------------------

    def _read(self) -> None:
        if found := self._handle():
            number, handle = found
            size = handle.inode.size
            offset, length = self._range(size, min(size + PAGE, self._limits.max_size))
            via = self._way("read", ("pread",) * 6 + ("preadv",) * 2 + ("sendfile", "splice"))
            self._emit_read(number, handle, offset, length, via)

    def _write(self) -> None:
        if found := self._handle(lambda h: h.writable):
            number, handle = found
            size, most = handle.inode.size, self._limits.max_size
            if handle.append:
                length = self._length(most - size)
                if length:
                    self._emit_write("write", handle.worker, length, h=number, off=0, via="append")
                return
            grow = self._random.random() < 0.3
            offset, length = self._range(size, most if grow or not size else size)
            via = self._way("write", ("pwrite",) * 7 + ("pwritev", "pwritev", "splice"))
            if handle.direct:
                (offset, length), via = _aligned(offset, length), "pwrite"
            self._emit_write("write", handle.worker, length, h=number, off=offset, via=via)

    def _truncate(self) -> None:
        if found := self._handle(lambda h: h.writable):
            number, handle = found
            most = self._limits.max_size
            p = self._random.random()
            if p < 0.25:  # a little
                size = handle.inode.size + self._random.choice((-1, 1, -PAGE, PAGE, -3, 100))
            elif p < 0.45:  # up again
                size = self._offset(most, most)
                size = max(size, handle.inode.size)
            else:
                size = self._offset(handle.inode.size, most)
            size = min(max(0, size), most)
            self._emit("truncate", handle.worker, h=number, size=size)
            if size and self._random.random() < 0.5:  # what was cut off must not come back
                grown = min(most, size + self._random.choice((1, PAGE, PMD)))
                at = max(0, size - PAGE)
                self._emit("truncate", handle.worker, h=number, size=grown)
                self._emit_read(number, handle, at, min(2 * PAGE, grown - at), "pread")

    def _fallocate(self) -> None:
        modes = [
            m for m in FALLOCATE_MODES if f"fallocate {mode_name(m)}" not in self._tally.unsupported
        ]
        found = self._handle(lambda h: h.writable)
        if not found or not modes:
            return
        number, handle = found
        mode, inode, most = self._random.choice(modes), handle.inode, self._limits.max_size
        offset, length = self._range(inode.size, most if not mode & ~1 else max(inode.size, PAGE))
        if mode in (syscalls.COLLAPSE_RANGE, syscalls.INSERT_RANGE):
            offset = offset // PAGE * PAGE
            length = max(PAGE, length // PAGE * PAGE)
            if mode == syscalls.COLLAPSE_RANGE and offset + length >= inode.size:
                return
            if mode == syscalls.INSERT_RANGE and (
                offset >= inode.size or inode.size + length > most
            ):
                return
        self._emit("fallocate", handle.worker, h=number, mode=mode, off=offset, len=length)

    def _copy(self) -> None:
        if "copy_file_range" in self._tally.unsupported:
            return
        source = self._handle(lambda h: not h.direct)
        target = source and self._handle(
            lambda h: h.writable and not h.append and not h.direct and h.worker == source[1].worker
        )
        if source and target:
            offset, length = self._range(source[1].inode.size, max(1, source[1].inode.size))
            to = self._offset(target[1].inode.size, self._limits.max_size)
            length = min(length, self._limits.max_size - to)
            self._emit(
                "copy", source[1].worker, h=source[0], off=offset, h2=target[0], off2=to, len=length
            )

    def _seek(self) -> None:
        if "seek-hole" not in self._tally.unsupported and (found := self._handle()):
            self._emit("seek", found[1].worker, h=found[0])

    def _fsync(self) -> None:
        if found := self._handle():
            self._emit("fsync", found[1].worker, h=found[0], data=self._random.random() < 0.5)

    def _fadvise(self) -> None:
        if found := self._handle():
            number, handle = found
            if self._random.random() < 0.5:
                self._emit("fsync", handle.worker, h=number, data=True)
            offset, length = self._range(handle.inode.size, max(1, handle.inode.size))
            if self._random.random() < 0.5:
                offset = length = 0  # all of it
            self._emit("fadvise", handle.worker, h=number, off=offset, len=length)

    def _open(
        self, index: int | None = None, name: str | None = None, flags: int | None = None
    ) -> None:
        if index is None:
            index = self._worker()
        if flags is None:
            flags = self._random.choice(
                (
                    os.O_RDONLY,
                    os.O_RDWR | os.O_CREAT,
                    os.O_RDWR | os.O_CREAT,
                    os.O_RDWR | os.O_CREAT | os.O_TRUNC,
                    os.O_RDWR | os.O_CREAT | os.O_APPEND,
                    os.O_RDWR | os.O_CREAT | os.O_DIRECT,
                )
            )
            for option, flag in _FLAGS.items():
                if option in self._skip or option in self._tally.unsupported:
                    flags &= ~flag
        mine = sum(h.worker == index for h in self._model.handles.values())
        if mine < 3 * len(self._names) + 2:
            path = name or self._random.choice(self._names)
            self._emit("open", index, h=self._made + 1, path=path, flags=flags)

    def _close(self) -> None:
        if found := self._handle():
            number, handle = found
            self._emit("close", handle.worker, h=number)
            if sum(h.worker == handle.worker for h in self._model.handles.values()) <= 2:
                self._open(handle.worker, self._random.choice(self._names), os.O_RDWR | os.O_CREAT)

    # -- operations on mappings --------------------------------------------------------------------

    def _map(self, huge: bool | None = None) -> tuple[int, int, int] | None:
        """Returns the mapping's number, worker and length."""
        found = self._handle()
        if found is None or len(self._model.mappings) > 5 * self._limits.workers:
            self._unmap()
            return None
        number, handle = found
        kinds = [("r", True), ("r", False), ("rx", True), ("rx", False), ("rw", False)]
        kinds += [("rw", True)] * 4 if handle.writable else []
        kinds = [k for k in kinds if map_name(*k) not in self._tally.unsupported]
        if not kinds:
            return None
        offset = PMD * self._random.choice((0, 0, 0, 1)) + PAGE * self._random.choice((0, 0, 0, 1))
        # mappings reach beyond the end: the file may grow, and what is beyond must give SIGBUS
        end = self._random.choice((self._limits.max_size, self._limits.max_size, handle.inode.size))
        length = -(-max(PMD, end - offset) // PAGE) * PAGE
        prot, shared = self._random.choice(kinds)
        if huge is None:
            huge = self._random.random() < 0.5
        mapping = self._emit(
            "map", handle.worker,
            m=self._made + 1, h=number, off=offset, len=length, prot=prot, shared=shared, huge=huge,
        )  # fmt: skip
        return mapping, handle.worker, number

    def _remap(self) -> None:
        if found := self._mapping():
            number, mapping = found
            most = self._limits.max_size - mapping.offset
            length = mapping.length
            if self._random.random() < 0.6:
                length = -(-max(1, self._offset(mapping.length, most)) // PAGE) * PAGE
            huge = self._random.random() < 0.5
            self._emit("remap", mapping.worker, m=number, len=length, huge=huge)

    def _unmap(self) -> None:
        if found := self._mapping():
            self._emit("unmap", found[1].worker, m=found[0])

    def _inside(self, mapping: Mapping, end: int) -> tuple[int, int] | None:
        """Offset in the mapping and length, below ``end`` of the file."""
        most = min(mapping.length, end - mapping.offset)
        if most <= 0:
            return None
        offset, length = self._range(mapping.inode.size - mapping.offset, most)
        return offset, min(length, most - offset)

    def _mread(self) -> None:
        found = self._mapping(lambda m: m.inode.mapped_end > m.offset and not m.unknown)
        if found is None:
            self._map()
            return
        number, mapping = found
        if place := self._inside(mapping, mapping.inode.mapped_end):
            via = self._random.choice(("load", "load", "load", "copy", "vm"))
            self._emit("mread", mapping.worker, m=number, off=place[0], len=place[1], via=via)

    def _mwrite(self) -> None:
        found = self._mapping(lambda m: m.writable and m.inode.size > m.offset)
        if found is None:
            self._map()
            return
        number, mapping = found
        if place := self._inside(mapping, mapping.inode.size):
            self._emit_write(
                "mwrite", mapping.worker, place[1],
                m=number, off=place[0], via=self._random.choice(("store", "store", "copy")),
                sync=self._random.random() < 0.04,
            )  # fmt: skip

    def _probe(self) -> None:
        found = self._mapping()
        if found is None:
            return
        number, mapping = found
        end = mapping.inode.size - mapping.offset
        edge = -(-end // PAGE) * PAGE
        block = -(-end // PMD) * PMD
        places = {
            0,
            end - 1,
            end,
            edge - 1,
            edge,
            edge + PAGE,
            block - 1,
            block,
            mapping.length - 1,
        }
        at = sorted(p for p in places if 0 <= p < mapping.length)
        self._emit("probe", mapping.worker, m=number, at=at)

    def _madvise(self) -> None:
        if found := self._mapping():
            number, mapping = found
            offset = self._random.randint(0, mapping.length // PMD) * PMD
            length = min(PMD * self._random.randint(1, 3), mapping.length - offset)
            if length > 0:
                advice = self._random.choice((*_ADVICE, *POPULATE))
                self._emit(
                    "madvise", mapping.worker,
                    m=number, off=offset, len=length, advice=advice, count=False,
                )  # fmt: skip

    def _fork(self) -> None:
        write = self._random.random() < 0.5
        found = self._mapping(lambda m: m.inode.size > m.offset and (m.writable or not write))
        if found is None:
            return
        number, mapping = found
        if place := self._inside(mapping, mapping.inode.size):
            self._emit_write("fork", mapping.worker, place[1], m=number, off=place[0], write=write)

    def _tail(self) -> None:
        """Store behind the end of a file and change its size: what was stored must be gone."""
        r = self._random
        found = self._mapping(
            lambda m: (
                m.writable
                and m.shared
                and m.offset < m.inode.size < min(m.inode.mapped_end, m.offset + m.length)
            )
        )
        handle = found and self._handle(
            lambda h: h.writable and h.inode is found[1].inode and h.worker == found[1].worker
        )
        if not found or not handle:
            return
        number, mapping = found
        inode = mapping.inode
        at = inode.size - mapping.offset + r.choice((0, 0, 1))
        length = inode.mapped_end - mapping.offset - at
        most = self._limits.max_size
        size = min(most, inode.size + r.choice((-1, 1, 7, PAGE, PMD)))
        if length <= 0 or size == inode.size:
            return
        self._emit_write("tail", mapping.worker, length, m=number, h=handle[0], off=at, size=size)
        start = max(0, inode.size - 16)
        if size > start:
            length = min(size - start, PAGE)
            for via in ("pread", "load"):
                if via == "pread":
                    self._emit_read(*handle, start, length, via)
                elif start >= mapping.offset and start + length <= mapping.offset + mapping.length:
                    self._emit(
                        "mread", mapping.worker,
                        m=number, off=start - mapping.offset, len=length, via=via,
                    )  # fmt: skip

    def _huge(self) -> None:
        """Get 2 MiB folios where possible: write back, drop, read through a huge mapping."""
        made = self._map(huge=True)
        if made is None:
            return
        mapping, index, handle = made
        inode, a = self._model.handles[handle].inode, self._waiting[-1].arguments
        self._emit("fsync", index, h=handle, data=True)
        self._emit("fadvise", index, h=handle, off=0, len=0)
        length = min(a["len"], inode.size - a["off"]) // PAGE * PAGE
        if length > 0:
            self._emit(
                "madvise", index,
                m=mapping, off=0, len=length, advice=syscalls.MADV_POPULATE_READ, count=True,
            )  # fmt: skip
            if self._model.handles[handle].writable and self._random.random() < 0.5:
                self._cut_huge(handle, a["off"], length)

    def _cut_huge(self, handle: int, start: int, length: int) -> None:
        """Cut or punch a block that may be on a 2 MiB page now, somewhere in its middle."""
        owner = self._model.handles[handle]
        at = start + self._random.randrange(length)
        if self._random.random() < 0.6:
            self._emit("truncate", owner.worker, h=handle, size=at)
            self._emit("truncate", owner.worker, h=handle, size=min(at + PMD, start + length))
        elif "fallocate punch-hole+keep-size" not in self._tally.unsupported:
            mode = syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE
            self._emit(
                "fallocate", owner.worker,
                h=handle, mode=mode, off=at, len=self._random.choice((1, PAGE, 16 * PAGE)),
            )  # fmt: skip

    # -- names and programs ------------------------------------------------------------------------

    def _rename(self) -> None:
        group = self._random.choice((self._names, self._names, self._programs))
        old, new = self._random.sample(group, 2) if len(group) > 1 else (group[0], group[0])
        self._emit("rename", self._worker(), path=old, path2=new)

    def _unlink(self) -> None:
        self._emit("unlink", self._worker(), path=self._random.choice(self._names))

    def _chmod(self) -> None:
        path, mode = self._random.choice((*self._names, *self._programs)), 0o755
        if path in self._names:
            mode = self._random.choice((0o644, 0o600, 0o666, 0o755))
        elif self._random.random() < 0.5:
            mode = self._random.choice((0o700, 0o711, 0o4755))
        self._emit("chmod", self._worker(), path=path, mode=mode)

    def _busy(self) -> None:
        running = {id(p.inode) for p in self._model.programs.values()}
        names = [n for n in self._programs if id(self._model.names.get(n)) in running]
        if names:
            self._emit("busy", self._worker(), path=self._random.choice(names))

    def _clone(self) -> None:
        path = self._random.choice(self._programs)
        if inode := self._model.names.get(path):
            size = self._offset(inode.size, inode.size)
            self._emit("clone", self._worker(), path=path, path2="clone", size=size)

    def _run(self) -> None:
        path, index = self._random.choice(self._programs), self._worker()
        if path not in self._model.names or self._random.random() < 0.5:
            length = self._random.choice((PMD - 8, PMD, PMD + 8, PMD + PAGE, 2 * PMD, 3 << 19))
            chunk = self._random.choice((1000, 64 << 10, 1 << 20, PMD))
            self._emit_write("build", index, length, path=path, chunk=chunk)
        number = self._emit("exec", index, x=self._made + 1, path=path)
        self._emit("sum", index, x=number, huge=self._random.random() < 0.7)

    def _sum(self) -> None:
        if self._model.programs:
            number, running = self._random.choice(list(self._model.programs.items()))
            self._emit("sum", running.worker, x=number, huge=self._random.random() < 0.5)

    def _end(self) -> None:
        if len(self._model.programs) > 2:
            number, running = self._random.choice(list(self._model.programs.items()))
            self._emit("end", running.worker, x=number)
