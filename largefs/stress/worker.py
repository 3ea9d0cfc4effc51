"""A worker process: does one operation at a time, and knows nothing of what is right.

A request is a marshalled ``(kind, arguments)``; the answer is ``(result, size)``, with the file's
size by fstat(2) right after (-1 where there is no open file to ask), or ``(-errno, -1)``. Data read
lands in the arena that the worker shares with the session; data written comes from the pool. Where
a page inside a file cannot be had, a ``load`` or ``store`` kills the worker with SIGBUS, as it
would any program: the session sees that. A request that names mappings to ``watch`` is answered
with a third thing: which of their 2 MiB blocks had been PMD-mapped before and are not any more.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import marshal
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from largefs.hugetext import mappings
from largefs.stress import folios, program, syscalls
from largefs.stress.syscalls import PAGE, PMD, Arena

Arguments = dict[str, Any]
Answer = tuple[Any, int]


@dataclass
class _Mapping:
    address: int
    length: int
    offset: int


@dataclass
class _Worker:
    root: str
    arena: Arena
    pool: Arena
    pagemap: int
    files: dict[int, int] = field(default_factory=dict)
    mappings: dict[int, _Mapping] = field(default_factory=dict)
    programs: dict[int, program.Running] = field(default_factory=dict)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"


_PIPE = 64 << 10  # bytes that a new pipe holds: pipe(7)
_OPERATIONS: dict[str, Callable[[_Worker, Arguments], Answer]] = {}


def _operation(function: Callable[[_Worker, Arguments], Answer]) -> None:
    _OPERATIONS[function.__name__.strip("_")] = function


def _size(fd: int) -> int:
    return os.fstat(fd).st_size


@_operation
def _open(w: _Worker, a: Arguments) -> Answer:
    fd = w.files[a["h"]] = os.open(w.path(a["path"]), a["flags"], 0o644)
    return 0, _size(fd)


@_operation
def _close(w: _Worker, a: Arguments) -> Answer:
    os.close(w.files.pop(a["h"]))
    return 0, -1


@_operation
def _read(w: _Worker, a: Arguments) -> Answer:
    fd, length, offset = w.files[a["h"]], a["len"], a["off"]
    if a["via"] == "pread":
        return syscalls.pread_into(fd, w.arena.address, length, offset), -1
    if a["via"] == "preadv":
        return os.preadv(fd, _parts(w.arena.memory, 0, length), offset), -1
    if a["via"] == "sendfile":
        os.lseek(w.arena.fd, 0, os.SEEK_SET)
        return _to_the_end(length, lambda at, n: os.sendfile(w.arena.fd, fd, offset + at, n)), -1
    return _to_the_end(length, lambda at, n: _splice_out(w, fd, offset + at, at, n)), -1


@_operation
def _write(w: _Worker, a: Arguments) -> Answer:
    fd, length, source = w.files[a["h"]], a["len"], a["from"]
    if a["via"] == "append":  # O_APPEND: the offset does not count
        done = os.write(fd, memoryview(w.pool.memory)[source : source + length])
    elif a["via"] == "pwritev":
        done = os.pwritev(fd, _parts(w.pool.memory, source, length), a["off"])
    elif a["via"] == "splice":
        done = _to_the_end(length, lambda at, n: _splice_in(w, fd, a["off"] + at, source + at, n))
    else:
        done = syscalls.pwrite_from(fd, w.pool.address + source, length, a["off"])
    return done, _size(fd)


def _parts(memory: mmap.mmap, start: int, length: int) -> list[memoryview]:
    """Up to three pieces of unlike sizes, for preadv(2) and pwritev(2)."""
    cuts = sorted({0, length // 3, length - length // 5, length})
    view = memoryview(memory)
    return [view[start + i : start + j] for i, j in pairwise(cuts)]


def _to_the_end(length: int, step: Callable[[int, int], int]) -> int:
    """Do ``step(done so far, rest)`` until all is done, or it does nothing; how much was done."""
    done = 0
    while done < length and (n := step(done, length - done)):
        done += n
    return done


def _splice_out(w: _Worker, fd: int, offset: int, to: int, length: int) -> int:
    """splice(2) from the file into a pipe, and from that into the arena."""
    with _pipe() as (out, into):
        moved = os.splice(fd, into, length, offset_src=offset)
        view = memoryview(w.arena.memory)[to : to + moved]
        return _to_the_end(moved, lambda at, _: os.readv(out, [view[at:]]))


def _splice_in(w: _Worker, fd: int, offset: int, source: int, length: int) -> int:
    """Write into a pipe, and splice(2) that into the file."""
    with _pipe() as (out, into):
        length = min(length, _PIPE)
        filled = os.write(into, memoryview(w.pool.memory)[source : source + length])
        return _to_the_end(filled, lambda at, n: os.splice(out, fd, n, offset_dst=offset + at))


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """A pipe, to read from and to write into, that is gone after."""
    out, into = os.pipe()
    try:
        yield out, into
    finally:
        os.close(out)
        os.close(into)


@_operation
def _truncate(w: _Worker, a: Arguments) -> Answer:
    fd = w.files[a["h"]]
    os.ftruncate(fd, a["size"])
    return 0, _size(fd)


@_operation
def _fallocate(w: _Worker, a: Arguments) -> Answer:
    fd = w.files[a["h"]]
    syscalls.fallocate(fd, a["mode"], a["off"], a["len"])
    return 0, _size(fd)


@_operation
def _copy(w: _Worker, a: Arguments) -> Answer:
    target = w.files[a["h2"]]
    return os.copy_file_range(w.files[a["h"]], target, a["len"], a["off"], a["off2"]), _size(target)


@_operation
def _seek(w: _Worker, a: Arguments) -> Answer:
    """All (start, end) of data by SEEK_DATA and SEEK_HOLE."""
    found: list[tuple[int, int]] = []
    fd, at = w.files[a["h"]], 0
    while len(found) < 4096:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                break
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at))
        if at <= start:
            break
    return found, _size(fd)


@_operation
def _fsync(w: _Worker, a: Arguments) -> Answer:
    fd = w.files[a["h"]]
    if a["data"]:
        os.fdatasync(fd)
    else:
        os.fsync(fd)
    return 0, _size(fd)


@_operation
def _fadvise(w: _Worker, a: Arguments) -> Answer:
    fd = w.files[a["h"]]
    os.posix_fadvise(fd, a["off"], a["len"], os.POSIX_FADV_DONTNEED)
    return 0, _size(fd)


@_operation
def _map(w: _Worker, a: Arguments) -> Answer:
    prot = {"r": 1, "rw": 3, "rx": 5}[a["prot"]]
    flags = mmap.MAP_SHARED if a["shared"] else mmap.MAP_PRIVATE
    address = syscalls.map_file(w.files[a["h"]], a["len"], prot, flags, a["off"])
    w.mappings[a["m"]] = _Mapping(address, a["len"], a["off"])
    if a["huge"]:
        try:
            syscalls.madvise(address, a["len"], mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without transparent huge pages
                raise
    return 0, -1


@_operation
def _remap(w: _Worker, a: Arguments) -> Answer:
    """Move a mapping, and make it longer or shorter."""
    mapping = w.mappings[a["m"]]
    # advice for a part has made several areas of it: make them one again, mremap(2) moves only one
    with contextlib.suppress(OSError):
        advice = mmap.MADV_HUGEPAGE if a["huge"] else mmap.MADV_NOHUGEPAGE
        syscalls.madvise(mapping.address, mapping.length, advice)
    to = syscalls.remap(mapping.address, mapping.length, a["len"], mapping.offset)
    mapping.address, mapping.length = to, a["len"]
    return 0, -1


@_operation
def _unmap(w: _Worker, a: Arguments) -> Answer:
    mapping = w.mappings.pop(a["m"])
    syscalls.unmap(mapping.address, mapping.length)
    return 0, -1


def _load(w: _Worker, address: int, length: int, via: str) -> int:
    if via == "load":
        syscalls.move(w.arena.address, address, length)
        return length
    if via == "vm":
        return syscalls.read_memory(os.getpid(), address, w.arena.address, length)
    return syscalls.pwrite_from(w.arena.fd, address, length, 0)


def _store(w: _Worker, address: int, source: int, length: int, via: str) -> int:
    if via == "store":
        syscalls.move(address, w.pool.address + source, length)
        return length
    return syscalls.pread_into(w.pool.fd, address, length, source)


@_operation
def _mread(w: _Worker, a: Arguments) -> Answer:
    mapping = w.mappings[a["m"]]
    return _load(w, mapping.address + a["off"], a["len"], a["via"]), -1


@_operation
def _mwrite(w: _Worker, a: Arguments) -> Answer:
    mapping = w.mappings[a["m"]]
    done = _store(w, mapping.address + a["off"], a["from"], a["len"], a["via"])
    if a["sync"]:
        start = a["off"] // PAGE * PAGE
        syscalls.msync(mapping.address + start, a["off"] + a["len"] - start)
    return done, -1


@_operation
def _madvise(w: _Worker, a: Arguments) -> Answer:
    mapping = w.mappings[a["m"]]
    syscalls.madvise(mapping.address + a["off"], a["len"], a["advice"])
    return folios.pmd_mapped() if a["count"] else 0, -1


@_operation
def _tail(w: _Worker, a: Arguments) -> Answer:
    """Store behind the end of the file, in its last page, and then change the size."""
    mapping, fd = w.mappings[a["m"]], w.files[a["h"]]
    _store(w, mapping.address + a["off"], a["from"], a["len"], "store")
    os.ftruncate(fd, a["size"])
    return 0, _size(fd)


@_operation
def _probe(w: _Worker, a: Arguments) -> Answer:
    """Whether the page at each offset of a mapping can be had; its byte lands in the arena."""
    mapping, answers = w.mappings[a["m"]], []
    for i, offset in enumerate(a["at"]):
        try:
            answers.append(syscalls.pwrite_from(w.arena.fd, mapping.address + offset, 1, i) == 1)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            answers.append(False)
    return answers, -1


@_operation
def _fork(w: _Worker, a: Arguments) -> Answer:
    """A child writes (when asked to) and reads through a mapping that it inherited, and ends."""
    mapping = w.mappings[a["m"]]
    address = mapping.address + a["off"]
    child = os.fork()
    if child == 0:
        if a["write"]:
            _store(w, address, a["from"], a["len"], "store")
        _load(w, address, a["len"], "load")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:  # the child died of a signal: die the same death, for the session to see
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return a["len"] if status == 0 else -errno.EIO, -1


@_operation
def _rename(w: _Worker, a: Arguments) -> Answer:
    os.rename(w.path(a["path"]), w.path(a["path2"]))
    return 0, -1


@_operation
def _unlink(w: _Worker, a: Arguments) -> Answer:
    os.unlink(w.path(a["path"]))
    return 0, -1


@_operation
def _chmod(w: _Worker, a: Arguments) -> Answer:
    os.chmod(w.path(a["path"]), a["mode"])
    return os.stat(w.path(a["path"])).st_mode & 0o7777, -1


@_operation
def _busy(w: _Worker, a: Arguments) -> Answer:
    """Open and truncate a running program: the errors, 0 where that was possible."""
    path = w.path(a["path"])

    def open_it() -> None:
        os.close(os.open(path, os.O_RDWR))

    found = []
    for attempt in (open_it, lambda: os.truncate(path, os.stat(path).st_size)):
        try:
            attempt()
            found.append(0)
        except OSError as error:
            found.append(error.errno or errno.EIO)
    return found, -1


@_operation
def _clone(w: _Worker, a: Arguments) -> Answer:
    """Copy a file to a new one beside it, and cut the copy off."""
    source = os.open(w.path(a["path"]), os.O_RDONLY)
    try:
        copy = os.open(w.path(a["path2"]), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o755)
        try:
            rest = _size(source)
            _to_the_end(rest, lambda _, n: os.sendfile(copy, source, None, n))
            os.ftruncate(copy, a["size"])
            return 0, _size(copy)
        finally:
            os.close(copy)
    finally:
        os.close(source)


@_operation
def _build(w: _Worker, a: Arguments) -> Answer:
    """Write a program beside the old one, and rename it over."""
    new = w.path(a["path"] + ".new")
    text = program.build(bytes(w.pool.memory[a["from"] : a["from"] + a["len"]]))
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o755)
    try:
        for at in range(0, len(text), a["chunk"]):
            os.pwrite(fd, text[at : at + a["chunk"]], at)
        size = _size(fd)
    finally:
        os.close(fd)
    os.rename(new, w.path(a["path"]))
    return len(text), size


@_operation
def _exec(w: _Worker, a: Arguments) -> Answer:
    w.programs[a["x"]] = program.start(w.path(a["path"]))
    return 0, -1


@_operation
def _sum(w: _Worker, a: Arguments) -> Answer:
    """The program's own sums of its text, and then its text as others see it."""
    running = w.programs[a["x"]]
    answer = running.sums(a["huge"])
    if len(answer) != 16:
        return ("died", w.programs.pop(a["x"]).ended()), -1
    if answer != a["expected"]:
        syscalls.read_memory(running.pid, program.BASE, w.arena.address, a["len"])
    return ("answered", answer, folios.pmd_mapped(running.pid)), -1


