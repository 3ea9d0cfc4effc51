"""The `collapse` route: text into 2 MiB folios by MADV_COLLAPSE, through the mount.

For kernels 6.1 to 7.1 with CONFIG_READ_ONLY_THP_FOR_FS, where nothing else gives a file of FUSE a 2 MiB
folio. The mapping goes through the mount and its pages are read from the daemon, so a helper process
does it: the daemon itself would wait for itself. Source: madvise(2), collapse_file() in mm/khugepaged.c.
"""

import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

from largefs.hugetext import warm
from largefs.hugetext.mappings import PMD

RETRIES = 20


class Helper:
    """The helper process, started when it is first needed; it ends when its input is closed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Its process id, whose opens must not be waited for; 0 if it does not run."""
        return self._process.pid if self._process else 0

    def collapse(self, path: bytes, ranges: Iterable[tuple[int, int]]) -> int:
        """Collapse (offset, length) ranges of a file; blocks. Returns the bytes collapsed.

        Raises OSError as open(2) does, or EIO if the helper is gone or was stopped.
        """
        with self._lock:
            if self._stopped:
                raise OSError(errno.EIO, "the helper process was stopped")
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "largefs.hugetext.collapse"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd="/",
                )
                if self._stopped:  # while it was started
                    self._process.kill()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            words = [path.hex(), *[f"{offset}:{length}" for offset, length in ranges]]
            try:
                self._process.stdin.write(" ".join(words) + "\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                answer = ""
        if not answer:
            raise OSError(errno.EIO, "the helper process is gone")
        kind, number = answer.split()
        if kind == "error":
            raise OSError(int(number), os.strerror(int(number)))
        return int(number)

    def stop(self) -> None:
        """End the helper for good, a collapse that runs too: nobody may be left to read for it."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()


def collapse(path: bytes, ranges: Iterable[tuple[int, int]]) -> int:
    """Collapse the whole 2 MiB blocks of (offset, length) ranges; returns the bytes collapsed.

    A block that cannot be collapsed (EAGAIN again and again; ENOMEM; EINVAL: a kernel without the
    route) is passed over. Raises OSError if the file cannot be opened or mapped.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    done = 0
    try:
        for offset, length in ranges:
            first = -(-offset // PMD) * PMD
            size = (offset + length) // PMD * PMD - first
            if size <= 0:
                continue
            with warm.mapped(fd, first, size, mmap.PROT_READ | mmap.PROT_EXEC) as start:
                for block in range(start, start + size, PMD):
                    done += _collapse_block(block)
    finally:
        os.close(fd)
    return done


def _collapse_block(address: int) -> int:
    """The bytes collapsed: PMD or none. EAGAIN says that a page was in use just then."""
    for _ in range(RETRIES):
        try:
            warm.madvise(address, PMD, warm.MADV_COLLAPSE)
        except OSError as e:
            if e.errno != errno.EAGAIN:
                break
            time.sleep(0.01)
        else:
            return PMD
    return 0


def main() -> None:
    """Serve requests: PATH-IN-HEX OFFSET:LENGTH… on a line, answered by `done BYTES` or `error ERRNO`."""
    for line in sys.stdin:
        path, *words = line.split()
        ranges = [(int(a), int(b)) for a, b in (w.split(":") for w in words)]
        try:
            answer = f"done {collapse(bytes.fromhex(path), ranges)}"
        except OSError as e:
            answer = f"error {e.errno}"
        print(answer, flush=True)


if __name__ == "__main__":
    main()
