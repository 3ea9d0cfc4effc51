"""Warm-up: what it brings in, what it leaves alone, and how it ends when something goes wrong."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from largefs.hugetext import warm
from largefs.hugetext.warm import CHUNK, Warmed, warm_file, warm_range
from tests.hugetext.support import MIB, drop, make_file

pytestmark = pytest.mark.resident


def test_cold_then_warm(disk: Path) -> None:
    path = make_file(disk / "file", 5 * MIB)
    assert warm_file(path) == Warmed(wanted=4 * MIB, in_pmd=4 * MIB, already=0)
    assert warm_file(path) == Warmed(wanted=4 * MIB, in_pmd=4 * MIB, already=4 * MIB)


def test_file_just_written(disk: Path) -> None:
    """Dirty pages are written back, not lost."""
    path = disk / "file"
    content = os.urandom(4 * MIB)
    path.write_bytes(content)
    assert warm_file(path).in_pmd == 4 * MIB
    assert path.read_bytes() == content
    drop(path)
    assert path.read_bytes() == content


def test_file_cached_in_small_folios(disk: Path) -> None:
    path = make_file(disk / "file", 4 * MIB)
    with open(path, "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, 4 * MIB, 4096):
            os.pread(f.fileno(), 4096, offset)
    assert warm_file(path) == Warmed(wanted=4 * MIB, in_pmd=4 * MIB, already=0)


@pytest.mark.parametrize(
    ("offset", "length", "wanted"),
    [
        (0, 0, 0),
        (0, 2 * MIB - 1, 0),
        (1, 4 * MIB - 1, 2 * MIB),
        (2 * MIB, 2 * MIB, 2 * MIB),
        (0, 1 << 40, 6 * MIB),
        (8 * MIB, 2 * MIB, 0),
    ],
)
def test_only_whole_blocks_below_eof(disk: Path, offset: int, length: int, wanted: int) -> None:
    path = make_file(disk / "file", 7 * MIB)
    done = warm_file(path, [(offset, length)])
    assert done == Warmed(wanted, wanted, 0)


def test_mapped_small_pages_stay_and_are_told(disk: Path, map_file: Callable[..., int]) -> None:
    path = make_file(disk / "file", 4 * MIB)
    map_file(path, 0, 2 * MIB, 0, "touch")
    assert warm_file(path) == Warmed(wanted=4 * MIB, in_pmd=2 * MIB, already=0)


def test_cancelled_between_chunks(disk: Path) -> None:
    path = make_file(disk / "file", 2 * CHUNK)
    answers = iter([False, True])
    assert warm_file(path, cancelled=lambda: next(answers)).wanted == CHUNK


def test_truncated_between_chunks(disk: Path) -> None:
    path = make_file(disk / "file", 2 * CHUNK)
    asked = []

    def truncate_second_time() -> bool:
        asked.append(True)
        if len(asked) == 2:
            os.truncate(path, CHUNK + 3 * MIB)
        return False

    assert warm_file(path, cancelled=truncate_second_time).wanted == CHUNK + 2 * MIB


def test_truncated_all_the_time(disk: Path) -> None:
    """No signal, no error, whatever the moment."""
    path = make_file(disk / "file", 16 * MIB)
    ended = threading.Event()

    def shrink_and_grow() -> None:
        while not ended.is_set():
            os.truncate(path, 3 * MIB)
            os.truncate(path, 16 * MIB)

    thread = threading.Thread(target=shrink_and_grow)
    thread.start()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            try:
                assert warm_file(path).wanted <= 16 * MIB
            except OSError as e:  # truncated and grown again at once looks like an unreadable page
                assert e.errno == errno.EIO
    finally:
        ended.set()
        thread.join()


def test_io_error(disk: Path, serve: Callable[[Path, str], Path]) -> None:
    make_file(disk / "file", 4 * MIB)
    with pytest.raises(OSError) as caught:
        warm_file(serve(disk, "failing") / "file")
    assert caught.value.errno == errno.EIO


def test_other_threads_run_meanwhile(disk: Path, serve: Callable[[Path, str], Path]) -> None:
    make_file(disk / "file", 2 * MIB)
    path = serve(disk, "slow") / "file"
    longest = 0.0
    thread = threading.Thread(target=warm_file, args=(path,))
    begin = time.monotonic()
    thread.start()
    while thread.is_alive():
        before = time.monotonic()
        time.sleep(0.01)
        longest = max(longest, time.monotonic() - before)
    assert time.monotonic() - begin >= 0.5  # one system call, waiting for a dozen reads or more
    assert longest < 0.4


def test_special_files_are_refused(disk: Path) -> None:
    with pytest.raises(OSError):
        warm_file(disk)
    os.mkfifo(disk / "fifo")
    with pytest.raises(OSError):
        warm_file(disk / "fifo")
    make_file(disk / "file", MIB)
    (disk / "link").symlink_to("file")
    with pytest.raises(OSError):
        warm_file(disk / "link")


def test_nothing_stays_mapped_or_open(disk: Path) -> None:
    path = make_file(disk / "file", 4 * MIB)
    descriptors = os.listdir("/proc/self/fd")
    fd = os.open(path, os.O_RDONLY)
    warm_range(fd, 0, 4 * MIB)
    os.close(fd)
    assert os.listdir("/proc/self/fd") == descriptors
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_warmed_adds() -> None:
    assert warm.Warmed(1, 2, 3) + warm.Warmed(10, 20, 30) == warm.Warmed(11, 22, 33)
