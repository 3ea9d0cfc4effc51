"""A FUSE connection for a moment: what the kernel offers at INIT, and whether it takes a backing file.

Its mount is in a mount namespace of its own, where nobody sees it and which takes it along. Needs
neither the companion nor libfuse.
"""

import ctypes
import errno
import fcntl
import os
import struct
import threading
from dataclasses import dataclass

from largefs.channel import protocol
from largefs.channel.protocol import IN_HEADER, PASSTHROUGH, InitIn, InitOut

_CLONE_NEWNS = 0x20000  # linux/sched.h
_MS_PRIVATE = 1 << 18  # linux/mount.h
_BACKING_OPEN = 0x4010E501  # FUSE_DEV_IOC_BACKING_OPEN, which takes a struct fuse_backing_map


def max_pages_limit() -> int | None:
    """fs.fuse.max_pages_limit, in pages; None before Linux 6.13, where it is MAX_MAX_PAGES."""
    try:
        with open("/proc/sys/fs/fuse/max_pages_limit", encoding="ascii") as f:
            return int(f.read())
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it."""

    offered: int | None = None
    """INIT flags, 64 bits; None where there was no connection."""
    error: int = 0
    """The errno that kept the file from being registered; 0 as well where passthrough is not on offer."""

    @property
    def registered(self) -> bool:
        """Whether the file was taken as a backing file."""
        return self.offered is not None and bool(self.offered & PASSTHROUGH) and not self.error


def connect(fd: int) -> Trial:
    """Mount FUSE where nobody sees it, and register an open file there; takes CAP_SYS_ADMIN."""
    trial = Trial(error=errno.EIO)  # if the thread ends early

    def run() -> None:
        nonlocal trial
        try:
            trial = _connect(fd)
        except OSError as e:
            trial = Trial(error=e.errno or errno.EIO)

    # In a thread, for the mount namespace that it enters ends with it, and no other thread sees it.
    thread = threading.Thread(target=run, name="largefs-probe")
    thread.start()
    thread.join()
    return trial


def _connect(fd: int) -> Trial:
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        check(libc.unshare(_CLONE_NEWNS))
        # Any mountpoint will do: nobody else sees this mount, and nothing is looked up in it. The
        # root is none in a chroot.
        check(libc.mount(None, b"/proc", None, ctypes.c_ulong(_MS_PRIVATE), None))
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
        check(libc.mount(b"largefs-probe", b"/proc", b"fuse", ctypes.c_ulong(0), options))
        request = os.read(device, 1 << 16)
        _, _, unique, *_ = IN_HEADER.unpack_from(request)
        offered = InitIn.unpack(request[IN_HEADER.size :]).flags64
        if not offered & PASSTHROUGH:
            return Trial(offered)
        answer = InitOut(
            minor=40,
            max_write=1 << 17,
            max_stack_depth=1,  # on nothing stacked: an overlay's file does not tell who maps the one below
        ).with_flags64(protocol.INIT_EXT | PASSTHROUGH)
        os.write(device, protocol.reply(unique, answer.pack()))
        try:
            fcntl.ioctl(device, _BACKING_OPEN, struct.pack("=iIQ", fd, 0, 0))
        except OSError as e:
            return Trial(offered, e.errno or errno.EIO)
        return Trial(offered)
    finally:
        os.close(device)
