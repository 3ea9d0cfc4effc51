"""Programs that run while their file is replaced, unlinked, copied, opened and dropped all the time.

One process replaces the program, by rename or by unlinking it first; versions have numbers, which
it publishes in shared memory before (``started``) and after (``done``), with what each version must
answer. Runners execute the program and have it sum its own text again and again: the answer must be
that of one version that was possible when it was executed, and must never change after, whatever
becomes of the file. Nobody may open the file of a running program for writing (ETXTBSY); copies of
it are made and cut off, and a meddler changes its mode, drops it from the cache and collapses it.
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

from largefs.stress import folios, program, syscalls
from largefs.stress.processes import Role, play
from largefs.stress.report import Difference
from largefs.stress.session import HUGE, LOOKS, CannotRunError
from largefs.stress.syscalls import PAGE, PMD

_SIZES = (PMD - 8, PMD, PMD + 8, PMD + PAGE, 2 * PMD)  # bytes
_VERSIONS = 1 << 16  # in the table of answers; a race has a few hundred


class _Shared:
    """The program's path, the versions that it may be, and what each must answer."""

    def __init__(self, root: str) -> None:
        self.path = f"{root}/program"
        self._table = mmap.mmap(-1, 16 + 16 * _VERSIONS)

    def possible(self) -> tuple[int, int]:
        """The newest version that is done, and the newest that has been started."""
        started, done = struct.unpack_from("2Q", self._table)
        return done, started

    def start(self, version: int, answer: bytes) -> None:
        self._table[16 + 16 * version : 32 + 16 * version] = answer
        struct.pack_into("Q", self._table, 0, version)

    def finish(self, version: int) -> None:
        struct.pack_into("Q", self._table, 8, version)

    def answer(self, version: int) -> bytes:
        return self._table[16 + 16 * version : 32 + 16 * version]


def run(root: str, seed: str, seconds: float, timeout: float) -> Counter[str]:
    """One race in the directory ``root``; counts, none where nothing can be executed.

    Raises Difference, CannotRunError.
    """
    shared = _Shared(root)
    if not program.supported():
        return Counter()
    try:
        _replace(shared, random.Random(seed), 1)  # noqa: S311
    except OSError as error:
        raise CannotRunError(f"{shared.path}: {error.strerror}") from error
    try:
        code = program.start(shared.path).ended()
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):  # mounted noexec
            return Counter()
        text = f"race: a program cannot be executed: {error.strerror}"
        raise Difference("errno", text, path="program") from error
    if code:
        raise _ended(code)

    def role(act: Callable[[_Shared, random.Random, Counter[str]], None]) -> Role:
        def part(number: str, until: float) -> Counter[str]:
            count: Counter[str] = Counter()
            rng = random.Random(f"{seed}-{number}")  # noqa: S311
            while time.monotonic() < until:
                act(shared, rng, count)
            return count

        return part

    try:
        return play(
            [
                ("runner", role(_run)),
                ("runner", role(_run)),
                ("replacer", role(_replacer)),
                ("meddler", role(_meddle)),
            ],
            seconds,
            timeout,
        )
    finally:
        for name in os.listdir(root):
            if name.startswith("program"):
                os.unlink(f"{root}/{name}")


def _replacer(shared: _Shared, rng: random.Random, count: Counter[str]) -> None:
    version = shared.possible()[1] + 1
    if version < _VERSIONS:
        _replace(shared, rng, version)
        count["race replace"] += 1


