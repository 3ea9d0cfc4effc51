"""Mounts, files in and out of the page cache, and an independent count of coverage."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from largefs.hugetext import coverage, warm

HERE = Path(__file__).parent
MIB = 1 << 20


@contextmanager
def mounted(*arguments: str) -> Iterator[None]:
    """mount(8) with `arguments`, the last of which is the mountpoint."""
    subprocess.run(["mount", *arguments], check=True)
    try:
        yield
    finally:
        # Processes that map files of it must have ended; lazily, so that a failed test leaves
        # nothing.
        subprocess.run(["umount", "--lazy", arguments[-1]], check=True)


def make_file(path: Path, size: int) -> Path:
    """A file on disk, not in the page cache."""
    with open(path, "wb") as f:
        f.write(os.urandom(MIB) * (size // MIB) + os.urandom(size % MIB))
        os.fsync(f.fileno())
    drop(path)
    return path


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def warmed(path: Path) -> Path:
    """Warm a whole file and see that all of it got 2 MiB folios."""
    done = warm.warm_file(path)
    assert done.in_pmd == done.wanted > 0
    return path


def text_of(pid: int, prefix: Path) -> coverage.Text:
    """What `largefs report` counts for the mappings of files at and below `prefix`, checked by the
    independent count."""
    report = coverage.collect([pid], lambda mapping: mapping.path.startswith(str(prefix)))
    assert not report.skipped
    text = coverage.total(process.text for process in report.processes)
    counted = subprocess.run(
        [sys.executable, HERE / "count_coverage.py", "--file", prefix, str(pid)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    total = counted.splitlines()[-1].split()
    assert total[-1] == "total"
    assert [int(n) for n in total[:3]] == [text.eligible, text.touched, text.pmd_mapped]
    shown = "-" if text.coverage is None else f"{text.coverage:.3f}"
    assert total[3] == shown
    check_sums(text)
    return text


def check_sums(text: coverage.Text) -> None:
    """Every byte is accounted for once."""
    untouched = text.eligible - text.touched
    assert text.length == text.pmd_mapped + untouched + sum(text.why.values())
