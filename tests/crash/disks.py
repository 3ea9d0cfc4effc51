"""Small disks for tests: filesystems in image files, that can fill up and lose power.

Power is lost as xfstests does it (its `godown`): an ioctl makes the filesystem stop at once, without
writing its journal or its dirty pages; then it is mounted again and replays what journal there is. What
was not flushed is gone, what was is there. What a disk's own volatile cache may lose on top, in any
order, is not simulated: that takes device-mapper's log-writes, which few kernels of test machines have.
"""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounts import is_mounted

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32)
NO_LOG_FLUSH = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH, XFS_FSOP_GOING_FLAGS_NOLOGFLUSH

MKFS = {
    "ext2": ["mkfs.ext2", "-q", "-m", "0"],  # has no fallocate(2)
    "ext4": ["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0"],
    "xfs": ["mkfs.xfs", "-q"],
}


@dataclass
class Disk:
    """A filesystem in an image file, mounted at `path`."""

    image: Path
    path: Path

    def mount(self) -> None:
        """Mount it; a journal is replayed."""
        options = "loop,nouuid" if self.image.stem == "xfs" else "loop"
        subprocess.run(["mount", "-o", options, self.image, self.path], check=True)

    def lose_power(self) -> None:
        """Stop at once; nothing can be read or written until `restore_power`."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def restore_power(self) -> None:
        """Mount it as after a reboot. Nobody may use it any more.

        What is mounted is a copy of the disk: the filesystem that lost power may live on in the mount
        namespace of somebody who has nothing to do with this, and would be found again by its device.
        """
        subprocess.run(["umount", "-l", self.path], check=True)
        after = self.image.with_suffix(".after")
        subprocess.run(["cp", "--sparse=always", self.image, after], check=True)
        after.replace(self.image)
        self.mount()

    def fill(self, leave: int = 0) -> Path:
        """Take all room but `leave` bytes with a file that `unlink` gives back."""
        ballast = self.path / "ballast"
        with ballast.open("wb") as f:
            room = os.statvfs(self.path)
            size = room.f_bavail * room.f_frsize - leave
            with contextlib.suppress(OSError):
                while size > 0:
                    piece = min(size, 1 << 20)
                    os.posix_fallocate(f.fileno(), os.fstat(f.fileno()).st_size, piece)
                    size -= piece
                if not leave:
                    while True:
                        os.posix_fallocate(f.fileno(), os.fstat(f.fileno()).st_size, 4096)
        os.sync()
        return ballast


@contextlib.contextmanager
def _in_memory(directory: Path, size: int) -> Iterator[Disk]:
    made = Disk(directory / "no image", directory / "tmpfs")
    made.path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", made.path], check=True)
    try:
        yield made
    finally:
        subprocess.run(["umount", "-l", made.path], check=True)


@contextlib.contextmanager
def disk(directory: Path, kind: str, size: int) -> Iterator[Disk]:
    """A disk of `size` bytes with a filesystem of a kind; skips the test where that cannot be.

    One of tmpfs has no image, so it cannot lose power.
    """
    if kind == "tmpfs":
        with _in_memory(directory, size) as made:
            yield made
        return
    if not shutil.which(MKFS[kind][0]):
        pytest.skip(f"no {MKFS[kind][0]}")
    made = Disk(directory / f"{kind}.image", directory / kind)
    made.path.mkdir()
    with made.image.open("wb") as f:
        f.truncate(size)
    subprocess.run([*MKFS[kind], made.image], check=True)
    try:
        made.mount()
    except subprocess.CalledProcessError:
        pytest.skip(f"cannot mount {kind} on a loop device here")
    try:
        yield made
    finally:
        while is_mounted(made.path):  # Path.is_mount() says no where the power is lost
            subprocess.run(["umount", "-l", made.path], check=True)
        made.image.unlink()
