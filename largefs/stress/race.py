"""Several processes on one file at once, and what the semantics guarantee even then.

Each block of 4 KiB has one owner, the only process that ever changes it: writers own the head of
the file, which is always there; the truncater owns the tail, which it cuts off and brings back. A
block is filled with one repeated 8-byte stamp: event, owner, block. Each change is an event with a
number that the owner publishes in shared memory before (``started``) and after (``done``). Even
events write the stamp, odd events leave zeros. A reader notes ``done`` before and ``started``
after, so it knows the window of events that it may have seen: every byte must belong to an event of
the window. POSIX wants a read to see a whole write or nothing of it; most Linux filesystems do not
promise that for a read beside a write of the same page, nor does any for a mapping, so a mix of
events of the window passes. A block may be absent (SIGBUS, short read) only while a truncation of
it is in the window.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from largefs.hugetext import mappings
from largefs.stress import folios, syscalls
from largefs.stress.processes import Role, play
from largefs.stress.report import Difference
from largefs.stress.session import HUGE, LOOKS, CannotRunError, pmd_taken
from largefs.stress.syscalls import PMD, Arena

BLOCK = 4096
_HEAD = (2 * PMD + PMD // 2) // BLOCK  # the tail begins in the middle of a 2 MiB block
_TOTAL = 4 * PMD // BLOCK
_RUN = 8  # blocks that lie together and have one owner
_TRUNCATER = 15
_ZEROS = bytes(BLOCK)
# text is mapped as the kernel's loader does it: private, and never written
_PROTECTIONS = {
    "rw": (3, mmap.MAP_SHARED),
    "r": (1, mmap.MAP_SHARED),
    "rx": (5, mmap.MAP_PRIVATE),
}


@dataclass
class _Shared:
    """What all processes of a race see."""

    path: str
    events: mmap.mmap  # started, then done: 8 bytes for each block
    writers: int
    absent: frozenset[str]  # operations that the filesystem does not have

    def started(self, block: int, count: int = 1) -> tuple[int, ...]:
        return struct.unpack_from(f"{count}Q", self.events, block * 8)

    def done(self, block: int, count: int = 1) -> tuple[int, ...]:
        return struct.unpack_from(f"{count}Q", self.events, (_TOTAL + block) * 8)

    def start(self, block: int, event: int) -> None:
        struct.pack_into("Q", self.events, block * 8, event)

    def finish(self, block: int, event: int) -> None:
        struct.pack_into("Q", self.events, (_TOTAL + block) * 8, event)

    def owner(self, block: int) -> int:
        return _TRUNCATER if block >= _HEAD else block // _RUN % self.writers


def _stamp(event: int, owner: int, block: int) -> int:
    return event << 24 | owner << 20 | block


def _content(event: int, owner: int, block: int) -> bytes:
    """What a block holds after an event."""
    if event % 2 or event == 0:
        return _ZEROS
    return struct.pack("Q", _stamp(event, owner, block)) * (BLOCK // 8)


def _judge(found: bytes, block: int, owner: int, low: int, high: int) -> tuple[str, str] | None:
    """Class and text of what is wrong with a block that may show the events [low, high]."""
    if found == _content(low, owner, block):
        return None
    window = {
        _stamp(e, owner, block) if e % 2 == 0 and e else 0
        for e in range(low, min(high, low + 64) + 1)
    }
    for word in set(struct.unpack(f"{len(found) // 8}Q", found)):
        if word in window or (
            word and low <= word >> 24 <= high and word & 0xFFFFFF == owner << 20 | block
        ):
            continue
        if low < high and _mixed(word, window):
            continue
        return _name(word, block, owner, low, high)
    return None


def _mixed(word: int, window: set[int]) -> bool:
    """Whether each byte comes from a value of the window: a copy may tear even inside a word."""
    choices = [value.to_bytes(8, "little") for value in window]
    return all(
        any(byte == c[i] for c in choices) for i, byte in enumerate(word.to_bytes(8, "little"))
    )


def _name(word: int, block: int, owner: int, low: int, high: int) -> tuple[str, str]:
    allowed = f"events {low} to {high} are possible"
    event, at, who = word >> 24, word & 0xFFFFF, word >> 20 & 15
    if word == 0:
        return "lost-write", f"zeros, where only {allowed}"
    if at >= _TOTAL or (who != _TRUNCATER and who > 8) or event > 1 << 32:
        return "garbage", f"{word:#018x} was never written"
    if at != block or who != owner:
        return (
            "misplaced",
            f"the stamp of block {at} (event {event}), {(block - at) * BLOCK:+#x} bytes away",
        )
    if event < low:
        kind = "stale" if low % 2 and low == high else "lost-write"
        return kind, f"event {event}, which is over: {allowed}"
    return "garbage", f"event {event}, which has not begun: {allowed}"


class _Player:
    """What a process of the race has: the file, open and mapped, an arena, a random source."""

    def __init__(self, shared: _Shared, seed: str, until: float, prot: str = "rw") -> None:
        self.shared = shared
        self.random = random.Random(seed)  # noqa: S311
        self.until = until
        self.count: Counter[str] = Counter()
        self.fd = os.open(shared.path, os.O_RDWR)
        self.arena = Arena(_TOTAL * BLOCK)
        self.address = 0
        self.writable = prot == "rw" and "map rw" not in shared.absent
        self.pagemap = mappings.open_pagemap("self")
        for possible in (prot, "r"):
            if not self.address and f"map {possible}" not in shared.absent:
                self.address = self._map(possible)

    def _map(self, prot: str) -> int:
        bits, flags = _PROTECTIONS[prot]
        address = syscalls.map_file(self.fd, _TOTAL * BLOCK, bits, flags, 0)
        if self.random.random() < 0.5:
            with contextlib.suppress(OSError):
                syscalls.madvise(address, _TOTAL * BLOCK, mmap.MADV_HUGEPAGE)
        return address

    def going(self) -> bool:
        return time.monotonic() < self.until

    def pmd_blocks(self) -> set[int]:
        """The file's 2 MiB blocks that this process has PMD-mapped."""
        if not self.address:
            return set()
        found = folios.pmd_blocks(self.pagemap, self.address, _TOTAL * BLOCK, 0)
        self.count[LOOKS] += 1
        self.count[HUGE] += bool(found)
        return found

    # -- reading -----------------------------------------------------------------------------------

    def read(self, block: int, count: int, how: str) -> int:
        """Read blocks into the arena; the bytes had before a page was missing or the file ended."""
        at, length = block * BLOCK, count * BLOCK
        if how == "read":
            return syscalls.pread_into(self.fd, self.arena.address, length, at)
        if how == "load":
            syscalls.move(self.arena.address, self.address + at, length)
            return length
        try:
            return syscalls.pwrite_from(self.arena.fd, self.address + at, length, 0)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return 0

    def way(self, block: int, count: int) -> str:
        if not self.address:
            return "read"
        ways = ["read", "copy"] + (["load"] if block + count <= _HEAD else [])
        return self.random.choice(ways)

    def verify(self, block: int, count: int, how: str) -> None:
        """Read blocks and compare them with the events that they may show."""
        shared = self.shared
        before = shared.done(block, count)
        got = self.read(block, count, how)
        after = shared.started(block, count)
        self.count[f"race {how}"] += 1
        for i in range(count):
            low, high, owner = before[i], after[i], shared.owner(block + i)
            found = self.arena.memory[i * BLOCK : min((i + 1) * BLOCK, max(got, i * BLOCK))]
            if len(found) < BLOCK and (owner != _TRUNCATER or low == high):
                kind = "short" if how == "read" else "sigbus"
                raise self.difference(
                    kind, f"block is not there (events {low} to {high})", block + i, how
                )
            found = found[: len(found) // 8 * 8]
            if wrong := _judge(found, block + i, owner, low, high) if found else None:
                raise self.difference(wrong[0], wrong[1], block + i, how)

    def difference(self, kind: str, text: str, block: int, how: str) -> Difference:
        return Difference(kind, f"race, {how}: {text}", path="race", offset=block * BLOCK)

    # -- changing ----------------------------------------------------------------------------------

    def change(self, block: int, count: int, how: str, owner: int) -> None:
        """One event on blocks that this process owns."""
        shared = self.shared
        zero = how in ("punch", "zero")
        events = []
        for b in range(block, block + count):
            done = shared.done(b)[0]
            events.append(done + 1 if (done + 1) % 2 == zero else done + 2)
            shared.start(b, events[-1])
        data = b"".join(_content(e, owner, block + i) for i, e in enumerate(events))
        at = block * BLOCK
        if how == "punch":
            mode = syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE
            syscalls.fallocate(self.fd, mode, at, count * BLOCK)
        elif how == "store":
            self.arena.memory[: len(data)] = data
            syscalls.move(self.address + at, self.arena.address, len(data))
        elif how == "copy":
            self.arena.memory[: len(data)] = data
            syscalls.pread_into(self.arena.fd, self.address + at, len(data), 0)
        elif os.pwrite(self.fd, data, at) != len(data):
            raise self.difference("short", "write was cut short", block, how)
        for b, event in zip(range(block, block + count), events, strict=True):
            shared.finish(b, event)
        self.count[f"race {how}"] += 1

    def change_way(self) -> str:
        ways = ["write", "write"]
        if self.writable:
            ways += ["store", "copy"]
        if "punch" not in self.shared.absent:
            ways.append("punch")
        return self.random.choice(ways)


def _writer(player: _Player, index: int) -> None:
    shared = player.shared
    runs = [b for b in range(0, _HEAD, _RUN) if shared.owner(b) == index]
    while player.going():
        start = player.random.choice(runs)
        count = player.random.randint(1, _RUN)
        player.change(start, count, player.change_way(), index)
        player.verify(start, count, player.way(start, count))


def _truncater(player: _Player, _: int) -> None:
    shared, fd = player.shared, player.fd
    while player.going():
        for _ in range(player.random.randint(1, 6)):
            block = player.random.randrange(_HEAD, _TOTAL)
            count = min(player.random.choice((1, 3, 64, 512)), _TOTAL - block)
            player.change(block, count, player.change_way(), _TRUNCATER)
            player.verify(block, count, player.way(block, count))
        cut = player.random.choice(
            (_HEAD, 3 * PMD // BLOCK, 3 * PMD // BLOCK + 1, player.random.randrange(_HEAD, _TOTAL))
        )
        inside = player.random.choice((0, 0, 1, BLOCK // 2, BLOCK - 1))
        _cut(player, shared, fd, cut, inside)
        count = _TOTAL - cut
        player.verify(cut, count, player.way(cut, count))


def _cut(player: _Player, shared: _Shared, fd: int, cut: int, inside: int) -> None:
    """Truncate to ``inside`` bytes of a block, and extend again: all from there on is zero."""
    events = {}
    before = _content(shared.done(cut)[0], _TRUNCATER, cut)
    for block in range(cut, _TOTAL):
        done = shared.done(block)[0]
        events[block] = done + 1 + done % 2  # the next odd one
        shared.start(block, events[block])
    huge = player.pmd_blocks()
    for size in (cut * BLOCK + inside, _TOTAL * BLOCK):
        os.ftruncate(fd, size)
        if size < _TOTAL * BLOCK:
            lost = huge - player.pmd_blocks()
            player.count += pmd_taken("race truncate", lost, size, _TOTAL * BLOCK)
        seen = os.fstat(fd).st_size
        if seen != size:
            raise player.difference(
                "size", f"fstat says {seen} after ftruncate to {size}", cut, "truncate"
            )
        if player.random.random() < 0.3:
            time.sleep(0.0005)
    if inside:
        found = os.pread(fd, BLOCK, cut * BLOCK)
        if found != before[:inside].ljust(BLOCK, b"\0"):
            kind = "garbage"
            if found == before:
                kind = "stale"
            elif not any(found):
                kind = "lost-write"
            raise player.difference(kind, f"block cut after {inside} bytes", cut, "read")
        os.pwrite(fd, _ZEROS, cut * BLOCK)
    for block, event in events.items():
        shared.finish(block, event)
    player.count["race truncate"] += 1


def _reader(player: _Player, _: int) -> None:
    while player.going():
        count = player.random.choice((1, 1, 4, 16, 64, 512))
        block = player.random.randrange(_TOTAL - count + 1)
        player.verify(block, count, player.way(block, count))
        if player.random.random() < 0.02:
            player.pmd_blocks()


def _adviser(player: _Player, _: int) -> None:
    """Does all that may not change what anyone sees."""
    length = _TOTAL * BLOCK
    advices = (
        mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED, syscalls.MADV_PAGEOUT, syscalls.MADV_COLLAPSE,
        syscalls.MADV_POPULATE_READ,
    )  # fmt: skip
    while player.going():
        what = player.random.randrange(5)
        if what == 0:
            os.fdatasync(player.fd)
        elif what == 1:
            os.posix_fadvise(player.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        elif player.address:
            with contextlib.suppress(OSError):  # advice may be refused
                syscalls.madvise(player.address, length, player.random.choice(advices))
        player.count["race advice"] += 1
        time.sleep(0.002)


def run(
    root: str, seed: str, seconds: float, timeout: float, skip: frozenset[str] = frozenset()
) -> Counter[str]:
    """One race in the directory ``root``; counts. Raises Difference, CannotRunError."""
    path = f"{root}/race"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(fd, _TOTAL * BLOCK)
    except OSError as error:
        raise CannotRunError(f"{path}: {error.strerror}") from error
    events = mmap.mmap(-1, 2 * 8 * _TOTAL)
    shared = _Shared(path, events, 2, _absent(fd) | ({"punch"} if "fallocate" in skip else set()))

    def role(act: Callable[[_Player, int], None], index: int, prot: str) -> Role:
        def part(number: str, until: float) -> Counter[str]:
            player = _Player(shared, f"{seed}-{number}", until, prot)
            act(player, index)
            return player.count

        return part

    roles = [
        ("writer", role(_writer, 0, "rw")),
        ("writer", role(_writer, 1, "rw")),
        ("truncater", role(_truncater, 0, "rw")),
        ("reader", role(_reader, 0, "rw")),
        ("reader of text", role(_reader, 1, "rx")),
        ("adviser", role(_adviser, 0, "rw")),
    ]
    try:
        count = play(roles, seconds, timeout)
        _verify_all(shared, seed)
        return count
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(path)


def _absent(fd: int) -> frozenset[str]:
    """What the filesystem cannot do; tried before the race, because in it each failure counts."""
    absent = set()
    try:
        mode = syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE
        syscalls.fallocate(fd, mode, 0, BLOCK)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        absent.add("punch")
    for prot, (bits, flags) in _PROTECTIONS.items():
        try:
            syscalls.unmap(syscalls.map_file(fd, BLOCK, bits, flags, 0), BLOCK)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EPERM, errno.EACCES):  # or mounted noexec
                raise
            absent.add(f"map {prot}")
    return frozenset(absent)


def _verify_all(shared: _Shared, seed: str) -> None:
    """When all is quiet, every block shows its last event, by every way and from a cold cache."""
    player = _Player(shared, seed, 0)
    try:
        ways = ["read", "copy"] if player.address else ["read"]
        for how in ways:
            player.verify(0, _TOTAL, how)
        os.fsync(player.fd)
        if player.address:
            syscalls.unmap(player.address, _TOTAL * BLOCK)
            player.address = 0
        os.posix_fadvise(player.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        player.verify(0, _TOTAL, "read")
    finally:
        if player.address:
            syscalls.unmap(player.address, _TOTAL * BLOCK)
        os.close(player.fd)
        os.close(player.pagemap)
        player.arena.close()
