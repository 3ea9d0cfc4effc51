"""A real tree through import, mount and export: nothing of it is lost."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from tests.mounts import Mounts, largefs

Entry = tuple[object, ...]


def metadata(top: Path) -> dict[bytes, Entry]:
    """Everything lstat and the xattrs say of each name, and the groups of hard links."""
    root = os.fsencode(top)
    names = [root]
    for directory, directories, files in os.walk(root):
        names += [os.path.join(directory, n) for n in (*directories, *files)]
    first: dict[tuple[int, int], bytes] = {}
    found = {}
    for name in sorted(names):
        st = os.lstat(name)
        path = name[len(root) :]
        is_directory = stat.S_ISDIR(st.st_mode)
        found[path] = (
            oct(st.st_mode),
            st.st_uid,
            st.st_gid,
            st.st_nlink,
            0 if is_directory else st.st_size,
            st.st_rdev,
            st.st_mtime_ns,
            first.setdefault((st.st_dev, st.st_ino), path),
            {
                x: os.getxattr(name, x, follow_symlinks=False)
                for x in os.listxattr(name, follow_symlinks=False)
            },
            os.readlink(name) if stat.S_ISLNK(st.st_mode) else None,
        )
    return found


def differences(a: Path, b: Path) -> list[str]:
    """What `diff -r --no-dereference` says, but that it cannot compare device nodes and FIFOs."""
    command = ["diff", "-r", "--no-dereference", a, b]
    said = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    same = r"File .* is a (fifo|(?:block|character) special file) while file .* is a \1"
    return [line for line in said.splitlines() if not re.fullmatch(same, line)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory of Debian's, and beside it one of everything that a filesystem can hold."""
    top = tmp_path / "tree"
    top.mkdir()
    subprocess.run(["cp", "-a", "/usr/lib/gcc", "/usr/share/zoneinfo", top], check=True)
    odd = top / "odd"
    odd.mkdir()
    (odd / "empty").touch()
    (odd / "file").write_bytes(b"content")
    os.link(odd / "file", odd / "link")
    os.link(odd / "file", top / "zoneinfo" / "link")
    os.symlink("/nowhere/at all", odd / "symlink")
    os.link(odd / "symlink", odd / "symlink2", follow_symlinks=False)
    os.mkfifo(odd / "fifo", 0o604)
    os.mknod(odd / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(odd / "disk", stat.S_IFBLK | 0o660, os.makedev(7, 300))
    with open(odd / "holes", "wb") as f:
        f.seek(9 << 20)
        f.write(b"data")
        f.truncate(123 << 20)
    os.mkdir(os.fsencode(odd) + b"/not \xff utf-8\n")
    (odd / "suid").touch()
    os.chown(odd / "suid", 1234, 2345)
    os.chmod(odd / "suid", 0o6755)
    os.chmod(odd, 0o3751)
    os.setxattr(odd / "file", "user.colour", b"\x00green")
    os.setxattr(odd / "file", "trusted.x", b"1")
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(odd / "empty", "security.capability", capability)
    subprocess.run(["setfacl", "-m", "u:daemon:rx,d:g:nogroup:r", odd], check=True)
    os.utime(odd / "file", ns=(1, 1234567890_987654321))
    os.utime(odd / "symlink", ns=(5, 7), follow_symlinks=False)
    os.utime(odd, ns=(3, 1_500_000_000_000_000_001))
    return top


def test_import_mount_and_export_keep_everything(
    mounts: Mounts, tree: Path, tmp_path: Path
) -> None:
    before = metadata(tree)
    store = tmp_path / "store"
    largefs("mkfs", store)
    largefs("import", "--align", "off", tree, store)
    mount = mounts.make(store=store)
    assert not differences(tree, mount.path)
    assert metadata(mount.path) == before
    holes = os.stat(mount.path / "odd/holes")
    assert holes.st_blocks * 512 < 1 << 20
    mount.unmount()
    largefs("export", store, tmp_path / "exported")
    assert not differences(tree, tmp_path / "exported")
    assert metadata(tmp_path / "exported") == before
    assert os.stat(tmp_path / "exported/odd/holes").st_blocks * 512 < 1 << 20


def test_second_import_brings_up_to_date(mounts: Mounts, tree: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    largefs("mkfs", store)
    largefs("import", "--align", "off", tree, store)
    said = largefs("import", "--align", "off", tree, store).stdout
    assert ", 0 B copied" in said
    (tree / "odd/file").write_bytes(b"other content")
    (tree / "odd/new").write_bytes(b"new")
    os.unlink(tree / "odd/symlink")
    os.symlink("elsewhere", tree / "odd/symlink")
    os.chmod(tree / "odd/empty", 0o640)
    os.removexattr(tree / "odd/empty", "security.capability")
    largefs("import", "--align", "off", tree, store)
    mount = mounts.make(store=store)
    assert metadata(mount.path) == metadata(tree)
    assert not differences(tree, mount.path)


def test_copying_into_the_mount_and_out(mounts: Mounts, tree: Path, tmp_path: Path) -> None:
    """What a user does instead of an import: cp -a."""
    mount = mounts.make()
    subprocess.run(["cp", "-a", tree, mount.path / "copy"], check=True)
    assert metadata(mount.path / "copy") == metadata(tree)
    mount.unmount()
    mount.mount()
    assert metadata(mount.path / "copy") == metadata(tree)
    assert not differences(tree, mount.path / "copy")
    subprocess.run(["rm", "-r", mount.path / "copy"], check=True)
    assert not os.listdir(mount.path)
    assert os.stat(mount.path).st_nlink == 2
