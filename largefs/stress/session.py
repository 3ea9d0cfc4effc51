"""A session: worker processes, their fresh files, the model, and how the two are compared.

``checks`` says, for each operation, what of it must be compared and how it changes the model.
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import mmap
import os
import shutil
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from largefs.stress import syscalls, worker
from largefs.stress.model import Inode, Mapping, Model
from largefs.stress.report import Difference, Write, explain
from largefs.stress.syscalls import PAGE, PMD, Arena, address_of, first_difference

_PRIVATE = -1  # in place of an inode's number: what was written went to no file
_FULL = {errno.ENOSPC, errno.EDQUOT}


def errno_name(number: int) -> str:
    """The errno's name, as in errno(3)."""
    # Python's table has the other name of 95 last
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


_IN_BYTES = {"off", "off2", "len", "size", "from", "flags"}


class CannotRunError(Exception):
    """The filesystem cannot be tested: full, read-only, gone."""


@dataclass
class Operation:
    """One operation: its number, what it is, which worker does it, and with what."""

    number: int
    kind: str
    worker: int
    arguments: dict[str, Any]

    def __str__(self) -> str:
        """One line for a person; offsets and lengths in hexadecimal."""
        said = [f"{self.number:6} worker {self.worker}: {self.kind}"]
        for name, value in self.arguments.items():
            hexadecimal = isinstance(value, int) and name in _IN_BYTES
            said.append(f"{name}={value:#x}" if hexadecimal else f"{name}={value}")
        return " ".join(said)

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
    pmd_taken: Counter[str] = field(default_factory=Counter)
    pmd_most: int = 0
    pmd_samples: int = 0
    pmd_hits: int = 0

    def pmd_mapped(self, count: int) -> None:
        """Note how many bytes PMD entries mapped when somebody looked."""
        self.pmd_samples += 1
        self.pmd_hits += count > 0
        self.pmd_most = max(self.pmd_most, count)

    def add_race(self, counts: Counter[str]) -> None:
        """Add what a race did; with ``LOOKS`` and ``HUGE``, and 2 MiB pages taken, in its counts."""
        self.pmd_samples += counts.pop(LOOKS, 0)
        self.pmd_hits += counts.pop(HUGE, 0)
        for name, count in counts.items():
            (self.pmd_taken if ": " in name else self.operations)[name] += count


LOOKS, HUGE = "looks", "looks that saw a PMD mapping"


def pmd_taken(what: str, blocks: Iterable[int], start: int, end: int) -> Counter[str]:
    """Names for the 2 MiB pages that a change of [start, end) took from mappings, and how many.

    One that lies only partly in the range was split; one that lies in it wholly was removed.
    """
    taken: Counter[str] = Counter()
    for block in blocks:
        inside = start <= block * PMD and (block + 1) * PMD <= end
        taken[f"{what}: {'removed' if inside else 'split'}"] += 1
    return taken


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
        pid = syscalls.fork()
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

    def call(self, op: Operation, **more: object) -> tuple[Any, int]:
        """Have the operation's worker do it; its answer, as ``worker`` describes it."""
        result, size, _ = self._ask(op, {**op.arguments, **more})
        return result, size

    def call_to_change(
        self, op: Operation, inode: Inode, start: int, end: int, name: str
    ) -> tuple[Any, int]:
        """The same for what changes [start, end) of a file; counts 2 MiB pages that it split."""
        mine = [
            number
            for number, mapping in self.model.mappings.items()
            if mapping.inode is inode and mapping.worker == op.worker
        ]
        result, size, lost = self._ask(op, {**op.arguments, "watch": mine})
        self.tally.pmd_taken += pmd_taken(name, (block for _, block in lost), start, end)
        return result, size

    def _ask(self, op: Operation, arguments: dict[str, Any]) -> tuple[Any, int, list[Any]]:
        process = self._workers[op.worker]
        try:
            process.connection.send(marshal.dumps((op.kind, arguments)))
            answer = process.connection.recv(1 << 18)
        except TimeoutError:
            raise self._hung(op, process) from None
        except ConnectionError:
            answer = b""
        if not answer:
            raise _died(op, process)
        result, size, lost = marshal.loads(answer)  # noqa: S302  from our own child
        if isinstance(result, int) and result < 0:
            self.tally.errors[f"{op.kind} {errno_name(-result)}"] += 1
            if -result in _FULL:
                raise CannotRunError(
                    f"{self.root}: {os.strerror(-result)}: make room, or lower --max-size"
                )
        return result, size, lost

    def _hung(self, op: Operation, process: _Process) -> Difference:
        where = "its stack is not visible"
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/stack") as stack:
            where = "it is at " + " < ".join(line.split()[-1] for line in stack.readlines()[:6])
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        return Difference(
            "hang", f"{op.kind} did not end in {self.limits.timeout:g} seconds; {where}"
        )

    def arena(self, op: Operation) -> Arena:
        """Where the operation's worker puts what it reads."""
        return self._workers[op.worker].arena

    # -- comparisons -------------------------------------------------------------------------------

    def require(self, op: Operation, result: object, what: str = "") -> None:
        """A failure where there must be none is a difference."""
        if isinstance(result, int) and result < 0:
            name = errno_name(-result)
            raise Difference("errno", f"{what or op.kind} failed: {name} ({os.strerror(-result)})")

    def learn(self, variant: str, result: object, acceptable: Iterable[int]) -> bool:
        """Whether the filesystem does not have this; it is not asked for it again."""
        if isinstance(result, int) and -result in acceptable:
            self.tally.unsupported[variant] = errno_name(-result)
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
                "size",
                f"{how} of {name} says {size} bytes, not {inode.size}, after {op.kind}",
                path=name,
            )

    def compare(self, op: Operation, inode: Inode, offset: int, length: int, how: str) -> None:
        """The start of the worker's arena against the model."""
        self._compare(op, inode, offset, length, how, inode.memory, offset)

    def compare_mapped(
        self, op: Operation, mapping: Mapping, offset: int, length: int, how: str
    ) -> None:
        """The same for what must show through a mapping; ``offset`` is the file's."""
        if not mapping.copies:
            self.compare(op, mapping.inode, offset, length, how)
            return
        expected = mmap.mmap(-1, length)
        expected[:] = mapping.content(offset, length)
        self._compare(op, mapping.inode, offset, length, f"private {how}", expected, 0)

    def _compare(
        self,
        op: Operation,
        inode: Inode,
        offset: int,
        length: int,
        how: str,
        memory: mmap.mmap,
        start: int,
    ) -> None:
        self.tally.bytes_compared += length
        arena = self.arena(op)
        at = first_difference(arena.address, address_of(memory) + start, length)
        if at is None:
            return
        place = offset + at
        n = min(16, length - at)
        expected, found = memory[start + at : start + at + n], arena.memory[at : at + n]
        self.differs(inode, place, expected, found, how)

    def differs(
        self, inode: Inode, place: int, expected: bytes, found: bytes, how: str
    ) -> NoReturn:
        """Raise the Difference of bytes at the offset ``place`` of a file."""
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

    def stored(
        self, op: Operation, mapping: Mapping, offset: int, length: int, source: int
    ) -> None:
        """Apply a write of pool bytes through a mapping; ``offset`` is the file's."""
        if mapping.shared:
            self.wrote(op, mapping.inode, offset, length, source)
            return
        mapping.store(offset, self.pool.memory[source : source + length])
        name = f"a private mapping of {self.model.name_of(mapping.inode)}"
        self.writes.append(Write(op.number, _PRIVATE, name, offset, length, source))

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
