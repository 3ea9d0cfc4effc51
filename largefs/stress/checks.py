"""What each operation must do: carry it out, compare, and apply it to the model.

Every operation is defined whatever came before it: one whose file, handle or mapping does not
exist, or that would leave the file's bounds, is skipped. So any part of a list of operations can be
replayed, which is what makes shrinking possible.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import mmap
import os
from collections.abc import Callable
from typing import Any

from largefs.stress import folios, program, syscalls
from largefs.stress.model import Handle, Mapping, Program
from largefs.stress.report import Difference, Write
from largefs.stress.session import Operation, Session, errno_name
from largefs.stress.syscalls import PAGE, PMD

_ABSENT = {errno.EOPNOTSUPP, errno.ENOSYS}
_ADVISORY = {errno.EINVAL, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EPERM, errno.ENOSYS}


def perform(session: Session, op: Operation) -> bool:
    """Carry out and compare; False if it was skipped. Raises Difference, CannotRunError."""
    try:
        done = _CHECKS[op.kind](session, op, op.arguments)
    except Difference as difference:
        difference.operation = op.number
        _locate(session, difference)
        raise
    if done:
        session.tally.operations[op.kind] += 1
    return done


def _locate(session: Session, difference: Difference) -> None:
    """Say in which folio a wrong byte lies."""
    inode = session.model.names.get(difference.path)
    if inode is None or not 0 <= difference.offset < inode.size:
        return
    with contextlib.suppress(OSError):
        fd = os.open(f"{session.root}/{difference.path}", os.O_RDONLY)
        try:
            difference.folios = folios.around(fd, difference.offset)
        finally:
            os.close(fd)


# each returns False when the operation cannot be done in the present state
_Check = Callable[[Session, Operation, dict[str, Any]], bool]


def _open(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    name, flags = a["path"], a["flags"]
    inode = s.model.names.get(name)
    if a["h"] in s.model.handles or (inode is None and not flags & os.O_CREAT):
        return False
    result, size = s.call(op)
    direct = bool(flags & os.O_DIRECT)
    if direct and s.learn("o-direct", result, {errno.EINVAL}):
        return True
    s.require(op, result)
    if inode is None:
        inode = s.model.create(name, s.capacity)
    elif flags & os.O_TRUNC:
        inode.truncate(0)
        s.model.truncated(inode)
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    s.model.handles[a["h"]] = Handle(op.worker, inode, bool(flags & os.O_APPEND), writable, direct)
    s.check_size(op, inode, size)
    return True


def _handle(s: Session, op: Operation, number: int, write: bool = False) -> Handle | None:
    handle = s.model.handles.get(number)
    if handle is None or handle.worker != op.worker or (write and not handle.writable):
        return None
    return handle


def _close(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    if _handle(s, op, a["h"]) is None:
        return False
    s.require(op, s.call(op)[0])
    del s.model.handles[a["h"]]
    return True


def _for_direct(a: dict[str, Any]) -> bool:
    """Whether a read or write is aligned as O_DIRECT wants it."""
    return all(a.get(name, 0) % PAGE == 0 for name in ("off", "len", "from"))


_BY_PIPE = ("sendfile", "splice")


def _read(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"])
    if handle is None or (handle.direct and not _for_direct(a)):
        return False
    inode, offset = handle.inode, a["off"]
    due = max(0, min(a["len"], inode.size - offset))
    result, _ = s.call(op)
    if a["via"] in _BY_PIPE and s.learn(f"read {a['via']}", result, {*_ABSENT, errno.EINVAL}):
        return True
    s.require(op, result)
    s.compare(op, inode, offset, min(result, due), a["via"])
    if result != due:
        raise Difference(
            "short",
            f"{a['via']} of {a['len']} bytes gave {result}, where the file has {due}",
            path=s.model.name_of(inode),
            offset=offset,
        )
    return True


def _write(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"], write=True)
    if handle is None or (a["via"] == "append") != handle.append:
        return False
    if handle.direct and not _for_direct(a):
        return False
    inode = handle.inode
    offset = inode.size if handle.append else a["off"]
    if offset + a["len"] > s.capacity:
        return False
    result, size = s.call(op)
    if a["via"] in _BY_PIPE and s.learn(f"write {a['via']}", result, {*_ABSENT, errno.EINVAL}):
        return True
    s.require(op, result)
    if not 0 < result <= a["len"]:
        raise Difference("short", f"write of {a['len']} bytes returned {result}")
    s.tally.short_writes += result < a["len"]  # allowed by POSIX, if rare
    s.wrote(op, inode, offset, result, a["from"])
    s.check_size(op, inode, size)
    return True


def _truncate(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"], write=True)
    if handle is None or a["size"] > s.capacity:
        return False
    inode = handle.inode
    cut = min(a["size"], inode.size)
    result, size = s.call_to_change(op, inode, cut, s.capacity + PMD, "truncate")
    s.require(op, result)
    inode.truncate(a["size"])
    s.model.truncated(inode)
    s.check_size(op, inode, size)
    return True


def _fallocate(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"], write=True)
    if handle is None:
        return False
    inode, mode, offset, length = handle.inode, a["mode"], a["off"], a["len"]
    end = offset + length
    if mode == syscalls.COLLAPSE_RANGE and end >= inode.size:
        return False
    if mode == syscalls.INSERT_RANGE and (offset >= inode.size or inode.size + length > s.capacity):
        return False
    if end > s.capacity:
        return False
    moves = mode in (syscalls.COLLAPSE_RANGE, syscalls.INSERT_RANGE)
    changed = s.capacity + PMD if moves else end
    result, size = s.call_to_change(op, inode, offset, changed, mode_name(mode))
    acceptable = {*_ABSENT, errno.EINVAL} if moves else _ABSENT
    if s.learn(f"fallocate {mode_name(mode)}", result, acceptable):
        return True
    s.require(op, result, f"fallocate {mode_name(mode)}")
    if mode == syscalls.COLLAPSE_RANGE:
        s.moved(inode, end, inode.size, inode, -length)
        inode.collapse(offset, length)
    elif mode == syscalls.INSERT_RANGE:
        s.moved(inode, offset, inode.size, inode, length)
        inode.insert(offset, length)
    if moves:
        s.model.moved(inode)
    else:
        if mode & (syscalls.PUNCH_HOLE | syscalls.ZERO_RANGE):
            inode.zero(offset, length)
        if not mode & syscalls.KEEP_SIZE:
            inode.size = max(inode.size, end)
    s.check_size(op, inode, size)
    return True


def mode_name(mode: int) -> str:
    """The mode of fallocate(2) as its option of fallocate(1)."""
    names = {
        0: "",
        1: "keep-size",
        2: "punch-hole",
        8: "collapse-range",
        16: "zero-range",
        32: "insert-range",
    }
    return "+".join(names[bit] for bit in (2, 8, 16, 32, 1) if mode & bit) or "allocate"


def _copy(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    source, target = _handle(s, op, a["h"]), _handle(s, op, a["h2"], write=True)
    if source is None or target is None or target.append or source.direct or target.direct:
        return False
    offset, to, length = a["off"], a["off2"], a["len"]
    if to + length > s.capacity or (source.inode is target.inode and abs(offset - to) < length):
        return False
    result, size = s.call(op)
    if s.learn("copy_file_range", result, {*_ABSENT, errno.EXDEV, errno.EINVAL}):
        return True
    s.require(op, result, "copy_file_range")
    due = max(0, min(length, source.inode.size - offset))
    if result > due or (due and not result):
        raise Difference(
            "short",
            f"copy_file_range of {length} bytes returned {result}, where the source has {due}",
            path=s.model.name_of(source.inode),
            offset=offset,
        )
    s.moved(source.inode, offset, offset + result, target.inode, to - offset)
    target.inode.write(to, source.inode.address + offset, result)
    s.check_size(op, target.inode, size)
    return True


def _seek(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"])
    if handle is None:
        return False
    inode = handle.inode
    result, size = s.call(op)
    if s.learn("seek-hole", result, {*_ABSENT, errno.EINVAL}):
        return True
    s.require(op, result, "lseek")
    s.check_size(op, inode, size)
    at = 0
    for start, end in [*result, (inode.size, inode.size)]:
        if not at <= start <= end <= inode.size:
            raise Difference(
                "hole", f"the data at {start:#x} to {end:#x} after {at:#x} makes no sense"
            )
        if not inode.is_zero(at, start):
            offset = next(i for i in range(at, start) if inode.memory[i])
            raise Difference(
                "hole",
                f"SEEK_DATA says that {at:#x} to {start:#x} is a hole; data was written there",
                path=s.model.name_of(inode),
                offset=offset,
            )
        at = end
    return True


def _fsync(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"])
    if handle is None:
        return False
    result, size = s.call(op)
    s.require(op, result, "fdatasync" if a["data"] else "fsync")
    s.check_size(op, handle.inode, size)
    return True


def _fadvise(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"])
    if handle is None:
        return False
    result, size = s.call(op)
    if s.learn("fadvise", result, _ADVISORY | _ABSENT):
        return True
    s.require(op, result)
    s.check_size(op, handle.inode, size)
    return True


def _map(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    handle = _handle(s, op, a["h"], write=a["prot"] == "rw" and a["shared"])
    if handle is None or a["m"] in s.model.mappings:
        return False
    result, _ = s.call(op)
    kind = map_name(a["prot"], a["shared"])
    if s.learn(kind, result, {errno.ENODEV, *(_EXEC if a["prot"] == "rx" else ())}):
        return True
    s.require(op, result, "mmap")
    s.model.mappings[a["m"]] = Mapping(
        op.worker, handle.inode, a["off"], a["len"], a["prot"] == "rw", a["shared"]
    )
    return True


_EXEC = (errno.EPERM, errno.EACCES)  # mounted noexec


def map_name(prot: str, shared: bool) -> str:
    """What a kind of mapping is called; some FUSE filesystems have no shared writable ones."""
    return f"map {prot}" if shared or prot != "rw" else "map rw private"


def _mapping(s: Session, op: Operation, a: dict[str, Any]) -> Mapping | None:
    mapping = s.model.mappings.get(a["m"])
    return mapping if mapping and mapping.worker == op.worker else None


def _remap(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _mapping(s, op, a)
    if mapping is None:
        return False
    result, _ = s.call(op)
    if result == -errno.EFAULT:  # still several areas (virtual memory areas cannot always merge)
        return True
    s.require(op, result, "mremap")
    mapping.forget(mapping.offset + a["len"], mapping.length)
    mapping.length = a["len"]
    return True


def _unmap(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    if _mapping(s, op, a) is None:
        return False
    s.require(op, s.call(op)[0], "munmap")
    del s.model.mappings[a["m"]]
    return True


def _accessible(mapping: Mapping | None, a: dict[str, Any], write: bool) -> Mapping | None:
    """The mapping, if the range lies in it and in the file (for reading, in the last page)."""
    if mapping is None or mapping.unknown or a["off"] + a["len"] > mapping.length:
        return None
    if write and not mapping.writable:
        return None
    end = mapping.inode.size if write else mapping.inode.mapped_end
    return mapping if mapping.offset + a["off"] + a["len"] <= end else None


def _accessed(s: Session, op: Operation, mapping: Mapping, a: dict[str, Any], result: int) -> None:
    place = mapping.offset + a["off"]
    if result in (-errno.EFAULT, -errno.ENOMEM) or 0 <= result < a["len"]:
        raise Difference(
            "sigbus",
            f"{op.kind}: a page inside the file cannot be had",
            path=s.model.name_of(mapping.inode),
            offset=place + max(0, result),
        )
    s.require(op, result)


def _mread(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _accessible(_mapping(s, op, a), a, write=False)
    if mapping is None:
        return False
    result, _ = s.call(op)
    if s.learn(f"mread {a['via']}", result, {errno.EPERM, errno.ENOSYS}):
        return True
    _accessed(s, op, mapping, a, result)
    s.compare_mapped(op, mapping, mapping.offset + a["off"], a["len"], f"mapping, {a['via']}")
    return True


def _mwrite(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _accessible(_mapping(s, op, a), a, write=True)
    if mapping is None:
        return False
    result, _ = s.call(op)
    _accessed(s, op, mapping, a, result)
    s.stored(op, mapping, mapping.offset + a["off"], a["len"], a["from"])
    return True


def _fork(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _accessible(_mapping(s, op, a), a, write=a["write"])
    if mapping is None:
        return False
    result, _ = s.call(op)
    _accessed(s, op, mapping, a, result)
    place = mapping.offset + a["off"]
    seen = mapping
    if a["write"]:
        if not mapping.shared:  # the child's own, of which the parent sees nothing
            seen = copy.deepcopy(mapping, {id(mapping.inode): mapping.inode})
        s.stored(op, seen, place, a["len"], a["from"])
    s.compare_mapped(op, seen, place, a["len"], "mapping, in a forked child")
    return True


POPULATE = (syscalls.MADV_POPULATE_READ, syscalls.MADV_POPULATE_WRITE)


def _madvise(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _mapping(s, op, a)
    if mapping is None or a["off"] + a["len"] > mapping.length:
        return False
    if a["advice"] == syscalls.MADV_POPULATE_WRITE and not mapping.shared:
        return False  # it would copy every page
    result, _ = s.call(op)
    if a["advice"] == mmap.MADV_DONTNEED and result == 0:
        mapping.forget(mapping.offset + a["off"], a["len"])
    if a["count"] and result >= 0:
        s.tally.pmd_mapped(result)
    if -result == errno.EFAULT and a["advice"] in POPULATE:
        if mapping.offset + a["off"] + a["len"] <= mapping.inode.mapped_end:
            _accessed(s, op, mapping, a, result)
    elif result < 0 and -result not in _ADVISORY:
        s.require(op, result)
    return True


def _tail(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping, handle = _mapping(s, op, a), _handle(s, op, a["h"], write=True)
    if mapping is None or handle is None or not mapping.writable or not mapping.shared:
        return False
    inode, start = mapping.inode, mapping.offset + a["off"]
    end = start + a["len"]
    if handle.inode is not inode or not inode.size <= start < end <= inode.mapped_end:
        return False
    if a["off"] + a["len"] > mapping.length or a["size"] > s.capacity or a["size"] == inode.size:
        return False
    result, size = s.call(op)
    s.require(op, result)
    s.writes.append(
        Write(op.number, inode.number, s.model.name_of(inode), start, a["len"], a["from"])
    )
    inode.truncate(a["size"])  # what was stored is gone: POSIX, mmap: "any partial page is zero"
    s.model.truncated(inode)
    s.check_size(op, inode, size)
    return True


def _probe(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    mapping = _mapping(s, op, a)
    if mapping is None or mapping.unknown:
        return False
    inode = mapping.inode
    ends = inode.mapped_end, -(-inode.size // s.limits.beyond_end) * s.limits.beyond_end
    at = [offset for offset in a["at"] if offset < mapping.length]
    result, _ = s.call(op, at=at)
    s.require(op, result)
    arena = s.arena(op)
    for i, (offset, had) in enumerate(zip(at, result, strict=True)):
        place = mapping.offset + offset
        where = {"path": s.model.name_of(inode), "offset": place}
        if place < ends[0] and not had:
            raise Difference("sigbus", "a page inside the file cannot be had", **where)
        if place >= ends[1] and had:
            raise Difference(
                "no-sigbus", f"a page beyond the end ({inode.size:#x}) can be had", **where
            )
        expected = mapping.content(place, 1)[0]
        if had and arena.memory[i] != expected:
            s.differs(inode, place, bytes((expected,)), arena.memory[i : i + 1], "probe")
    return True


def _rename(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    if a["path"] not in s.model.names or a["path"] == a["path2"]:
        return False
    s.require(op, s.call(op)[0])
    s.model.names[a["path2"]] = s.model.names.pop(a["path"])
    _gone(s, a["path"])
    s.check_size(op, s.model.names[a["path2"]], s.model.names[a["path2"]].size)
    return True


def _unlink(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    if a["path"] not in s.model.names:
        return False
    s.require(op, s.call(op)[0])
    del s.model.names[a["path"]]
    _gone(s, a["path"])
    return True


def _gone(s: Session, name: str) -> None:
    if os.path.lexists(f"{s.root}/{name}"):
        raise Difference("errno", f"{name} is still there", path=name)


def _chmod(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    inode = s.model.names.get(a["path"])
    if inode is None:
        return False
    result, _ = s.call(op)
    s.require(op, result)
    inode.mode = a["mode"]
    if result != inode.mode:
        raise Difference("mode", f"mode {result:o} after chmod to {inode.mode:o}", path=a["path"])
    return True


def _busy(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    inode = s.model.names.get(a["path"])
    if inode is None or all(p.inode is not inode for p in s.model.programs.values()):
        return False
    result, _ = s.call(op)
    for what, error in zip(("open for writing", "truncate"), result, strict=True):
        if error != errno.ETXTBSY:
            said = errno_name(error) if error else "possible"
            text = f"{what} of a running program: {said}, where it must be ETXTBSY"
            raise Difference("errno", text, path=a["path"])
    s.check_size(op, inode, inode.size)
    return True


def _clone(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    inode = s.model.names.get(a["path"])
    if inode is None or a["path"] == a["path2"]:
        return False
    result, size = s.call(op)
    s.require(op, result)
    clone = s.model.names.get(a["path2"])
    if clone is None:
        clone = s.model.create(a["path2"], s.capacity)
        clone.mode = 0o755
    clone.truncate(0)
    clone.write(0, inode.address, inode.size)
    clone.truncate(a["size"])
    s.model.truncated(clone)
    s.moved(inode, 0, inode.size, clone, 0)
    s.check_size(op, clone, size)
    return True


def _build(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    result, size = s.call(op)
    s.require(op, result)
    inode = s.model.create(a["path"], s.capacity)
    inode.mode = 0o755
    body = program.build(s.pool.memory[a["from"] : a["from"] + a["len"]])
    s.wrote(op, inode, 0, a["len"], a["from"])
    inode.memory[: len(body)] = body
    s.check_size(op, inode, size)
    return True


def _exec(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    inode = s.model.names.get(a["path"])
    if inode is None or a["x"] in s.model.programs:
        return False
    result, _ = s.call(op)
    if s.learn("exec", result, _EXEC):
        return True
    s.require(op, result)
    sums = program.sums(inode.memory[: inode.size])
    s.model.programs[a["x"]] = Program(op.worker, inode, sums)
    return True


def _sum(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    running = s.model.programs.get(a["x"])
    if running is None or running.worker != op.worker:
        return False
    inode = running.inode
    expected = running.sums
    result, _ = s.call(op, expected=expected, len=inode.size)
    s.require(op, result)
    if result[0] == "died":
        del s.model.programs[a["x"]]
        raise Difference("crash", f"a program of {inode.size} bytes ended with {result[1]}")
    s.tally.pmd_mapped(result[2])
    if result[1] != expected:
        s.compare(op, inode, 0, inode.size, "text of a running program")
        raise Difference(
            "garbage",
            "a running program summed its text wrongly, though the text reads right",
            path=s.model.name_of(inode),
            expected=expected.hex(" ", 8),
            found=result[1].hex(" ", 8),
        )
    s.tally.bytes_compared += inode.size
    return True


def _end(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    running = s.model.programs.get(a["x"])
    if running is None or running.worker != op.worker:
        return False
    del s.model.programs[a["x"]]
    result, _ = s.call(op)
    if result:
        raise Difference("crash", f"a program ended with {result} where it must end with 0")
    return True


def _whole(s: Session, op: Operation, a: dict[str, Any]) -> bool:
    inode = s.model.names.get(a["path"])
    if inode is None:
        return False
    if f"map {'rx' if a['via'] == 'exec' else 'r'}" in s.tally.unsupported and a["via"] != "read":
        return False
    result, size = s.call(op)
    if a["via"] == "exec" and s.learn("map rx", result, {errno.ENODEV, *_EXEC}):
        return True
    if a["via"] == "mmap" and s.learn("map r", result, {errno.ENODEV}):
        return True
    s.require(op, result, f"whole file by {a['via']}")
    s.check_size(op, inode, size)
    fresh = syscalls.statx_size(f"{s.root}/{a['path']}", fresh=True)
    if fresh != inode.size:
        raise Difference("size", f"statx says {fresh} bytes, not {inode.size}", path=a["path"])
    done, pmd = result
    if a["via"] != "read" and inode.size >= PMD:
        s.tally.pmd_mapped(pmd)
    due = inode.size if a["via"] == "read" else inode.mapped_end
    cold = ", after dropping it from the cache" if a["cold"] else ""
    s.compare(op, inode, 0, min(done, due), f"whole file by {a['via']}{cold}")
    if done != due:
        raise Difference("short", f"reading to the end gave {done} of {due} bytes", path=a["path"])
    return True


_CHECKS: dict[str, _Check] = {
    function.__name__.strip("_"): function
    for function in (
        _open, _close, _read, _write, _truncate, _fallocate, _copy, _seek, _fsync, _fadvise,
        _map, _remap, _unmap, _mread, _mwrite, _fork, _madvise, _tail, _probe, _rename, _unlink,
        _chmod, _build, _exec, _sum, _busy, _clone, _end, _whole,
    )
}  # fmt: skip
KINDS = tuple(_CHECKS)
