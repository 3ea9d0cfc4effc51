"""Servers that do not set the flag: libfuse's and pyfuse3's own examples, unchanged.

The same work is done on each of them; what every call returned goes into /run/lab/results, where
the lab compares the kernels with the series with the stock one. No folio may be larger than a page.
"""

import errno
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel import pages
from tests.kernel.conftest import GUEST, SLOW
from tests.kernel.pages import PAGE, PMD
from tests.kernel.programs import program

PYFUSE3 = Path(os.environ.get("LARGEFS_LAB_PYFUSE3", "/nonexistent")) / "examples"

SERVERS: dict[str, Callable[[Path, Path], list[str]]] = {
    "passthrough_ll": lambda src, at: [
        *(str(program("example_ll")), "-f", "-o", f"source={src},cache=always", str(at))
    ],
    "passthrough_ll-writeback": lambda src, at: [
        *(str(program("example_ll")), "-f"),
        *("-o", f"source={src},cache=always,writeback", str(at)),
    ],
    "passthrough_fh": lambda src, at: [
        *(str(program("example_fh")), "-f"),
        *("-o", f"modules=subdir,subdir={src},allow_other", str(at)),
    ],
    "pyfuse3-passthroughfs": lambda src, at: [
        *(sys.executable, str(PYFUSE3 / "passthroughfs.py"), str(src), str(at))
    ],
    "pyfuse3-tmpfs": lambda src, at: [
        *(sys.executable, str(PYFUSE3 / "tmpfs.py"), str(at)),
    ],
}


@contextmanager
def served(name: str, tmp_path: Path) -> Iterator[Path]:
    """Mount an example; yields the mountpoint."""
    if name.startswith("pyfuse3") and not PYFUSE3.exists():
        pytest.skip("pyfuse3's examples (of its source distribution) are not here")
    src, at = tmp_path / "src", tmp_path / "mnt"
    src.mkdir()
    at.mkdir()
    try:
        command = SERVERS[name](src, at)
    except FileNotFoundError as e:
        pytest.skip(f"{e} is not here: Debian's libfuse3-dev has it")
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60 * SLOW
        while not os.path.ismount(at):
            assert server.poll() is None, "the example ended before it was mounted"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield at
        subprocess.run(["umount", at], check=True)
        server.wait(60)
    finally:
        server.kill()
        server.wait()
        subprocess.run(["umount", "-l", at], check=False, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("name", SERVERS)
def test_example(name: str, tmp_path: Path) -> None:
    with served(name, tmp_path) as at:
        log = "\n".join(work(at)) + "\n"
    print(log)
    if GUEST:
        Path(f"/run/lab/results/server-{name}.txt").write_text(log)


def work(at: Path) -> Iterator[str]:
    """Do the same things on any filesystem; yields a line for the outcome of each."""

    def attempt(what: str, call: Callable[[], object]) -> str:
        try:
            result = call()
        except OSError as e:
            result = errno.errorcode.get(e.errno or 0, str(e))
        if isinstance(result, bytes):
            result = f"{len(result)} bytes, {hashlib.sha256(result).hexdigest()[:16]}"
        return f"{what}: {result}"

    text = at / "text"
    data = pages.pattern(3 * PMD + 1000)
    yield attempt("write", lambda: text.write_bytes(data))
    yield attempt("chmod", lambda: text.chmod(0o755))
    pages.drop_caches()
    yield attempt("read", text.read_bytes)
    yield attempt("map", lambda: mapped(text, mmap.PROT_READ))
    yield attempt("map text", lambda: mapped(text, mmap.PROT_READ | mmap.PROT_EXEC))
    assert pages.large_folios(text) == []
    for size in (3 * PMD, PMD + 10, PMD, 5 * PAGE + 1, 2 * PMD):
        yield attempt(f"truncate {size}", lambda size=size: os.truncate(text, size))
        yield attempt("read", text.read_bytes)
    with text.open("r+b") as f:
        for offset in (0, PMD - 1, 2 * PMD + 17):
            yield attempt("pwrite", lambda o=offset: os.pwrite(f.fileno(), b"x" * 70000, o))
        yield attempt("fsync", lambda: os.fsync(f.fileno()))
        yield attempt("punch", lambda: pages.fallocate(f.fileno(), 3, PMD - PAGE, 2 * PAGE))
        yield attempt("fallocate", lambda: pages.fallocate(f.fileno(), 0, 0, 3 * PMD))
        yield attempt("lseek hole", lambda: os.lseek(f.fileno(), 0, os.SEEK_HOLE))
    yield attempt("read", text.read_bytes)
    assert pages.large_folios(text) == []

    big = at / "bigtext"
    yield attempt("copy", lambda: shutil.copy(program("bigtext"), big) and None)
    yield attempt("run", lambda: subprocess.run([big], input=b"", capture_output=True).stdout)
    assert pages.large_folios(big) == []
    yield attempt("rename", lambda: os.rename(text, at / "other"))
    yield attempt("link", lambda: os.link(at / "other", at / "link"))
    yield attempt("symlink", lambda: os.symlink("other", at / "symlink"))
    for entry in sorted(os.listdir(at)):
        st = os.lstat(at / entry)
        yield f"{entry}: {st.st_mode:o} {st.st_nlink} {st.st_size} {st.st_blksize}"
    yield attempt("unlink", lambda: os.unlink(at / "other"))
    yield attempt("mkdir", lambda: os.mkdir(at / "dir"))
    yield attempt("rmdir", lambda: os.rmdir(at / "dir"))


def mapped(path: Path, protection: int) -> bytes:
    """The file's bytes through a private mapping."""
    with (
        path.open("rb") as f,
        mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=protection) as m,
    ):
        return m[:]
