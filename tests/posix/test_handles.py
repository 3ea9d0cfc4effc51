"""File handles, which NFS servers and backup programs keep: name_to_handle_at(2), open_by_handle_at(2)."""

import ctypes
import errno
import os
import struct
from pathlib import Path

import pytest

from tests.mounts import Mount, Mounts

AT_FDCWD = -100
HEADER = struct.Struct("Ii")  # struct file_handle: handle_bytes, handle_type
MAX_HANDLE_SZ = 128

libc = ctypes.CDLL(None, use_errno=True)


def handle_of(path: Path) -> bytes:
    """The file handle of a path."""
    handle = ctypes.create_string_buffer(HEADER.pack(MAX_HANDLE_SZ, 0), HEADER.size + MAX_HANDLE_SZ)
    mount_id = ctypes.c_int()
    got = libc.name_to_handle_at(AT_FDCWD, os.fsencode(path), handle, ctypes.byref(mount_id), 0)
    if got < 0:
        raise OSError(ctypes.get_errno(), "name_to_handle_at")
    return handle.raw


def open_handle(mount: Mount, handle: bytes) -> int:
    """A descriptor of what a handle names."""
    root = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd: int = libc.open_by_handle_at(root, ctypes.create_string_buffer(handle), os.O_RDONLY)
    finally:
        os.close(root)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "open_by_handle_at")
    return fd


def test_a_handle_outlives_the_mount_and_never_names_another_file(mounts: Mounts) -> None:
    mount = mounts.make()
    directory = mount.path / "one/two"
    directory.mkdir(parents=True)
    file = directory / "file"
    file.write_text("content")
    of_file, of_directory = handle_of(file), handle_of(directory)
    mount.unmount()
    mount.mount()

    fd = open_handle(mount, of_directory)  # which nobody has looked up in this mount
    assert os.readlink(f"/proc/self/fd/{fd}") == str(directory)
    assert os.listdir(fd) == ["file"]
    os.close(fd)
    fd = open_handle(mount, of_file)
    assert os.read(fd, 100) == b"content"
    file.unlink()
    os.close(fd)
    mount.unmount()
    mount.mount()
    file.write_text("another")
    with pytest.raises(OSError) as e:
        open_handle(mount, of_file)
    assert e.value.errno == errno.ESTALE