def _replace(shared: _Shared, rng: random.Random, version: int) -> None:
    """Write a new version beside the old one and put it in its place."""
    new, size = shared.path + ".new", rng.choice(_SIZES)
    text = program.build(rng.randbytes(PAGE + 8) * (size // PAGE) + bytes(PAGE))[:size]
    text = program.build(text)  # the header names the size
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o755)
    try:
        chunk = rng.choice((1000, 64 << 10, PMD))
        for at in range(0, size, chunk):
            os.pwrite(fd, text[at : at + chunk], at)
        if rng.random() < 0.3:
            os.fsync(fd)
    finally:
        os.close(fd)
    shared.start(version, program.sums(text))
    if version > 1 and rng.random() < 0.3:
        os.unlink(shared.path)
    os.rename(new, shared.path)
    shared.finish(version)


def _run(shared: _Shared, rng: random.Random, count: Counter[str]) -> None:
    """Execute the program, and look at its text while things happen to the file."""
    low, _ = shared.possible()
    try:
        running = program.start(shared.path)
    except OSError as error:
        unlinked = error.errno == errno.ENOENT and low < shared.possible()[1]
        if unlinked or error.errno == errno.ETXTBSY:  # the meddler had it open just then
            return
        raise
    possible = {shared.answer(v): v for v in range(low, shared.possible()[1] + 1)}
    try:
        for _ in range(rng.randint(1, 6)):
            answer = running.sums(rng.random() < 0.5)
            if answer not in possible:
                raise _wrong(shared, running, answer, list(possible.values()))
            possible = {answer: possible[answer]}  # from now on the same for ever
            count["race sum"] += 1
            count[LOOKS] += 1
            count[HUGE] += folios.pmd_mapped(running.pid) > 0
            _disturb(f"/proc/{running.pid}/exe", f"{shared.path}.copy{running.pid}", rng)
            count["race disturb"] += 1
    finally:
        code = running.ended()
    if code:
        raise _ended(code)
    count["race run"] += 1


def _ended(code: int) -> Difference:
    return Difference("crash", f"race: a program ended with {code}, not with 0", path="program")


def _wrong(
    shared: _Shared, running: program.Running, answer: bytes, versions: list[int]
) -> Difference:
    if not answer:
        return Difference("crash", "race: a running program died", path="program")
    kind, text = "garbage", "its text is that of no version"
    for version in range(1, shared.possible()[1] + 1):
        if shared.answer(version) == answer:
            kind, text = "stale" if version < versions[0] else "misplaced", f"it is {version}"
    return Difference(
        kind,
        f"race: a program of {os.stat(f'/proc/{running.pid}/exe').st_size} bytes that must be "
        f"version {' or '.join(map(str, versions))}: {text}",
        path="program",
        expected=shared.answer(versions[0]).hex(" ", 8),
        found=answer.hex(" ", 8),
    )


def _disturb(exe: str, copy: str, rng: random.Random) -> None:
    """Something that must not change what a running program sees of itself."""
    what = rng.randrange(3)
    if what == 0:
        try:
            os.close(os.open(exe, os.O_RDWR))
        except OSError as error:
            if error.errno == errno.ETXTBSY:
                return
            raise
        raise Difference("errno", "race: a running program was opened for writing", path="program")
    source = os.open(exe, os.O_RDONLY)
    try:
        size = os.fstat(source).st_size
        if what == 1:
            os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
            return
        target = os.open(copy, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o755)
        try:
            os.sendfile(target, source, 0, size)
            os.ftruncate(target, rng.choice((0, PAGE + 1, size // 2, size - 1)))
        finally:
            os.close(target)
            os.unlink(copy)
    finally:
        os.close(source)


def _meddle(shared: _Shared, rng: random.Random, count: Counter[str]) -> None:
    """Open the file for writing (where it does not run), change its mode, collapse its text."""
    time.sleep(0.002)
    with contextlib.suppress(FileNotFoundError):
        what = rng.randrange(3)
        if what == 0:
            try:
                os.close(os.open(shared.path, os.O_RDWR))
            except OSError as error:
                if error.errno != errno.ETXTBSY:
                    raise
        elif what == 1:
            os.chmod(shared.path, rng.choice((0o755, 0o700, 0o711)))
        else:
            _collapse(shared.path)
        count["race meddle"] += 1


def _collapse(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        address = syscalls.map_file(fd, PMD, 5, mmap.MAP_PRIVATE, 0)
        with contextlib.suppress(OSError):  # advice may be refused
            syscalls.madvise(address, PMD, syscalls.MADV_COLLAPSE)
        syscalls.unmap(address, PMD)
    finally:
        os.close(fd)
