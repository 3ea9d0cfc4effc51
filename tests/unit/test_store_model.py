"""A plain model of a filesystem tree beside the store, under random operations and crashes.

The model knows nothing of SQLite or of backing files: it is what POSIX says, in dictionaries. After a
crash the store must hold what the model held at the last commit (names and attributes exactly; data of
files that nobody had open for writing), and `largefs check --data` must find nothing wrong.

A crash is a copy of the store's directory at that moment: what SQLite would find after SIGKILL.
"""

import copy
import errno
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from largefs.store import EXTENT_SIZE, ROOT_INODE, Store, backing
from largefs.store.check import check
from largefs.store.store import RENAME_EXCHANGE, RENAME_NOREPLACE

NAMES = st.sampled_from([b"a", b"b", b"c", b"\xff not text", b"x" * 255])
BAD_NAMES = st.sampled_from([b"", b".", b"..", b"a/b", b"a\0b", b"x" * 256])
PLACES = st.integers(0, 7)
"""Chooses one of the inodes there are, modulo their number."""


@dataclass
class Node:
    """An inode of the model."""

    kind: int
    mode: int
    uid: int = 0
    gid: int = 0
    target: bytes = b""
    mtime_ns: int | None = None
    """None: not set by the test, so whatever the clock said."""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    names: dict[bytes, int] = field(default_factory=dict)
    """Of a directory: name -> inode number."""
    data: bytes = b""
    writing: bool = False
    """Open for writing: after a crash the data is what reached the backing file."""


Tree = dict[int, Node]


def parents_of(tree: Tree, inode: int) -> list[int]:
    return [i for i, n in tree.items() for child in n.names.values() if child == inode]


def is_below(tree: Tree, inode: int, above: int) -> bool:
    """Whether a directory is another one or inside it."""
    while inode != above:
        if inode == ROOT_INODE:
            return False
        inode = parents_of(tree, inode)[0]
    return True


def nlink(tree: Tree, inode: int) -> int:
    node = tree[inode]
    if node.kind == stat.S_IFDIR:
        if inode != ROOT_INODE and not parents_of(tree, inode):
            return 0
        return 2 + sum(tree[c].kind == stat.S_IFDIR for c in node.names.values())
    return len(parents_of(tree, inode))


