"""What a name has besides its contents: owner, mode, xattrs and times."""

import errno
import os
import stat

FOREIGN = (b"system.nfs4_acl", b"security.selinux")
"""xattrs that belong to the filesystem a file was on, or to its policy, rather than to the file."""

ACLS = {b"system.posix_acl_access", b"system.posix_acl_default"}
"""xattrs that a new name gets from its directory's default ACL (acl(5))."""


def xattrs_of(path: bytes) -> dict[bytes, bytes]:
    """The xattrs of a name that are the file's own; none where the filesystem has none."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as e:
        if e.errno in (errno.EOPNOTSUPP, errno.EPERM):
            return {}
        raise
    found = {}
    for name in names:
        key = os.fsencode(name)
        if key in FOREIGN:
            continue
        try:
            found[key] = os.getxattr(path, name, follow_symlinks=False)
        except OSError as e:
            if e.errno != errno.ENODATA:
                raise
    return found


def set_metadata(
    target: bytes,
    mode: int,
    owner: tuple[int, int],
    xattrs: dict[bytes, bytes],
    times_ns: tuple[int, int],
) -> list[str]:
    """Give a new name its owner, xattrs, mode and times, in the order in which none undoes another.

    It loses an ACL that it has from its directory, and the set-ID bits if it does not get its owner.
    Returns what could not be set; raises OSError.
    """
    lost = []
    try:
        os.chown(target, *owner, follow_symlinks=False)
    except PermissionError:
        lost.append("owner")
        if mode & (stat.S_ISUID | stat.S_ISGID):
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
            lost.append("set-ID bits")
    inherited = set() if stat.S_ISLNK(mode) else ACLS & xattrs_of(target).keys()
    for name in inherited - xattrs.keys():
        os.removexattr(target, name)
    for name, value in xattrs.items():
        try:
            os.setxattr(target, name, value, follow_symlinks=False)
        except OSError:
            lost.append(os.fsdecode(name))
    if not stat.S_ISLNK(mode):
        os.chmod(target, stat.S_IMODE(mode))  # after user.*, which take the permission to write
    os.utime(target, ns=times_ns, follow_symlinks=False)
    return lost
