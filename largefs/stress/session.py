"""Operations, one after the other, on fresh files.

Each is carried out by a worker, compared with the model, then applied to it.

Every operation is defined whatever came before it: one whose file, handle or mapping does not
exist, or that would leave the file's bounds, is skipped. So any part of a list of operations can be
replayed, which is what makes shrinking possible.
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import os
import shutil
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from largefs.stress import folios, program, syscalls, worker
from largefs.stress.model import Handle, Inode, Mapping, Model, Program
from largefs.stress.report import Difference, Write, explain
from largefs.stress.syscalls import PAGE, PMD, Arena, first_difference

_ABSENT = {errno.EOPNOTSUPP, errno.ENOSYS}
_ADVISORY = {errno.EINVAL, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EPERM, errno.ENOSYS}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def _errno_name(number: int) -> str:
    # Python's table has the other name of 95 last
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


class CannotRunError(Exception):
    """The filesystem cannot be tested: full, read-only, gone."""


@dataclass
class Operation:
    """One operation: its number, what it is, which worker does it, and with what."""

    number: int
    kind: str
    worker: int
    arguments: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """One line of a replay file."""
        return {"n": self.number, "op": self.kind, "w": self.worker, **self.arguments}

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> Operation:
        """The reverse; raises KeyError on what is no operation."""
        rest = {k: v for k, v in line.items() if k not in ("n", "op", "w")}
        return cls(line["n"], line["op"], line["w"], rest)


@dataclass(frozen=True)
class Limits:
    """The bounds of a run; sizes in bytes, times in seconds."""

    files: int = 3
    workers: int = 2
    max_size: int = 9 << 20
    timeout: float = 120.0
    beyond_end: int = PAGE  # alignment of the end beyond which every page must give SIGBUS


@dataclass
class Tally:
    """What was done."""

    operations: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    unsupported: dict[str, str] = field(default_factory=dict)
    bytes_compared: int = 0
    short_writes: int = 0
    pmd_most: int = 0
    pmd_samples: int = 0
    pmd_hits: int = 0

    def pmd_mapped(self, count: int) -> None:
        """Note how many bytes PMD entries mapped when somebody looked."""
        self.pmd_samples += 1
        self.pmd_hits += count > 0
        self.pmd_most = max(self.pmd_most, count)


@dataclass
class _Process:
    pid: int
    connection: socket.socket
    arena: Arena


class Session:
    """Workers, their files in the new directory ``root``, and the model; a context manager."""

    def __init__(self, root: str, pool: Arena, limits: Limits, tally: Tally) -> None:
        self.root = root
        self.pool = pool
        self.limits = limits
        self.tally = tally
        self.model = Model()
        self.writes: deque[Write] = deque(maxlen=4000)
        self.capacity = limits.max_size
        self._workers: list[_Process] = []

    def __enter__(self) -> Session:
        try:
            os.mkdir(self.root)
        except OSError as error:
            raise CannotRunError(f"{self.root}: {error.strerror}") from error
        for _ in range(self.limits.workers):
            self._workers.append(self._start_worker())
        return self

    def _start_worker(self) -> _Process:
        arena = Arena(self.capacity + PMD)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            for other in self._workers:  # so that each sees the end of its own connection
                other.connection.close()
            worker.serve(self.root, arena, self.pool, theirs)
        theirs.close()
        ours.settimeout(self.limits.timeout)
        return _Process(pid, ours, arena)

    def __exit__(self, *_: object) -> None:
        for process in self._workers:
            process.connection.close()
        for process in self._workers:
            _reap(process.pid)
            process.arena.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.root)

    # -- one operation -----------------------------------------------------------------------------

    def perform(self, op: Operation) -> bool:
        """Carry out and compare; False if it was skipped. Raises Difference, CannotRunError."""
        try:
            done = _CHECKS[op.kind](self, op, op.arguments)
        except Difference as difference:
            difference.operation = op.number
            self._locate(difference)
            raise
        if done:
            self.tally.operations[op.kind] += 1
        return done

    def _locate(self, difference: Difference) -> None:
        inode = self.model.names.get(difference.path)
        if inode is None or not 0 <= difference.offset < inode.size:
            return
        with contextlib.suppress(OSError):
            fd = os.open(f"{self.root}/{difference.path}", os.O_RDONLY)
            try:
                difference.folios = folios.around(fd, difference.offset)
            finally:
                os.close(fd)

    def call(self, op: Operation, **more: object) -> tuple[Any, int]:
        """Have the operation's worker do it; its answer, as ``worker`` describes it."""
        process = self._workers[op.worker]
        request = marshal.dumps((op.kind, {**op.arguments, **more}))
        try:
            process.connection.send(request)
            answer = process.connection.recv(1 << 18)
        except TimeoutError:
            raise self._hung(op, process) from None
        except ConnectionError:
            answer = b""
        if not answer:
            raise _died(op, process)
        result, size = marshal.loads(answer)  # noqa: S302  from our own child
        if isinstance(result, int) and result < 0:
            self.tally.errors[f"{op.kind} {_errno_name(-result)}"] += 1
            if -result in _FULL:
                raise CannotRunError(
                    f"{self.root}: {os.strerror(-result)}: make room, or lower --max-size"
                )
        return result, size

    def _hung(self, op: Operation, process: _Process) -> Difference:
        where = "its stack is not visible"
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/stack") as stack:
            where = "it is at " + " < ".join(line.split()[-1] for line in stack.readlines()[:6])
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        return Difference(
            "hang", f"{op.kind} did not end in {self.limits.timeout:g} seconds; {where}"
        )

    # -- comparisons -------------------------------------------------------------------------------

    def require(self, op: Operation, result: object, what: str = "") -> None:
        """A failure where there must be none is a difference."""
        if isinstance(result, int) and result < 0:
            name = _errno_name(-result)
            raise Difference("errno", f"{what or op.kind} failed: {name} ({os.strerror(-result)})")

    def learn(self, variant: str, result: object, acceptable: Iterable[int]) -> bool:
        """Whether the filesystem does not have this; it is not asked for it again."""
        if isinstance(result, int) and -result in acceptable:
            self.tally.unsupported[variant] = _errno_name(-result)
            return True
        return False

    def check_size(self, op: Operation, inode: Inode, size: int) -> None:
        """By the worker's fstat, and by stat of the name from this process."""
        name = self.model.name_of(inode)
        how = "fstat"
        if size == inode.size and self.model.names.get(name) is inode:
            how = "stat"
            try:
                size = os.stat(f"{self.root}/{name}").st_size
            except OSError as error:
                raise Difference("errno", f"stat of {name} failed: {error.strerror}") from error
        if size != inode.size:
            raise Difference(
                "size", f"{how} says {size} bytes, not {inode.size}, after {op.kind}", path=name
            )

    def compare(self, op: Operation, inode: Inode, offset: int, length: int, how: str) -> None:
        """The start of the worker's arena against the model."""
        self.tally.bytes_compared += length
        arena = self._workers[op.worker].arena
        at = first_difference(arena.address, inode.address + offset, length)
        if at is None:
            return
        place = offset + at
        n = min(16, length - at)
        expected, found = inode.memory[place : place + n], arena.memory[at : at + n]
        if place >= inode.size:
            kind, text = "tail", "not zero between the end of the file and the end of the page"
        else:
            kind, text = explain(self.pool, list(self.writes), inode.number, place, expected, found)
        raise Difference(
            kind,
            f"{how}: {text}",
            path=self.model.name_of(inode),
            offset=place,
            expected=expected.hex(" ", 4),
            found=found.hex(" ", 4),
        )

    def wrote(self, op: Operation, inode: Inode, offset: int, length: int, source: int) -> None:
        """Apply a write of pool bytes to the model."""
        inode.write(offset, self.pool.address + source, length)
        name = self.model.name_of(inode)
        self.writes.append(Write(op.number, inode.number, name, offset, length, source))

    def moved(self, inode: Inode, start: int, end: int, to: Inode, by: int) -> None:
        """Remember that the data in [start, end) is now also ``by`` bytes further in ``to``."""
        name = self.model.name_of(to)
        for w in list(self.writes):
            low, high = max(w.offset, start), min(w.offset + w.length, end)
            if w.inode == inode.number and low < high:
                source = w.source + low - w.offset
                self.writes.append(
                    replace(
                        w,
                        inode=to.number,
                        name=name,
                        offset=low + by,
                        length=high - low,
                        source=source,
                    )
                )


