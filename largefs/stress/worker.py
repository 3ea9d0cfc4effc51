"""A worker process: does one operation at a time, and knows nothing of what is right.

A request is a marshalled ``(kind, arguments)``; the answer is ``(result, size)``, with the file's
size by fstat(2) right after (-1 where there is no open file to ask), or ``(-errno, -1)``. Data read
lands in the arena that the worker shares with the session; data written comes from the pool. Where
a page inside a file cannot be had, a ``load`` or ``store`` kills the worker with SIGBUS, as it
would any program: the session sees that.
"""

from __future__ import annotations

import errno
import faulthandler
import marshal
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from largefs.stress import program, syscalls
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
    files: dict[int, int] = field(default_factory=dict)
    mappings: dict[int, _Mapping] = field(default_factory=dict)
    programs: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # pid, to, from

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"


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
    fd, length = w.files[a["h"]], a["len"]
    if a["via"] == "pread":
        return syscalls.pread_into(fd, w.arena.address, length, a["off"]), -1
    cuts = sorted({0, length // 3, length - length // 5, length})
    view = memoryview(w.arena.memory)
    parts = [view[i:j] for i, j in pairwise(cuts)]
    return os.preadv(fd, parts, a["off"]), -1


@_operation
def _write(w: _Worker, a: Arguments) -> Answer:
    fd = w.files[a["h"]]
    if a["via"] == "append":  # O_APPEND: the offset does not count
        done = os.write(fd, memoryview(w.pool.memory)[a["from"] : a["from"] + a["len"]])
    else:
        done = syscalls.pwrite_from(fd, w.pool.address + a["from"], a["len"], a["off"])
    return done, _size(fd)


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
    return _pmd_mapped() if a["count"] else 0, -1


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
    path = w.path(a["path"])
    to_child, from_child = os.pipe(), os.pipe()
    try:
        pid = os.posix_spawn(
            path,
            [path],
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, to_child[0], 0),
                (os.POSIX_SPAWN_DUP2, from_child[1], 1),
            ],
        )
    except OSError:
        os.close(to_child[1])
        os.close(from_child[0])
        raise
    finally:
        os.close(to_child[0])
        os.close(from_child[1])
    w.programs[a["x"]] = (pid, to_child[1], from_child[0])
    return 0, -1


@_operation
def _sum(w: _Worker, a: Arguments) -> Answer:
    """The program's own sums of its text, and then its text as others see it."""
    pid, to, back = w.programs[a["x"]]
    answer = b""
    try:
        os.write(to, b"h" if a["huge"] else b"s")
        answer = os.read(back, 16)
    except BrokenPipeError:
        pass
    if len(answer) != 16:  # it died; of what?
        return ("died", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), -1
    if answer != a["expected"]:
        syscalls.read_memory(pid, program.BASE, w.arena.address, a["len"])
    return ("answered", answer, _pmd_mapped(pid)), -1


@_operation
def _end(w: _Worker, a: Arguments) -> Answer:
    pid, to, back = w.programs.pop(a["x"])
    os.close(to)
    os.close(back)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), -1


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
            return (length, _pmd_mapped()), _size(fd)
        finally:
            syscalls.unmap(address, length)
    finally:
        os.close(fd)


def _pmd_mapped(pid: int | str = "self") -> int:
    """Bytes of files and shmem that PMD entries map in a process (``/proc/PID/smaps_rollup``)."""
    total = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as rollup:
            for line in rollup:
                if line.startswith((b"FilePmdMapped:", b"ShmemPmdMapped:")):
                    total += int(line.split()[1]) << 10
    except OSError:
        return 0
    return total


def serve(root: str, arena: Arena, pool: Arena, connection: socket.socket) -> None:
    """Answer requests until the connection ends. Never returns."""
    worker = _Worker(root, arena, pool)
    faulthandler.disable()  # a death by SIGBUS is the session's to tell
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session ends us
    for name in (signal.SIGTERM, signal.SIGPIPE):
        signal.signal(name, signal.SIG_DFL if name == signal.SIGTERM else signal.SIG_IGN)
    code = 0
    try:
        while request := connection.recv(1 << 16):
            kind, arguments = marshal.loads(request)  # noqa: S302  from our own parent
            answer: Answer
            try:
                answer = _OPERATIONS[kind](worker, arguments)
            except OSError as error:
                answer = -(error.errno or errno.EIO), -1
            connection.send(marshal.dumps(answer))
    except BaseException:  # noqa: BLE001  a child of a fork must never return into its parent's stack
        traceback.print_exc(file=sys.stderr)
        code = 3
    finally:
        sys.stderr.flush()
        os._exit(code)
