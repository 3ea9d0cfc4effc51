"""From a row of the store to what the kernel is told: stat fields and how long they hold."""

import os
from typing import Final

import pyfuse3

from largefs.store import EXTENT_SIZE, Inode
from largefs.store.store import as_written

FOREVER: Final = 1e9
"""Seconds: the daemon owns the store alone, so what the kernel knows stays true until told."""


def entry(row: Inode) -> pyfuse3.EntryAttributes:
    """The reply for an inode that nobody writes: attributes that the kernel may keep."""
    a = pyfuse3.EntryAttributes()
    a.st_ino = row.id
    a.st_mode = row.mode
    a.st_nlink = row.nlink
    a.st_uid = row.uid
    a.st_gid = row.gid
    a.st_rdev = row.rdev
    a.st_size = row.size
    a.st_blocks = row.blocks
    a.st_atime_ns = row.atime_ns
    a.st_mtime_ns = row.mtime_ns
    a.st_ctime_ns = row.ctime_ns
    if row.huge:
        a.st_blksize = EXTENT_SIZE
    a.entry_timeout = FOREVER
    a.attr_timeout = FOREVER
    return a


def entry_in_writing(row: Inode, st: os.stat_result) -> pyfuse3.EntryAttributes:
    """The reply for an inode that is open for writing: the backing file's truth, not to be kept.

    A shared mapping moves size and times of the backing file without a word to FUSE.
    """
    a = entry(as_written(row, st))
    a.attr_timeout = 0
    return a


def missing() -> pyfuse3.EntryAttributes:
    """The reply for a name that is not there, which the kernel may remember as well."""
    a = pyfuse3.EntryAttributes()
    a.st_ino = pyfuse3.InodeT(0)
    a.entry_timeout = FOREVER
    return a