def _reap(pid: int) -> int:
    """Exit code (negative for a signal) of a worker about to end; kill it if it does not."""
    for attempt in range(200):
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return 0
        if done:
            return os.waitstatus_to_exitcode(status)
        if attempt == 100:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005 if attempt < 90 else 0.02)
    return 0  # in an uninterruptible sleep: the hang was reported


def _died(op: Operation, process: _Process) -> Exception:
    code = _reap(process.pid)
    if code == -signal.SIGBUS:
        return Difference("sigbus", f"{op.kind}: SIGBUS at a page inside the file")
    if code < 0:
        return Difference("crash", f"{op.kind}: the worker died of {signal.Signals(-code).name}")
    return CannotRunError(
        f"a worker failed in {op.kind} (exit code {code}); its traceback is above"
    )


# -- the operations: each returns False when it cannot be done in the present state ----------------

_Check = Callable[[Session, Operation, dict[str, Any]], bool]


def _open(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    name, flags = a["path"], a["flags"]
    inode = s.model.names.get(name)
    if a["h"] in s.model.handles or (inode is None and not flags & os.O_CREAT):
        return False
    result, size = s.call(op)
    s.require(op, result)
    if inode is None:
        inode = s.model.create(name, s.capacity)
    elif flags & os.O_TRUNC:
        inode.truncate(0)
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    s.model.handles[a["h"]] = Handle(op.worker, inode, bool(flags & os.O_APPEND), writable)
    s.check_size(op, inode, size)
    return True


def _handle(s: Session, op: Operation, number: int, write: bool = False) -> Handle | None:
    handle = s.model.handles.get(number)
    if handle is None or handle.worker != op.worker or (write and not handle.writable):
        return None
    return handle


def _close(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    if _handle(s, op, a["h"]) is None:
        return False
    s.require(op, s.call(op)[0])
    del s.model.handles[a["h"]]
    return True


def _read(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"])
    if handle is None:
        return False
    inode, offset = handle.inode, a["off"]
    due = max(0, min(a["len"], inode.size - offset))
    result, _ = s.call(op)
    s.require(op, result)
    s.compare(op, inode, offset, min(result, due), a["via"])
    if result != due:
        raise Difference(
            "short",
            f"{a['via']} of {a['len']} bytes gave {result}, where the file has {due}",
            path=s.model.name_of(inode),
            offset=offset,
        )
    return True


def _write(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"], write=True)
    if handle is None or (a["via"] == "append") != handle.append:
        return False
    inode = handle.inode
    offset = inode.size if handle.append else a["off"]
    if offset + a["len"] > s.capacity:
        return False
    result, size = s.call(op)
    s.require(op, result)
    if not 0 < result <= a["len"]:
        raise Difference("short", f"write of {a['len']} bytes returned {result}")
    s.tally.short_writes += result < a["len"]  # allowed by POSIX, if rare
    s.wrote(op, inode, offset, result, a["from"])
    s.check_size(op, inode, size)
    return True


def _truncate(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"], write=True)
    if handle is None or a["size"] > s.capacity:
        return False
    result, size = s.call(op)
    s.require(op, result)
    handle.inode.truncate(a["size"])
    s.check_size(op, handle.inode, size)
    return True


def _fallocate(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"], write=True)
    if handle is None:
        return False
    inode, mode, offset, length = handle.inode, a["mode"], a["off"], a["len"]
    end = offset + length
    if mode == syscalls.COLLAPSE_RANGE and end >= inode.size:
        return False
    if mode == syscalls.INSERT_RANGE and (offset >= inode.size or inode.size + length > s.capacity):
        return False
    if end > s.capacity:
        return False
    result, size = s.call(op)
    moves = mode in (syscalls.COLLAPSE_RANGE, syscalls.INSERT_RANGE)
    acceptable = {*_ABSENT, errno.EINVAL} if moves else _ABSENT
    if s.learn(f"fallocate {mode_name(mode)}", result, acceptable):
        return True
    s.require(op, result, f"fallocate {mode_name(mode)}")
    if mode == syscalls.COLLAPSE_RANGE:
        s.moved(inode, end, inode.size, inode, -length)
        inode.collapse(offset, length)
    elif mode == syscalls.INSERT_RANGE:
        s.moved(inode, offset, inode.size, inode, length)
        inode.insert(offset, length)
    else:
        if mode & (syscalls.PUNCH_HOLE | syscalls.ZERO_RANGE):
            inode.zero(offset, length)
        if not mode & syscalls.KEEP_SIZE:
            inode.size = max(inode.size, end)
    s.check_size(op, inode, size)
    return True


def mode_name(mode: int) -> str:
    """The mode of fallocate(2) as its option of fallocate(1)."""
    names = {
        0: "",
        1: "keep-size",
        2: "punch-hole",
        8: "collapse-range",
        16: "zero-range",
        32: "insert-range",
    }
    return "+".join(names[bit] for bit in (2, 8, 16, 32, 1) if mode & bit) or "allocate"


def _copy(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    source, target = _handle(s, op, a["h"]), _handle(s, op, a["h2"], write=True)
    if source is None or target is None or target.append:
        return False
    offset, to, length = a["off"], a["off2"], a["len"]
    if to + length > s.capacity or (source.inode is target.inode and abs(offset - to) < length):
        return False
    result, size = s.call(op)
    if s.learn("copy_file_range", result, {*_ABSENT, errno.EXDEV, errno.EINVAL}):
        return True
    s.require(op, result, "copy_file_range")
    due = max(0, min(length, source.inode.size - offset))
    if result > due or (due and not result):
        raise Difference(
            "short",
            f"copy_file_range of {length} bytes returned {result}, where the source has {due}",
            path=s.model.name_of(source.inode),
            offset=offset,
        )
    s.moved(source.inode, offset, offset + result, target.inode, to - offset)
    target.inode.write(to, source.inode.address + offset, result)
    s.check_size(op, target.inode, size)
    return True


def _seek(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"])
    if handle is None:
        return False
    inode = handle.inode
    result, size = s.call(op)
    if s.learn("seek-hole", result, {*_ABSENT, errno.EINVAL}):
        return True
    s.require(op, result, "lseek")
    s.check_size(op, inode, size)
    at = 0
    for start, end in [*result, (inode.size, inode.size)]:
        if not at <= start <= end <= inode.size:
            raise Difference(
                "hole", f"the data at {start:#x} to {end:#x} after {at:#x} makes no sense"
            )
        if not inode.is_zero(at, start):
            offset = next(i for i in range(at, start) if inode.memory[i])
            raise Difference(
                "hole",
                f"SEEK_DATA says that {at:#x} to {start:#x} is a hole; data was written there",
                path=s.model.name_of(inode),
                offset=offset,
            )
        at = end
    return True


def _fsync(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"])
    if handle is None:
        return False
    result, size = s.call(op)
    s.require(op, result, "fdatasync" if a["data"] else "fsync")
    s.check_size(op, handle.inode, size)
    return True


def _fadvise(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"])
    if handle is None:
        return False
    result, size = s.call(op)
    if s.learn("fadvise", result, _ADVISORY | _ABSENT):
        return True
    s.require(op, result)
    s.check_size(op, handle.inode, size)
    return True


def _map(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"], write=a["prot"] == "rw")
    if handle is None or a["m"] in s.model.mappings:
        return False
    result, _ = s.call(op)
    if s.learn(f"map {a['prot']}", result, {errno.ENODEV, *(_EXEC if a["prot"] == "rx" else ())}):
        return True
    s.require(op, result, "mmap")
    s.model.mappings[a["m"]] = Mapping(
        op.worker, handle.inode, a["off"], a["len"], a["prot"] == "rw"
    )
    return True


_EXEC = (errno.EPERM, errno.EACCES)  # mounted noexec


def _mapping(s: Session, op: Operation, a: dict[str, Any]) -> Mapping | None:
    mapping = s.model.mappings.get(a["m"])
    return mapping if mapping and mapping.worker == op.worker else None


def _unmap(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    if _mapping(s, op, a) is None:
        return False
    s.require(op, s.call(op)[0], "munmap")
    del s.model.mappings[a["m"]]
    return True


def _accessible(mapping: Mapping | None, a: dict[str, Any], write: bool) -> Mapping | None:
    """The mapping, if the range lies in it and in the file (for reading, in the last page)."""
    if mapping is None or a["off"] + a["len"] > mapping.length or (write and not mapping.writable):
        return None
    end = mapping.inode.size if write else mapping.inode.mapped_end
    return mapping if mapping.offset + a["off"] + a["len"] <= end else None


def _accessed(s: Session, op: Operation, mapping: Mapping, a: dict[str, Any], result: int) -> None:
    place = mapping.offset + a["off"]
    if result in (-errno.EFAULT, -errno.ENOMEM) or 0 <= result < a["len"]:
        raise Difference(
            "sigbus",
            f"{op.kind}: a page inside the file cannot be had",
            path=s.model.name_of(mapping.inode),
            offset=place + max(0, result),
        )
    s.require(op, result)


def _mread(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _accessible(_mapping(s, op, a), a, write=False)
    if mapping is None:
        return False
    result, _ = s.call(op)
    if s.learn(f"mread {a['via']}", result, {errno.EPERM, errno.ENOSYS}):
        return True
    _accessed(s, op, mapping, a, result)
    s.compare(op, mapping.inode, mapping.offset + a["off"], a["len"], f"mapping, {a['via']}")
    return True


def _mwrite(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _accessible(_mapping(s, op, a), a, write=True)
    if mapping is None:
        return False
    result, _ = s.call(op)
    _accessed(s, op, mapping, a, result)
    s.wrote(op, mapping.inode, mapping.offset + a["off"], a["len"], a["from"])
    return True


def _fork(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _accessible(_mapping(s, op, a), a, write=a["write"])
    if mapping is None:
        return False
    result, _ = s.call(op)
    _accessed(s, op, mapping, a, result)
    place = mapping.offset + a["off"]
    if a["write"]:
        s.wrote(op, mapping.inode, place, a["len"], a["from"])
    s.compare(op, mapping.inode, place, a["len"], "mapping, in a forked child")
    return True


def _madvise(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _mapping(s, op, a)
    if mapping is None or a["off"] + a["len"] > mapping.length:
        return False
    result, _ = s.call(op)
    if a["count"] and result >= 0:
        s.tally.pmd_mapped(result)
    if result < 0 and a["advice"] == syscalls.MADV_POPULATE_READ and -result == errno.EFAULT:
        if mapping.offset + a["off"] + a["len"] <= mapping.inode.mapped_end:
            _accessed(s, op, mapping, a, result)
    elif result < 0 and -result not in _ADVISORY:
        s.require(op, result)
    return True


def _tail(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping, handle = _mapping(s, op, a), _handle(s, op, a["h"], write=True)
    if mapping is None or handle is None or not mapping.writable:
        return False
    inode, start = mapping.inode, mapping.offset + a["off"]
    end = start + a["len"]
    if handle.inode is not inode or not inode.size <= start < end <= inode.mapped_end:
        return False
    if a["off"] + a["len"] > mapping.length or a["size"] > s.capacity or a["size"] == inode.size:
        return False
    result, size = s.call(op)
    s.require(op, result)
    s.writes.append(
        Write(op.number, inode.number, s.model.name_of(inode), start, a["len"], a["from"])
    )
    inode.truncate(a["size"])  # what was stored is gone: POSIX, mmap: "any partial page is zero"
    s.check_size(op, inode, size)
    return True


def _probe(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _mapping(s, op, a)
    if mapping is None:
        return False
    inode = mapping.inode
    ends = inode.mapped_end, -(-inode.size // s.limits.beyond_end) * s.limits.beyond_end
    at = [offset for offset in a["at"] if offset < mapping.length]
    result, _ = s.call(op, at=at)
    s.require(op, result)
    arena = s._workers[op.worker].arena
    for i, (offset, had) in enumerate(zip(at, result, strict=True)):
        place = mapping.offset + offset
        where = {"path": s.model.name_of(inode), "offset": place}
        if place < ends[0] and not had:
            raise Difference("sigbus", "a page inside the file cannot be had", **where)
        if place >= ends[1] and had:
            raise Difference(
                "no-sigbus", f"a page beyond the end ({inode.size:#x}) can be had", **where
            )
        if had and arena.memory[i] != inode.memory[place]:
            raise Difference(
                "tail" if place >= inode.size else "garbage",
                "a probed byte differs",
                expected=f"{inode.memory[place]:02x}",
                found=f"{arena.memory[i]:02x}",
                **where,
            )
    return True


def _rename(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    if a["path"] not in s.model.names or a["path"] == a["path2"]:
        return False
    s.require(op, s.call(op)[0])
    s.model.names[a["path2"]] = s.model.names.pop(a["path"])
    _gone(s, a["path"])
    s.check_size(op, s.model.names[a["path2"]], s.model.names[a["path2"]].size)
    return True


def _unlink(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    if a["path"] not in s.model.names:
        return False
    s.require(op, s.call(op)[0])
    del s.model.names[a["path"]]
    _gone(s, a["path"])
    return True


def _gone(s: Session, name: str) -> None:
    if os.path.lexists(f"{s.root}/{name}"):
        raise Difference("errno", f"{name} is still there", path=name)


def _build(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    result, size = s.call(op)
    s.require(op, result)
    inode = s.model.create(a["path"], s.capacity)
    body = program.build(s.pool.memory[a["from"] : a["from"] + a["len"]])
    s.wrote(op, inode, 0, a["len"], a["from"])
    inode.memory[: len(body)] = body
    s.check_size(op, inode, size)
    return True


def _exec(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    inode = s.model.names.get(a["path"])
    if inode is None or a["x"] in s.model.programs:
        return False
    result, _ = s.call(op)
    if s.learn("exec", result, _EXEC):
        return True
    s.require(op, result)
    sums = program.sums(inode.memory[: inode.size])
    s.model.programs[a["x"]] = Program(op.worker, inode, sums)
    return True


def _sum(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    running = s.model.programs.get(a["x"])
    if running is None or running.worker != op.worker:
        return False
    inode = running.inode
    expected = running.sums
    result, _ = s.call(op, expected=expected, len=inode.size)
    s.require(op, result)
    if result[0] == "died":
        del s.model.programs[a["x"]]
        raise Difference("crash", f"a program of {inode.size} bytes ended with {result[1]}")
    s.tally.pmd_mapped(result[2])
    if result[1] != expected:
        s.compare(op, inode, 0, inode.size, "text of a running program")
        raise Difference(
            "garbage",
            "a running program summed its text wrongly, though the text reads right",
            path=s.model.name_of(inode),
            expected=expected.hex(" ", 8),
            found=result[1].hex(" ", 8),
        )
    s.tally.bytes_compared += inode.size
    return True


def _end(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    running = s.model.programs.get(a["x"])
    if running is None or running.worker != op.worker:
        return False
    del s.model.programs[a["x"]]
    result, _ = s.call(op)
    if result:
        raise Difference("crash", f"a program ended with {result} where it must end with 0")
    return True


def _whole(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    inode = s.model.names.get(a["path"])
    if inode is None:
        return False
    if f"map {'rx' if a['via'] == 'exec' else 'r'}" in s.tally.unsupported and a["via"] != "read":
        return False
    result, size = s.call(op)
    if a["via"] == "exec" and s.learn("map rx", result, {errno.ENODEV, *_EXEC}):
        return True
    if a["via"] == "mmap" and s.learn("map r", result, {errno.ENODEV}):
        return True
    s.require(op, result, f"whole file by {a['via']}")
    s.check_size(op, inode, size)
    fresh = syscalls.statx_size(f"{s.root}/{a['path']}", fresh=True)
    if fresh != inode.size:
        raise Difference("size", f"statx says {fresh} bytes, not {inode.size}", path=a["path"])
    done, pmd = result
    if a["via"] != "read" and inode.size >= PMD:
        s.tally.pmd_mapped(pmd)
    due = inode.size if a["via"] == "read" else inode.mapped_end
    cold = ", after dropping it from the cache" if a["cold"] else ""
    s.compare(op, inode, 0, min(done, due), f"whole file by {a['via']}{cold}")
    if done != due:
        raise Difference("short", f"reading to the end gave {done} of {due} bytes", path=a["path"])
    return True


_CHECKS: dict[str, _Check] = {
    function.__name__.strip("_"): function
    for function in (
        _open, _close, _read, _write, _truncate, _fallocate, _copy, _seek, _fsync, _fadvise,
        _map, _unmap, _mread, _mwrite, _fork, _madvise, _tail, _probe, _rename, _unlink,
        _build, _exec, _sum, _end, _whole,
    )
}  # fmt: skip
KINDS = tuple(_CHECKS)
