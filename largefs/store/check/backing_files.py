"""The checks of the files under extents/: each regular file has one, as recorded; no other is there."""

import os
import stat

from largefs.store.backing import BackingFiles
from largefs.store.check import extents
from largefs.store.check.context import REGULAR, Context
from largefs.store.check.lost_and_found import adopt, save
from largefs.store.errors import StoreError
from largefs.store.store import REMOVED


def directories(c: Context) -> None:
    """`extents/` and the directories in it."""
    top = c.path / "extents"
    for directory in [top, *(top / f"{i:02x}" for i in range(256))]:
        if not directory.is_dir():
            if c.repair:
                directory.mkdir(mode=0o700)
            text = f"{directory.relative_to(c.path)}: the directory is missing"
            c.problem("extents-directory", text, mendable=True)
    if not top.is_dir():
        raise StoreError(f"{c.path}: extents/ is missing, and with it the data of all files")


def files(c: Context) -> None:
    """Each regular file that nobody had open has a backing file that looks as recorded."""
    for inode, size, mtime, atime in c.all(
        "SELECT id, size, mtime_ns, atime_ns FROM inodes"
        f" WHERE {REGULAR} AND writing = 0 AND NOT ({REMOVED})"
    ):
        try:
            fd = c.backing.open(inode, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            _missing(c, inode, size, mtime)
            continue
        except OSError as e:
            c.problem("unreadable", f"its backing file: {e.strerror}", inode)
            continue
        try:
            _file(c, fd, inode, size, (atime, mtime))
        except OSError as e:
            c.problem("unreadable", f"its backing file: {e.strerror}", inode)
        finally:
            os.close(fd)


def _missing(c: Context, inode: int, size: int, mtime: int) -> None:
    """A backing file that is gone: nothing is lost if it held none but holes."""
    name = _path(inode)
    if c.value("SELECT 1 FROM extents WHERE inode = ? LIMIT 1", inode):
        c.problem("backing-missing", f"its data is lost: {name} is missing", inode)
        return
    if c.repair:
        fd = c.backing.make(inode)
        try:
            os.ftruncate(fd, size)
            os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)
    text = f"{name} is missing; it held no data"
    c.problem("backing-missing", text, inode, mendable=True)


def _file(c: Context, fd: int, inode: int, size: int, times: tuple[int, int]) -> None:
    st = os.fstat(fd)
    name = _path(inode)
    if not stat.S_ISREG(st.st_mode):
        c.problem("backing-missing", f"{name} is no regular file", inode)
        return
    if st.st_size < size:
        text = f"{size - st.st_size} of {size} bytes are lost: {name} is shorter"
        c.problem("backing-size", text, inode, offset=st.st_size)
        return
    extents.compare_with_holes(c, fd, inode, size)
    if st.st_size == size and (
        st.st_mtime_ns == times[1]
        or not c.clean  # a time that was set may have reached only one of the two
        or st.st_mtime_ns == c.backing.mtime_as_kept(times[1])
    ):
        return
    intact = extents.are_intact(c, fd, inode, size)
    if st.st_size > size:
        _longer(c, inode, size, st, intact=intact)
        return
    if intact and c.repair:
        c.backing.set_times(inode, *times)
    text = f"{name} was changed behind the store's back"
    text += "; its data is as recorded" if intact else ", and its data is not as recorded"
    c.problem("backing-mtime", text, inode, mendable=intact)


def _longer(c: Context, inode: int, size: int, st: os.stat_result, *, intact: bool) -> None:
    """A backing file with more at its end than was recorded: take it in if the rest is intact."""
    if intact:
        extents.record(c, inode)
        c.db.execute(
            "UPDATE inodes SET size = ?, blocks = ?, mtime_ns = ? WHERE id = ?",
            (st.st_size, st.st_blocks, st.st_mtime_ns, inode),
        )
    text = f"size is {size}, but {_path(inode)} has {st.st_size} bytes"
    text += "" if intact else ", and its data is not as recorded"
    c.problem("backing-size", text, inode, offset=size, mendable=intact)


def orphans(c: Context) -> None:
    """Backing files without an inode: one with data gets an inode, one without goes."""
    if not c.clean:
        return  # a crash leaves such files, and the next mount removes them
    known = {i for (i,) in c.db.execute("SELECT id FROM inodes")}
    for inode in sorted(set(c.backing.numbers()) - known):
        text = f"{_path(inode)} belongs to no inode"
        if c.backing.stat(inode).st_size == 0:
            c.to_remove.append(inode)
            text += ", and is empty"
        else:
            adopt(c, inode)
            save(c, inode)
            extents.record(c, inode)
        c.problem("backing-orphan", text, mendable=True)


def _path(inode: int) -> str:
    return f"extents/{BackingFiles.name(inode)}"
