"""The store: what is on disk. Knows nothing of FUSE; every part of it runs without a mount.

schema.py    the tables of meta.db, and what every column means
database.py  meta.db as a file: its header, its lock, its log
store.py     a store that is open: inodes, names, attributes, commits
backing.py   the files under extents/, and the checksums of their extents
owner.py     who holds a store, across hosts
check/       finds and repairs damage
"""

from largefs.store.backing import EXTENT_SIZE
from largefs.store.errors import (
    BusyError,
    DiskFullError,
    NewerFormatError,
    NotAStoreError,
    ReadOnlyError,
    RestoredError,
    StoreError,
)
from largefs.store.schema import FORMAT_VERSION, ROOT_INODE
from largefs.store.store import Dentry, Inode, Store

__all__ = [
    "EXTENT_SIZE",
    "FORMAT_VERSION",
    "ROOT_INODE",
    "BusyError",
    "Dentry",
    "DiskFullError",
    "Inode",
    "NewerFormatError",
    "NotAStoreError",
    "ReadOnlyError",
    "RestoredError",
    "Store",
    "StoreError",
]
