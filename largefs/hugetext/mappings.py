"""What processes map, and by which page-table entries: /proc/PID/{smaps,pagemap}, /proc/kpageflags.

Only reads; nothing here changes a process or the page cache. All sizes and addresses are in bytes.
A process may end at any moment: then FileNotFoundError or ProcessLookupError is raised; for another
user's process, PermissionError. Sources: proc_pid_smaps(5),
Documentation/admin-guide/mm/pagemap.rst, fs/proc/task_mmu.c.
"""

import array
import ctypes
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

PAGE = mmap.PAGESIZE
PMD = 2 << 20

_libc = ctypes.CDLL(None, use_errno=True)

# One header line of smaps, for executable mappings only: start-end perms offset major:minor inode
# path.
_HEADER = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ([r-][w-]x[ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$",
    re.MULTILINE,
)
_PMD_MAPPED = re.compile(rb"^(?:File|Shmem)PmdMapped: +(\d+) kB$", re.MULTILINE)
_FLAGS = re.compile(rb"^VmFlags:(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Mapping:
    """An executable file-backed mapping."""

    start: int
    end: int
    permissions: str
    offset: int
    device: int  # st_dev of the file's filesystem; of the FUSE filesystem under passthrough too
    inode: int
    path: str  # as seen from this process's root; without the kernel's " (deleted)"
    deleted: bool
    pmd_mapped: int  # FilePmdMapped, or ShmemPmdMapped on tmpfs
    flags: frozenset[str]  # VmFlags' two-letter codes

    @property
    def length(self) -> int:
        """Bytes of address space."""
        return self.end - self.start

    @property
    def congruent(self) -> bool:
        """Whether address and file offset are equal modulo 2 MiB."""
        return (self.start - self.offset) % PMD == 0

    def inner_blocks(self) -> range:
        """Addresses of the 2 MiB-aligned blocks that lie wholly inside the mapping."""
        return range(-(-self.start // PMD) * PMD, self.end // PMD * PMD, PMD)

    def eligible_blocks(self, file_size: int) -> range:
        """Addresses of the blocks that a PMD mapping could cover: congruent, inside, below EOF."""
        if not self.congruent:
            return range(0)
        inner = self.inner_blocks()
        below_eof = self.start - self.offset + file_size // PMD * PMD
        return range(inner.start, min(inner.stop, below_eof), PMD)


def executable_mappings(pid: int) -> list[Mapping]:
    """The executable file-backed mappings of a process, hugetlbfs's excepted; from smaps, one
    read.
    """
    with open(f"/proc/{pid}/smaps", "rb") as f:
        smaps = f.read()
    found = []
    for header in _HEADER.finditer(smaps):
        start, end, permissions, offset, major, minor, inode, path = header.groups()
        if inode == b"0":  # anonymous, [vdso]
            continue
        flags = _FLAGS.search(smaps, header.end())
        body_end = flags.end() if flags else len(smaps)
        codes = frozenset(flags[1].decode().split()) if flags else frozenset()
        if "ht" in codes:  # hugetlbfs pages are neither page-cache folios nor counted as PmdMapped
            continue
        name = os.fsdecode(path.replace(rb"\012", b"\n"))
        found.append(
            Mapping(
                start=int(start, 16),
                end=int(end, 16),
                permissions=permissions.decode(),
                offset=int(offset, 16),
                device=os.makedev(int(major, 16), int(minor, 16)),
                inode=int(inode),
                path=name.removesuffix(" (deleted)"),
                deleted=name.endswith(" (deleted)"),
                pmd_mapped=sum(
                    int(kib) << 10 for kib in _PMD_MAPPED.findall(smaps, header.end(), body_end)
                ),
                flags=codes,
            )
        )
    return found


def file_size(pid: int, mapping: Mapping) -> int | None:
    """Size of the mapped file; None if it cannot be known.

    /proc/PID/map_files reaches the very file, deleted or in another mount namespace, but following
    it takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN. Else the path is tried, below the process's
    root first, and believed if it has the mapping's inode number.
    """
    try:
        return _size_and_inode(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")[0]
    except OSError:
        pass
    if mapping.deleted:
        return None
    for prefix in (f"/proc/{pid}/root", ""):
        try:
            size, inode = _size_and_inode(prefix + mapping.path)
        except OSError:
            continue
        if inode == mapping.inode:
            return size
    return None


def _size_and_inode(path: str) -> tuple[int, int]:
    """As the kernel has them now: a FUSE or network server is not asked, for it may be dead."""
    at_fdcwd, at_statx_dont_sync, statx_ino, statx_size = -100, 0x4000, 0x100, 0x200
    buffer = ctypes.create_string_buffer(256)  # struct statx
    name = os.fsencode(path)
    if _libc.statx(at_fdcwd, name, at_statx_dont_sync, statx_ino | statx_size, buffer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    inode, size = struct.unpack_from("QQ", buffer, 32)
    return size, inode


@dataclass(frozen=True, slots=True)
class Block:
    """One 2 MiB block of address space of which at least one page is present."""

    address: int
    first_page: int  # address of its first present page
    copied: bool  # holds an anonymous page: a private copy that was written to, as by a breakpoint
    pmd: bool | None  # mapped by one PMD; None if the kernel is older than PAGEMAP_SCAN


def open_pagemap(pid: int | str) -> int:
    """A descriptor of /proc/PID/pagemap, for the functions below."""
    return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)


def present_blocks(pagemap: int, blocks: range) -> list[Block]:
    """Those of consecutive 2 MiB `blocks` that have a page present, in order."""
    if not blocks:
        return []
    try:
        regions = list(_scan(pagemap, blocks.start, blocks.stop))
    except OSError:  # ENOTTY before 6.7
        return _read_pagemap(pagemap, blocks)
    found: dict[int, Block] = {}
    for start, end, categories in regions:
        for address in range(start // PMD * PMD, end, PMD):
            copied = not categories & _PAGE_IS_FILE
            if (known := found.get(address)) is None:
                pmd = bool(categories & _PAGE_IS_HUGE)
                found[address] = Block(address, max(start, address), copied, pmd)
            elif copied and not known.copied:
                found[address] = Block(address, known.first_page, copied, known.pmd)
    return list(found.values())


# The PAGEMAP_SCAN ioctl of Linux 6.7: include/uapi/linux/fs.h, struct pm_scan_arg and struct
# page_region.
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_FILE, _PAGE_IS_PRESENT, _PAGE_IS_HUGE = 1 << 2, 1 << 3, 1 << 6
_PM_SCAN_FIELDS = 12
_WALK_END = 4  # index of the field in which the kernel says how far it came
_REGIONS = 1024


def _scan(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, categories) of the runs of present pages in [start, end)."""
    wanted = _PAGE_IS_PRESENT | _PAGE_IS_HUGE | _PAGE_IS_FILE
    masks = 0, _PAGE_IS_PRESENT, 0, wanted  # inverted, all of, any of, to be told
    vector = (ctypes.c_uint64 * (3 * _REGIONS))()
    buffer = ctypes.addressof(vector)
    while start < end:
        argument = array.array(
            "Q",
            # size, flags, start, end, walk_end, vec, vec_len, max_pages, the masks
            (8 * _PM_SCAN_FIELDS, 0, start, end, 0, buffer, _REGIONS, 0, *masks),
        )
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        for i in range(count):
            yield vector[3 * i], vector[3 * i + 1], vector[3 * i + 2]
        start = argument[_WALK_END]


def _read_pagemap(pagemap: int, blocks: range) -> list[Block]:
    """present_blocks() for kernels without PAGEMAP_SCAN: bit 63 present, bit 61 file or shared."""
    found = []
    for address in blocks:
        entries = array.array("Q", os.pread(pagemap, PMD // PAGE * 8, address // PAGE * 8))
        present = [i for i, entry in enumerate(entries) if entry >> 63]
        if present:
            copied = any(not entries[i] >> 61 & 1 for i in present)
            found.append(Block(address, address + present[0] * PAGE, copied, None))
    return found


def in_pmd_folio(pagemap: int, block: Block) -> bool | None:
    """Whether the page cache behind a block is one 2 MiB folio; None without CAP_SYS_ADMIN.

    A PMD folio is a compound page whose head has a frame number divisible by 512, followed by 511
    tails.
    """
    flags = _kpageflags()
    if flags is None:
        return None
    entry = int.from_bytes(os.pread(pagemap, 8, block.first_page // PAGE * 8), "little")
    frame = entry & (1 << 55) - 1
    if not entry >> 63 or not frame:  # gone meanwhile, or frame numbers are hidden from us
        return None
    pages = PMD // PAGE
    head = frame - (block.first_page - block.address) // PAGE
    if head < 0 or head % pages:
        return False
    compound = array.array("Q", os.pread(flags, pages * 8, head * 8))
    is_head, is_tail = 1 << 15, 1 << 16  # KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL
    return bool(compound[0] & is_head) and all(page & is_tail for page in compound[1:])


@cache
def _kpageflags() -> int | None:
    try:
        return os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of mountinfo."""

    device: int  # st_dev
    mountpoint: str
    fstype: str  # with the subtype: fuse.largefs
    source: str


def mounts(pid: int | str = "self") -> list[Mount]:
    """The mounts that a process sees, in the order of mounting; touches none of them."""
    with open(f"/proc/{pid}/mountinfo", "rb") as f:
        lines = f.read().splitlines()
    found = []
    for line in lines:
        before, _, after = line.partition(b" - ")
        device, mountpoint = before.split()[2], before.split()[4]
        fstype, source = after.split()[:2]
        major, minor = device.split(b":")
        number = os.makedev(int(major), int(minor))
        found.append(Mount(number, _plain(mountpoint), fstype.decode(), _plain(source)))
    return found


def _plain(field: bytes) -> str:
    """Undo mountinfo's escapes: blank, tab, newline, backslash and # are three octal digits."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), field))
