"""A small filesystem in memory with one fault: python faulty.py MOUNTPOINT FAULT.

Each fault comes in about one of five cases that can show it, chosen by offset and size and not by
chance, so that a replay meets it again. With the fault ``none`` it is a correct filesystem.
"""

import errno
import os
import stat
import sys

import pyfuse3
import trio

RARE = 5


def chosen(number: int) -> bool:
    return (number * 0x9E3779B1 >> 12) % RARE == 0


class Faulty(pyfuse3.Operations):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.made = pyfuse3.ROOT_INODE
        self.data = {}  # inode: bytearray, which may be longer than the size
        self.size = {}
        self.mode = {pyfuse3.ROOT_INODE: stat.S_IFDIR | 0o755}
        self.children = {pyfuse3.ROOT_INODE: {}}

    def has(self, fault, number=0):
        return self.fault == fault and chosen(number)

    # -- names

    def attributes(self, inode):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = self.mode[inode]
        entry.st_nlink = 1
        entry.st_size = self.size.get(inode, 0)
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        return entry

    async def getattr(self, inode, ctx=None):
        return self.attributes(inode)

    async def lookup(self, parent, name, ctx=None):
        if name not in self.children[parent]:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes(self.children[parent][name])

    def add(self, parent, name, mode):
        self.made += 1
        self.mode[self.made] = mode
        self.children[parent][name] = self.made
        return self.made

    async def mkdir(self, parent, name, mode, ctx):
        inode = self.add(parent, name, stat.S_IFDIR | mode)
        self.children[inode] = {}
        return self.attributes(inode)

    async def create(self, parent, name, mode, flags, ctx):
        inode = self.add(parent, name, stat.S_IFREG | mode)
        self.data[inode], self.size[inode] = bytearray(), 0
        return pyfuse3.FileInfo(fh=inode), self.attributes(inode)

    async def unlink(self, parent, name, ctx):
        del self.children[parent][name]

    rmdir = unlink

    async def rename(self, parent, name, new_parent, new_name, flags, ctx):
        self.children[new_parent][new_name] = self.children[parent][name]
        if self.fault != "rename-leaves-old-name":
            del self.children[parent][name]

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, inode, start, token):
        for at, (name, child) in enumerate(list(self.children[inode].items())[start:], start):
            if not pyfuse3.readdir_reply(token, name, self.attributes(child), at + 1):
                break

    async def statfs(self, ctx):
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = answer.f_bfree = answer.f_bavail = 1 << 20
        answer.f_namemax = 255
        return answer

    # -- content

    def resize(self, inode, size):
        data, old = self.data[inode], self.size[inode]
        if self.has("stale-after-truncate", size):
            pass  # the bytes stay, and show when the file grows again
        elif size < old:
            data[size:] = b""
        if len(data) < size:
            data.extend(bytes(size - len(data)))
        self.size[inode] = size
        if self.has("wrong-size", size) and size > 4096:
            self.size[inode] = size - 1

    async def setattr(self, inode, attr, fields, fh, ctx):
        if fields.update_mode:
            self.mode[inode] = attr.st_mode
        if fields.update_size:
            self.resize(inode, attr.st_size)
        return self.attributes(inode)

    async def open(self, inode, flags, ctx):
        if flags & os.O_TRUNC and self.fault != "open-ignores-truncation":
            self.resize(inode, 0)
        return pyfuse3.FileInfo(fh=inode, keep_cache=False)

    async def read(self, inode, offset, length):
        page = offset // 4096
        if self.has("hangs", page):
            await trio.sleep_forever()
        if self.has("shifted-read", page) and offset + length + 4096 <= self.size[inode]:
            offset += 4096
        if self.has("read-error", page):
            raise pyfuse3.FUSEError(errno.EIO)
        found = bytes(self.data[inode][offset : min(offset + length, self.size[inode])])
        if self.has("zeros", page):
            found = bytes(len(found))
        if self.has("garbage", page):
            found = bytes(b ^ 0x55 for b in found[:64]) + found[64:]
        return found

    async def write(self, inode, offset, data):
        end = offset + len(data)
        content = self.data[inode]
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        if not self.has("lost-write", offset):
            content[offset:end] = data
        if self.has("loses-last-page", end // 4096) and end >= self.size[inode]:
            content[end // 4096 * 4096 : end] = bytes(end % 4096)
        self.size[inode] = max(self.size[inode], end)
        return len(data)

    async def fsync(self, inode, datasync):
        if self.has("fsync-error", self.size[inode]):
            raise pyfuse3.FUSEError(errno.EIO)

    async def flush(self, inode):
        pass

    async def release(self, inode):
        pass

    async def forget(self, inodes):
        pass

    async def access(self, inode, mode, ctx):
        return True


if __name__ == "__main__":
    mountpoint, fault = sys.argv[1:]
    pyfuse3.init(Faulty(fault), mountpoint, {"fsname=faulty", "default_permissions"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)
