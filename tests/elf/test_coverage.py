"""Aligned programs get 2 MiB pages: on a plain ext4 or xfs, once their text has been warmed, and on a mount.

What alignment promises is shown without largefs first, and beside it the same binaries unaligned, which
get none though they are just as warm. Then the same programs are imported, and run from the mount.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from largefs.hugetext import elf
from largefs.hugetext.eligible import Range, describe, text_ranges
from tests.elf.files import opened
from tests.elf.overlay import Roots
from tests.elf.smaps import PMD, Count, count
from tests.hugetext.test_mount import imported
from tests.mounts import Mounts

pytestmark = [
    pytest.mark.timeout(1200),  # the first run downloads
    pytest.mark.resident,
]

MADV_HUGEPAGE = 14


def warm(path: Path, ranges: list[Range]) -> float:
    """Read these parts of a file in PMD folios; the share that the kernel could then map by PMDs.

    Drop what is cached, map it with the hint, touch it. Where a free 2 MiB page was lacking, as
    on a machine that is busy with small files, have the kernel make some and try again.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        for _ in range(5):
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            share = touch(fd, path, ranges)
            if share == 1.0:
                break
            Path("/proc/sys/vm/compact_memory").write_text("1")
        return share
    finally:
        os.close(fd)


def touch(fd: int, path: Path, ranges: list[Range]) -> float:
    prot = mmap.PROT_READ | mmap.PROT_EXEC
    mapped = 0
    for offset, length in ranges:
        with mmap.mmap(fd, length, mmap.MAP_PRIVATE, prot, offset=offset) as text:
            text.madvise(MADV_HUGEPAGE)
            for at in range(0, length, PMD):
                text[at]
            mapped += count(os.getpid(), str(path)).mapped
    return mapped / sum(r.length for r in ranges)


@contextmanager
def running(root: Path, home: Path, *argv: str, system: Path | None = None) -> Iterator[int]:
    """The program at work for as long as the test looks at it, with the libraries of `system`.

    By default those of `root`, where the program is.
    """
    libraries = (system or root) / "usr/lib/x86_64-linux-gnu"
    environment = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "LD_LIBRARY_PATH": f"{libraries}:{libraries}/pulseaudio",
    }
    program = subprocess.Popen(
        [str(root / argv[0]), *argv[1:]],
        env=environment,
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield program.pid
    finally:
        os.killpg(program.pid, 9)
        program.wait()


def steady(look: Callable[[], Count], touched: int) -> Count:
    """Look until the program has loaded its text, touched so much of it, and touches no more."""
    last = look()
    for _ in range(60):
        time.sleep(1)
        now = look()
        if now == last and now.text and now.touched >= touched:
            return now
        last = now
    return last


BROWSERS = {
    "usr/lib/chromium/chromium": (
        "usr/lib/chromium/chromium",
        *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"),
        "about:blank",
    ),
    "usr/lib/firefox-esr/libxul.so": (
        "usr/lib/firefox-esr/firefox-esr",
        *("--headless", "--no-remote", "--profile", ".", "about:support"),
    ),
}


@pytest.mark.parametrize("file", BROWSERS, ids=["a PIE of lld", "a shared object of lld"])
def test_coverage(file: str, roots: Roots, tmp_path: Path) -> None:
    """No eligible text before; after, it is 0.9 of all, and what is touched is PMD-mapped."""
    if file not in roots.changed:
        pytest.skip(f"no {file} here, or its maker now aligns it")
    before, after = roots.before / file, roots.after / file
    with opened(before) as view:
        assert describe(view).eligible == 0
        everything = [Range(0, view.size // PMD * PMD)]
    with opened(after) as view:
        assert describe(view).eligible >= 0.9 * describe(view).text
        ranges = text_ranges(elf.read(view), view.size)
    share = min(warm(before, everything), warm(after, ranges))
    print(f"{file}: {share:.3f} is in 2 MiB folios")
    if share < 0.95:
        pytest.skip(f"only {share:.2f} of the text went into 2 MiB folios: memory, or filesystem")
    with running(roots.after, tmp_path, *BROWSERS[file]) as pid:
        counted = steady(lambda: count(pid, str(after)), 8 * PMD)
    print(f"{file}: {counted}, coverage {counted.coverage:.3f}")
    assert counted.eligible >= 0.9 * counted.text
    assert counted.touched >= 8 * PMD
    assert counted.coverage >= 0.95
    with running(roots.before, tmp_path, *BROWSERS[file]) as pid:
        unaligned = steady(lambda: count(pid, str(before)), 0)
    assert unaligned.text == counted.text and unaligned.mapped == 0


@pytest.mark.parametrize("file", BROWSERS, ids=["a PIE of lld", "a shared object of lld"])
def test_coverage_on_a_mount(file: str, roots: Roots, mounts: Mounts, tmp_path: Path) -> None:
    """Imported as Debian ships it, and run from the mount with a cold cache: nothing else is done."""
    if file not in roots.changed:
        pytest.skip(f"no {file} here, or its maker now aligns it")
    directory = Path(file).parent
    source = tmp_path / "source"
    (source / directory).parent.mkdir(parents=True)
    subprocess.run(["cp", "-a", roots.before / directory, source / directory], check=True)
    mount = imported(mounts, source, align="auto")
    after = mount.path / file
    with opened(after) as view:
        assert describe(view).eligible >= 0.9 * describe(view).text
    with running(mount.path, tmp_path, *BROWSERS[file], system=roots.before) as pid:
        counted = steady(lambda: count(pid, str(after)), 8 * PMD)
    print(f"{file}: {counted}, coverage {counted.coverage:.3f}")
    assert counted.eligible >= 0.9 * counted.text
    assert counted.touched >= 8 * PMD
    assert counted.coverage >= 0.95