class StoreModel(RuleBasedStateMachine):
    """Does the same to a store and to the model."""

    @initialize()
    def begin(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="largefs-test-", dir=memory))
        self.path = self.directory / "store"
        Store.create(self.path)
        self.store = Store.open(self.path, "test")
        self.tree: Tree = {ROOT_INODE: Node(stat.S_IFDIR, 0o755)}
        self.committed = copy.deepcopy(self.tree)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.directory)

    # -------------------------------------------------------------------------------- choosing

    def directories(self) -> list[int]:
        return [i for i, n in self.tree.items() if n.kind == stat.S_IFDIR]

    def a_directory(self, place: int) -> int:
        found = self.directories()
        return found[place % len(found)]

    def an_inode(self, place: int, kind: int = 0) -> int | None:
        found = [i for i, n in self.tree.items() if kind in (0, n.kind)]
        return found[place % len(found)] if found else None

    def refused(self, number: int, operation: str, *args: object) -> None:
        """The store must refuse, with this errno, and change nothing."""
        try:
            getattr(self.store, operation)(*args)
        except OSError as e:
            assert e.errno == number, f"{operation}{args}: {e}"
        else:
            raise AssertionError(f"{operation}{args}: {errno.errorcode[number]} expected")

    def forget(self, inode: int) -> None:
        """Nobody uses the inode: if it has no name either, it goes."""
        if nlink(self.tree, inode) == 0:
            del self.tree[inode]
            self.store.drop(inode)

    # -------------------------------------------------------------------------------- names

    @rule(
        place=PLACES,
        name=NAMES,
        kind=st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO]),
        mode=st.integers(0, 0o777),
    )
    def make(self, place: int, name: bytes, kind: int, mode: int) -> None:
        parent = self.a_directory(place)
        target = b"target of " + name if kind == stat.S_IFLNK else b""
        args = (parent, name, kind | mode, 1, 2)
        if name in self.tree[parent].names:
            if kind == stat.S_IFLNK:
                return
            self.refused(errno.EEXIST, "make", *args)
            return
        row = self.store.make(*args, target=target)
        assert row.id not in self.tree
        self.tree[row.id] = Node(kind, mode, 1, 2, target, writing=kind == stat.S_IFREG)
        self.tree[parent].names[name] = row.id

    @rule(place=PLACES, name=BAD_NAMES)
    def make_illegal(self, place: int, name: bytes) -> None:
        number = errno.ENAMETOOLONG if len(name) > 255 else errno.EINVAL
        self.refused(number, "make", self.a_directory(place), name, stat.S_IFREG, 0, 0)

    @rule(what=PLACES, place=PLACES, name=NAMES)
    def link(self, what: int, place: int, name: bytes) -> None:
        inode, parent = self.an_inode(what), self.a_directory(place)
        assert inode is not None
        if self.tree[inode].kind == stat.S_IFDIR:
            self.refused(errno.EPERM, "link", inode, parent, name)
        elif name in self.tree[parent].names:
            self.refused(errno.EEXIST, "link", inode, parent, name)
        else:
            self.store.link(inode, parent, name)
            self.tree[parent].names[name] = inode

    @rule(place=PLACES, name=NAMES)
    def remove(self, place: int, name: bytes) -> None:
        parent = self.a_directory(place)
        inode = self.tree[parent].names.get(name)
        if inode is None:
            self.refused(errno.ENOENT, "unlink", parent, name)
            self.refused(errno.ENOENT, "rmdir", parent, name)
        elif self.tree[inode].kind != stat.S_IFDIR:
            self.refused(errno.ENOTDIR, "rmdir", parent, name)
            self.store.unlink(parent, name)
            del self.tree[parent].names[name]
            self.forget(inode)
        else:
            self.refused(errno.EISDIR, "unlink", parent, name)
            if self.tree[inode].names:
                self.refused(errno.ENOTEMPTY, "rmdir", parent, name)
                return
            self.store.rmdir(parent, name)
            del self.tree[parent].names[name]
            self.forget(inode)

    @rule(
        place=PLACES,
        name=NAMES,
        new_place=PLACES,
        new_name=NAMES,
        flags=st.sampled_from([0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE, 3, 4]),
    )
    def rename(self, place: int, name: bytes, new_place: int, new_name: bytes, flags: int) -> None:
        parent, new_parent = self.a_directory(place), self.a_directory(new_place)
        args = (parent, name, new_parent, new_name, flags)
        old = self.tree[parent].names.get(name)
        new = self.tree[new_parent].names.get(new_name)
        for moved, to in ((old, new_parent), (new if flags == RENAME_EXCHANGE else None, parent)):
            if moved and self.tree[moved].kind == stat.S_IFDIR and is_below(self.tree, to, moved):
                return  # the kernel's own lock_rename() sees to that, under the mount
        if number := self._rename_refused(old, new, flags):
            self.refused(number, "rename", *args)
            return
        assert old is not None
        replaced = self.store.rename(*args)
        if flags == RENAME_EXCHANGE:
            assert new is not None
            self.tree[parent].names[name], self.tree[new_parent].names[new_name] = new, old
            return
        if new == old:
            return
        del self.tree[parent].names[name]
        self.tree[new_parent].names[new_name] = old
        assert (replaced.id if replaced else None) == new
        if new is not None:
            self.forget(new)

    def _rename_refused(self, old: int | None, new: int | None, flags: int) -> int:
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            return errno.EINVAL
        if old is None or (new is None and flags == RENAME_EXCHANGE):
            return errno.ENOENT
        if new is None or flags == RENAME_EXCHANGE:
            return 0
        if flags == RENAME_NOREPLACE:
            return errno.EEXIST
        if old == new:
            return 0
        old_is, new_is = (self.tree[i].kind == stat.S_IFDIR for i in (old, new))
        if old_is != new_is:
            return errno.ENOTDIR if old_is else errno.EISDIR
        return errno.ENOTEMPTY if self.tree[new].names else 0

    # -------------------------------------------------------------------------------- attributes

    @rule(what=PLACES, mode=st.integers(0, 0o7777), owner=st.integers(0, 2**32 - 1))
    def set_attributes(self, what: int, mode: int, owner: int) -> None:
        inode = self.an_inode(what)
        assert inode is not None
        node = self.tree[inode]
        node.mode, node.uid = mode & ~stat.S_ISGID, owner
        self.store.set_attributes(inode, mode=node.kind | node.mode, uid=owner)

    @rule(what=PLACES, mtime_ns=st.integers(-(2**60), 2**62))
    def set_mtime(self, what: int, mtime_ns: int) -> None:
        inode = self.an_inode(what, stat.S_IFREG)
        if inode is None or self.tree[inode].writing:
            return  # while it is written the backing file holds the truth
        self.tree[inode].mtime_ns = mtime_ns
        self.store.set_attributes(inode, mtime_ns=mtime_ns)
        self.store.backing.set_times(inode, 0, mtime_ns)

    @rule(what=PLACES, name=NAMES, value=st.binary(max_size=50))
    def set_xattr(self, what: int, name: bytes, value: bytes) -> None:
        inode = self.an_inode(what)
        assert inode is not None
        self.store.set_xattr(inode, b"user." + name[:100], value)
        self.tree[inode].xattrs[b"user." + name[:100]] = value

    @rule(what=PLACES, name=NAMES)
    def remove_xattr(self, what: int, name: bytes) -> None:
        inode, name = self.an_inode(what), b"user." + name[:100]
        assert inode is not None
        if name not in self.tree[inode].xattrs:
            self.refused(errno.ENODATA, "remove_xattr", inode, name)
            return
        self.store.remove_xattr(inode, name)
        del self.tree[inode].xattrs[name]

    # -------------------------------------------------------------------------------- content

    @rule(what=PLACES)
    def begin_writing(self, what: int) -> None:
        inode = self.an_inode(what, stat.S_IFREG)
        if inode is None:
            return
        if self.store.begin_writing(inode):
            self.commit()  # as the contract has it, before anyone writes
        self.tree[inode].writing = True

    @rule(what=PLACES, offset=st.sampled_from([0, 1, 5000, EXTENT_SIZE - 3, 3 * EXTENT_SIZE]))
    def write(self, what: int, offset: int) -> None:
        inode = self.an_inode(what, stat.S_IFREG)
        if inode is None or not self.tree[inode].writing:
            return
        data = b"%d at %d" % (inode, offset)
        fd = self.store.backing.open(inode, os.O_RDWR)
        backing.write_full(fd, data, offset)
        os.close(fd)
        node = self.tree[inode]
        before = node.data[:offset].ljust(offset, b"\0")
        node.data = before + data + node.data[offset + len(data) :]

    @rule(what=PLACES, size=st.sampled_from([0, 1, 4096, EXTENT_SIZE, EXTENT_SIZE + 1]))
    def truncate(self, what: int, size: int) -> None:
        inode = self.an_inode(what, stat.S_IFREG)
        if inode is None or not self.tree[inode].writing:
            return
        fd = self.store.backing.open(inode, os.O_RDWR)
        os.ftruncate(fd, size)
        os.close(fd)
        node = self.tree[inode]
        node.data = node.data[:size].ljust(size, b"\0")

    @rule(what=PLACES)
    def settle(self, what: int) -> None:
        inode = self.an_inode(what, stat.S_IFREG)
        if inode is None or not self.tree[inode].writing:
            return
        st = self.store.backing.stat(inode)
        self.store.record_stat(inode, st)
        self.store.record_checksums(inode, self.store.sum(inode))
        self.tree[inode].writing = False
        self.tree[inode].mtime_ns = st.st_mtime_ns

    # -------------------------------------------------------------------------------- durability

    @rule()
    def commit(self) -> None:
        self.store.commit()
        self.committed = copy.deepcopy(self.tree)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        assert not check(self.path, data=True).problems
        self.store = Store.open(self.path, "test")
        self._writers_are_gone()

    def _writers_are_gone(self) -> None:
        for node in self.tree.values():
            node.writing = False
        self.store.unsettled, unsettled = [], self.store.unsettled
        for inode in unsettled:
            self.store.record_stat(inode, self.store.backing.stat(inode))
            self.store.record_checksums(inode, self.store.sum(inode))
        for inode, node in self.tree.items():
            node.mtime_ns = None if inode in unsettled else node.mtime_ns
        self.commit()

    @rule()
    def crash(self) -> None:
        self._crash()

    @precondition(lambda self: self.store.uncommitted)
    @rule()
    def crash_between_flush_and_commit(self) -> None:
        self.store.backing.flush(self.store.to_flush())
        self._crash()

    @precondition(lambda self: self.store.uncommitted)
    @rule()
    def crash_before_backing_files_are_removed(self) -> None:
        self.store.backing.flush(self.store.to_flush())
        self.store.finish_commit()
        self.committed = copy.deepcopy(self.tree)
        for inode in list(self.store.to_remove)[:1]:
            self.store.backing.remove(inode)
        self._crash()

    def _crash(self) -> None:
        """Go on with a copy of the directory as it is now."""
        after = self.directory / "after"
        shutil.copytree(self.path, after, symlinks=True)
        before = self.tree
        self.store.close()
        shutil.rmtree(self.path)
        after.rename(self.path)

        report = check(self.path, data=True)
        assert not report.problems, report.problems
        self.store = Store.open(self.path, "test")
        self.tree = copy.deepcopy(self.committed)
        for inode, node in self.tree.items():
            if node.kind == stat.S_IFREG and (node.writing or before.get(inode, node).writing):
                self._data_after_a_crash(inode, node, before.get(inode))
        self._writers_are_gone()
        report = check_while_open(self)
        assert not report, report

    def _data_after_a_crash(self, inode: int, node: Node, before: Node | None) -> None:
        """A file that was open for writing has what was in its backing file (nothing lost power)."""
        node.writing = True
        if before is not None:
            node.data = before.data
            return
        with open(os.open(self.backing_path(inode), os.O_RDONLY), "rb") as f:
            node.data = f.read()

    def backing_path(self, inode: int) -> Path:
        return self.path / "extents" / backing.BackingFiles.name(inode)

    # -------------------------------------------------------------------------------- agreement

    @invariant()
    def names_agree(self) -> None:
        if not hasattr(self, "store"):
            return
        for inode in self.directories():
            found = {d.name: d.inode.id for d in self.store.entries(inode)}
            assert found == self.tree[inode].names

    @invariant()
    def attributes_agree(self) -> None:
        if not hasattr(self, "store"):
            return
        for inode, node in self.tree.items():
            row = self.store.get(inode)
            assert row.mode == node.kind | node.mode
            assert row.nlink == nlink(self.tree, inode)
            if inode != ROOT_INODE:
                assert (row.uid, row.gid) == (node.uid, node.gid)
            assert self.store.xattrs(inode) == node.xattrs
            if node.kind == stat.S_IFLNK:
                assert self.store.readlink(inode) == node.target
            if node.kind == stat.S_IFREG and not node.writing:
                assert row.size == len(node.data)
                assert node.mtime_ns in (None, row.mtime_ns)

    @invariant()
    def data_agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        for inode, node in self.tree.items():
            if node.kind == stat.S_IFREG:
                assert self.backing_path(inode).read_bytes() == node.data


def check_while_open(model: StoreModel) -> list[object]:
    """Look at a copy: the store itself is held."""
    copied = model.directory / "looked-at"
    shutil.copytree(model.path, copied, symlinks=True)
    (copied / "owner").unlink()
    try:
        return list(check(copied, data=True).problems)
    finally:
        shutil.rmtree(copied)


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(
    max_examples=int(os.environ.get("LARGEFS_MODEL_EXAMPLES", "20")),
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
