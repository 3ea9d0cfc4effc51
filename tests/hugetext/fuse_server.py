"""The smallest FUSE server that these tests need: one flat directory, read-only, by raw protocol.

    fuse_server.py SOURCE MOUNTPOINT ROUTE

ROUTE is what `user.largefs.route` of every file says, and decides how files are read:

    passthrough   every open hands the kernel the file of SOURCE as its backing file
    none          the server answers reads
    foreign       as none, but without that xattr, as any FUSE filesystem
    slow          as none, each read 50 ms late
    failing       as none, but every read is an I/O error

Prints `ready` when mounted; ends when unmounted. Needs root. Layouts: include/uapi/linux/fuse.h,
protocol 7.40 and later.
"""

import ctypes
import errno
import fcntl
import os
import struct
import sys
import time

LOOKUP, GETATTR, OPEN, READ, STATFS, RELEASE, GETXATTR, FLUSH, INIT = (
    1,
    3,
    14,
    15,
    17,
    18,
    22,
    25,
    26,
)
OPENDIR, RELEASEDIR, ACCESS, DESTROY = 27, 29, 34, 38
SILENT = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET want no reply
BACKING_OPEN = 0x4010E501  # FUSE_DEV_IOC_BACKING_OPEN
INIT_EXT, PASSTHROUGH = 1 << 30, 1 << 37
FOPEN_KEEP_CACHE, FOPEN_PASSTHROUGH = 1 << 1, 1 << 7
FOREVER = 10**9


def attributes(node: int, st: os.stat_result) -> bytes:
    times = int(st.st_atime), int(st.st_mtime), int(st.st_ctime)
    return struct.pack(
        "6Q10I",
        node,
        st.st_size,
        st.st_blocks,
        *times,
        0,
        0,
        0,
        st.st_mode,
        st.st_nlink,
        0,
        0,
        0,
        4096,
        0,
    )


def serve(source: str, mountpoint: str, route: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"fuse_server", mountpoint.encode(), b"fuse.largefs", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    nodes = {1: source}
    opened: dict[
        int, int
    ] = {}  # node to descriptor, kept open: all opens of an inode share one backing id
    backing: dict[int, int] = {}

    def answer(opcode: int, node: int, body: bytes) -> bytes:
        if opcode == INIT:
            flags = PASSTHROUGH | INIT_EXT if route == "passthrough" else 0
            low, high = flags & 0xFFFFFFFF, flags >> 32
            return struct.pack(
                "4I2H2I2H2I24x", 7, 40, 1 << 17, low, 12, 9, 1 << 20, 1, 256, 0, high, 1
            )
        if opcode == LOOKUP:
            path = os.path.join(source, os.fsdecode(body.rstrip(b"\0")))
            st = os.stat(path)
            nodes[st.st_ino] = path
            return struct.pack("4Q2I", st.st_ino, 0, FOREVER, FOREVER, 0, 0) + attributes(
                st.st_ino, st
            )
        if opcode == GETATTR:
            return struct.pack("Q2I", FOREVER, 0, 0) + attributes(node, os.stat(nodes[node]))
        if opcode == OPEN:
            if node not in opened:
                opened[node] = os.open(nodes[node], os.O_RDONLY)
                if route == "passthrough":
                    request = bytearray(struct.pack("iIQ", opened[node], 0, 0))
                    backing[node] = fcntl.ioctl(device, BACKING_OPEN, request)
            if route == "passthrough":
                return struct.pack("QIi", node, FOPEN_PASSTHROUGH, backing[node])
            return struct.pack("QIi", node, FOPEN_KEEP_CACHE, 0)
        if opcode == READ:
            if route == "failing":
                raise OSError(errno.EIO, "")
            if route == "slow":
                time.sleep(0.05)
            _, offset, size = struct.unpack_from("QQI", body)
            return os.pread(opened[node], size, offset)
        if opcode == GETXATTR:
            size = struct.unpack_from("I", body)[0]
            if body[8:].rstrip(b"\0") != b"user.largefs.route" or route == "foreign":
                raise OSError(errno.ENODATA, "")
            return route.encode() if size else struct.pack("2I", len(route), 0)
        if opcode == OPENDIR:
            return bytes(16)
        if opcode in (FLUSH, RELEASE, RELEASEDIR, ACCESS, DESTROY):
            return b""
        if opcode == STATFS:
            return bytes(80)
        raise OSError(errno.ENOSYS, "")

    print("ready", flush=True)
    while True:
        try:
            request = os.read(device, (1 << 20) + 4096)
        except OSError as e:
            if e.errno == errno.ENODEV:  # unmounted
                return
            if e.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                continue
            raise
        _, opcode, unique, node = struct.unpack_from("IIQQ", request)
        if opcode in SILENT:
            continue
        try:
            body, error = answer(opcode, node, request[40:]), 0
        except OSError as e:
            body, error = b"", -(e.errno or errno.EIO)
        os.write(device, struct.pack("IiQ", 16 + len(body), error, unique) + body)


if __name__ == "__main__":
    serve(*sys.argv[1:])
