"""POSIX ACLs: what the server owes when the kernel enforces them (FUSE_POSIX_ACL).

The kernel reads ACLs from the xattrs system.posix_acl_access and system.posix_acl_default and checks
access by them. Left to the server: permission bits and access ACL stay equivalent, and what is made in
a directory with a default ACL inherits it (acl(5), "OBJECT CREATION AND DEFAULT ACLs").
"""

import stat
import struct
from collections.abc import Set
from dataclasses import dataclass, field, replace

from largefs.store import Store

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
VERSION = 2  # include/uapi/linux/posix_acl_xattr.h


@dataclass(frozen=True)
class Entry:
    """One entry of an ACL, as in struct posix_acl_xattr_entry."""

    tag: int
    perm: int
    id: int


@dataclass(frozen=True)
class Inherited:
    """What a new inode gets: its st_mode, and its ACL xattrs."""

    mode: int
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def decode(value: bytes) -> list[Entry]:
    """Read an ACL xattr; raises ValueError on anything malformed."""
    if len(value) < 4 or len(value) % 8 != 4:
        raise ValueError("length")
    if struct.unpack_from("<I", value)[0] != VERSION:
        raise ValueError("version")
    return [Entry(tag, perm, id_) for tag, perm, id_ in struct.iter_unpack("<HHI", value[4:])]


def encode(entries: list[Entry]) -> bytes:
    """Write an ACL xattr."""
    packed = b"".join(struct.pack("<HHI", e.tag, e.perm, e.id) for e in entries)
    return struct.pack("<I", VERSION) + packed


def set_access(store: Store, inode: int, value: bytes, uid: int, groups: Set[int]) -> bool:
    """Set the permission bits that an access ACL stands for, as chmod(2) by this user would.

    So set-group-ID goes unless the caller is root or of the file's group (posix_acl_update_mode()).
    False: the ACL says no more than the bits do, so it need not be kept. The kernel has checked it.
    """
    entries = decode(value)
    row = store.get(inode)
    mode = row.mode & ~0o777 | _bits(entries)
    if uid and row.gid not in groups:
        mode &= ~stat.S_ISGID
    store.set_attributes(inode, mode=mode)
    if any(e.tag in (USER, GROUP, MASK) for e in entries):
        return True
    if ACCESS in store.xattrs(inode):
        store.remove_xattr(inode, ACCESS)
    return False


def follow_mode(store: Store, inode: int, mode: int) -> None:
    """Have the access ACL, if there is one, follow a chmod (posix_acl_chmod() in fs/posix_acl.c)."""
    value = store.xattrs(inode).get(ACCESS)
    if value is not None:
        store.set_xattr(inode, ACCESS, encode(_with_bits(decode(value), mode & 0o777)))


def inherited(store: Store, parent: int, mode: int, umask: int) -> Inherited:
    """What an inode of `mode` made in `parent` gets: by the default ACL, or by the umask."""
    if stat.S_ISLNK(mode):
        return Inherited(mode)
    value = store.xattrs(parent).get(DEFAULT)
    if value is None:
        return Inherited(mode & ~umask)
    entries = _masked(decode(value), mode & 0o777)
    xattrs = {}
    if any(e.tag in (USER, GROUP, MASK) for e in entries):
        xattrs[ACCESS] = encode(entries)
    if stat.S_ISDIR(mode):
        xattrs[DEFAULT] = value
    return Inherited(mode & ~0o777 | _bits(entries), xattrs)


def _group_class(entries: list[Entry]) -> int:
    """The tag whose permissions the group bits of the mode stand for."""
    return MASK if any(e.tag == MASK for e in entries) else GROUP_OBJ


def _shifts(entries: list[Entry]) -> dict[int, int]:
    return {USER_OBJ: 6, _group_class(entries): 3, OTHER: 0}


def _bits(entries: list[Entry]) -> int:
    shifts = _shifts(entries)
    return sum((e.perm & 7) << shifts[e.tag] for e in entries if e.tag in shifts)


def _with_bits(entries: list[Entry], bits: int) -> list[Entry]:
    shifts = _shifts(entries)
    return [replace(e, perm=bits >> shifts[e.tag] & 7) if e.tag in shifts else e for e in entries]


def _masked(entries: list[Entry], bits: int) -> list[Entry]:
    shifts = _shifts(entries)
    return [
        replace(e, perm=e.perm & bits >> shifts[e.tag]) if e.tag in shifts else e for e in entries
    ]