@_operation
def _end(w: _Worker, a: Arguments) -> Answer:
    return w.programs.pop(a["x"]).ended(), -1


@_operation
def _whole(w: _Worker, a: Arguments) -> Answer:
    """A whole file, by read or through a mapping; with ``cold``, once dropped from the cache."""
    fd = os.open(w.path(a["path"]), os.O_RDONLY)
    try:
        size = _size(fd)
        if size > w.arena.size:
            return 0, size
        if a["cold"]:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if a["via"] == "read":
            done = 0
            while done < size:
                n = syscalls.pread_into(fd, w.arena.address + done, min(size - done, 1 << 20), done)
                if n == 0:
                    break
                done += n
            return (done, 0), _size(fd)
        length = -(-size // PAGE) * PAGE
        if length == 0:
            return (0, 0), size
        address = syscalls.map_file(fd, length, 5 if a["via"] == "exec" else 1, mmap.MAP_SHARED, 0)
        try:
            if size >= PMD:
                try:
                    syscalls.madvise(address, length, mmap.MADV_HUGEPAGE)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            syscalls.move(w.arena.address, address, length)
            return (length, folios.pmd_mapped()), _size(fd)
        finally:
            syscalls.unmap(address, length)
    finally:
        os.close(fd)


def _pmd_blocks(w: _Worker, numbers: list[int]) -> set[tuple[int, int]]:
    """(number of a mapping, 2 MiB block of the file) for each block that a PMD entry maps."""
    return {
        (number, block)
        for number in numbers
        for m in (w.mappings[number],)
        for block in folios.pmd_blocks(w.pagemap, m.address, m.length, m.offset)
    }


def _answer(w: _Worker, kind: str, arguments: Arguments) -> tuple[Any, ...]:
    watched = arguments.pop("watch", [])
    before = _pmd_blocks(w, watched) if watched else set()
    answer: Answer
    try:
        answer = _OPERATIONS[kind](w, arguments)
    except OSError as error:
        answer = -(error.errno or errno.EIO), -1
    return *answer, sorted(before - _pmd_blocks(w, watched)) if before else []


def serve(root: str, arena: Arena, pool: Arena, connection: socket.socket) -> None:
    """Answer requests until the connection ends. Never returns."""
    faulthandler.disable()  # a death by SIGBUS is the session's to tell
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    code = 0
    try:
        worker = _Worker(root, arena, pool, mappings.open_pagemap("self"))
        while request := connection.recv(1 << 16):
            kind, arguments = marshal.loads(request)  # noqa: S302  from our own parent
            connection.send(marshal.dumps(_answer(worker, kind, arguments)))
    except ConnectionError:  # the session was interrupted, and has gone
        pass
    except BaseException:  # noqa: BLE001  a child of a fork must never return into its parent's stack
        traceback.print_exc(file=sys.stderr)
        code = 3
    finally:
        sys.stderr.flush()
        os._exit(code)
