"""Alignment on a mount: what the import changed runs on 2 MiB pages, is reported, and can be undone."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.hugetext.test_mount import ENOUGH, at_work, coverage, imported
from tests.mounts import Mounts, largefs

pytestmark = pytest.mark.resident


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with gdb: a position-independent program that nobody linked for 2 MiB."""
    gdb = shutil.which("gdb") or pytest.skip("gdb is not installed")
    directory = tmp_path / "source"
    directory.mkdir()
    shutil.copy2(os.path.realpath(gdb), directory / "gdb")
    (directory / "broken").write_bytes((directory / "gdb").read_bytes()[: 5 << 20])
    (directory / "broken").chmod(0o755)
    return directory


def test_a_pie_runs_on_2_mib_pages(mounts: Mounts, source: Path) -> None:
    mount = imported(mounts, source, align="auto")
    before = json.loads(largefs("report", source / "gdb", "--json").stdout)["file"]
    after = json.loads(largefs("report", mount.path / "gdb", "--json").stdout)["file"]
    assert before["now"]["eligible"] == 0
    assert after["original"] == before["now"]
    assert after["now"]["eligible"] >= 4 << 20
    assert "p_align" in after["alignment"]
    assert after["now"]["build_id"] == before["now"]["build_id"]
    with at_work(mount.path / "gdb", "-q", "-nx", "/bin/true") as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"print 6*7\ninfo line main\necho done\\n\n")
        child.stdin.flush()
        while b"done" not in (line := child.stdout.readline()):
            assert line, "gdb ended"
        touched, share = coverage(child.pid, mount.path)
        assert touched >= 4 << 20
        assert share >= ENOUGH


def test_export_gives_the_first_bytes(mounts: Mounts, source: Path, tmp_path: Path) -> None:
    os.setxattr(source / "gdb", "user.colour", b"green")
    os.chown(source / "gdb", 1234, 2345)
    (source / "gdb").chmod(0o2711)
    mount = imported(mounts, source, align="auto")
    assert (mount.path / "gdb").read_bytes() != (source / "gdb").read_bytes()
    assert (mount.path / "broken").read_bytes() == (source / "broken").read_bytes()
    largefs("export", "--original", mount.path / "gdb", tmp_path / "one")
    assert (tmp_path / "one/gdb").read_bytes() == (source / "gdb").read_bytes()
    one, original = (tmp_path / "one/gdb").stat(), (source / "gdb").stat()
    assert (one.st_mode, one.st_uid, one.st_gid) == (0o102711, 1234, 2345)
    assert one.st_mtime_ns == original.st_mtime_ns
    assert os.getxattr(tmp_path / "one/gdb", "user.colour") == b"green"
    said = largefs("export", "--original", mount.path / "broken", tmp_path / "one", code=1).stderr
    assert "it is the original" in said
    mount.unmount()
    largefs("export", mount.store, tmp_path / "all")
    assert not subprocess.getoutput(f"diff -r {source} {tmp_path / 'all'}")
    again = largefs("import", source, mount.store).stdout
    assert ", 0 B copied" in again


def test_a_file_that_is_written_is_the_original(
    mounts: Mounts, source: Path, tmp_path: Path
) -> None:
    mount = imported(mounts, source, align="auto")
    with open(mount.path / "gdb", "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"!")
    written = (mount.path / "gdb").read_bytes()
    said = largefs("export", "--original", mount.path / "gdb", tmp_path / "one", code=1).stderr
    assert "it is the original" in said
    mount.unmount()
    largefs("export", mount.store, tmp_path / "all")
    assert (tmp_path / "all/gdb").read_bytes() == written
