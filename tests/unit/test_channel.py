"""The channel without a mount: the edit of INIT, the messages, and the dispatch of hostile ones."""

import errno
import os
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from largefs.channel import Wanted, protocol
from largefs.channel.protocol import IN_HEADER, OUT_HEADER, edit_init

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
KERNEL_6_18 = 0x5FD73FFFFFB
LIBFUSE = 0x4040B039  # what libfuse 3.14 and 3.18 answer pyfuse3
INIT_OUT = "=IIIIHHIIHHIIH22x"


def request(offered: int, minor: int = 45) -> bytes:
    body = struct.pack("=IIIII44x", 7, minor, 1 << 17, offered & 0xFFFFFFFF, offered >> 32)
    return IN_HEADER.pack(IN_HEADER.size + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body


def answer(flags: int, error: int = 0, major: int = 7) -> bytes:
    low, high = flags & 0xFFFFFFFF, flags >> 32
    body = struct.pack(INIT_OUT, major, 31, 1 << 17, low, 12, 9, 1 << 20, 1, 256, 0, high, 0, 0)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), error, 2) + body


def edit(offered: int, flags: int, wanted: Wanted, limit: int = 1024) -> tuple[Any, Any]:
    edited, settled = edit_init(
        request(offered), answer(flags), wanted, pages_limit=limit, page_size=4096
    )
    assert edited[: OUT_HEADER.size] == answer(flags)[: OUT_HEADER.size]
    return struct.unpack_from(INIT_OUT, edited, OUT_HEADER.size), settled


def test_init_on_linux_6_18() -> None:
    out, settled = edit(KERNEL_6_18, LIBFUSE, Wanted())
    assert settled.passthrough
    assert not settled.large_folios
    assert (settled.max_write, settled.max_pages, settled.minor) == (4 << 20, 1024, 31)
    assert out[3] | out[10] << 32 == settled.flags
    assert (out[6], out[8], out[11]) == (4 << 20, 1024, 1)
    assert settled.flags & protocol.EXPLICIT_INVAL_DATA
    assert not settled.flags & protocol.AUTO_INVAL_DATA
    assert not settled.flags & protocol.HANDLE_KILLPRIV_V2


@pytest.mark.parametrize(
    ("limit", "wanted", "pages", "size"),
    [
        (256, 4 << 20, 256, 1 << 20),
        (1024, 2 << 20, 512, 2 << 20),
        (512, (2 << 20) - 1, 512, (2 << 20) - 1),
        (1, 4 << 20, 1, 4096),
        (65535, 1 << 30, 65535, 65535 * 4096),
    ],
)
def test_the_sysctl_bounds_requests(limit: int, wanted: int, pages: int, size: int) -> None:
    out, settled = edit(KERNEL_6_18, LIBFUSE, Wanted(max_write=wanted), limit)
    assert (settled.max_pages, settled.max_write) == (pages, size) == (out[8], out[6])


def test_an_old_kernel_keeps_its_32_pages() -> None:
    out, settled = edit(LIBFUSE & ~protocol.MAX_PAGES & ~protocol.INIT_EXT, 0x39, Wanted())
    assert (settled.max_pages, settled.max_write, out[8]) == (32, 32 * 4096, 0)
    assert not settled.passthrough
    assert settled.flags == 0x39


def test_large_folios_only_when_wanted_and_offered() -> None:
    ours = KERNEL_6_18 | protocol.LARGE_FOLIOS
    assert protocol.LARGE_FOLIOS == 1 << 62
    for offered in (KERNEL_6_18, ours):
        for wanted in (False, True):
            out, settled = edit(offered, LIBFUSE, Wanted(large_folios=wanted))
            assert settled.large_folios == (wanted and offered == ours)
            assert bool(out[10] & 1 << 30) == settled.large_folios


@given(u64, u64, st.builds(Wanted, st.integers(4096, 1 << 32), *[st.booleans()] * 1), u32)
def test_no_flag_that_the_kernel_does_not_offer(
    offered: int, flags: int, wanted: Wanted, limit: int
) -> None:
    out, settled = edit(offered, flags, wanted, limit)
    sent = out[3] | out[10] << 32
    low = flags if flags & protocol.INIT_EXT else flags & 0xFFFFFFFF
    seen = offered if offered & protocol.INIT_EXT else offered & 0xFFFFFFFF
    assert sent & ~seen & ~low == 0
    assert low & ~sent & ~protocol.AUTO_INVAL_DATA == 0
    assert not (sent & protocol.PASSTHROUGH & ~low and sent & protocol.WRITEBACK_CACHE)
    assert 4096 <= settled.max_write <= max(4096, wanted.max_write)
    assert settled.max_pages * 4096 >= settled.max_write
    assert sent == settled.flags
    assert sent >> 32 == 0 or sent & protocol.INIT_EXT


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_strange_reply_is_left_alone(asked: bytes, reply: bytes) -> None:
    edited, settled = edit_init(asked, reply, Wanted(), pages_limit=256, page_size=4096)
    assert settled or edited == reply
    assert len(edited) == len(reply)


@pytest.mark.parametrize(
    "reply", [answer(LIBFUSE, error=-71), answer(LIBFUSE, major=8), answer(LIBFUSE)[:-1], b""]
)
def test_a_refusal_is_passed_on(reply: bytes) -> None:
    edited = edit_init(request(KERNEL_6_18), reply, Wanted(), pages_limit=256, page_size=4096)
    assert edited == (reply, None)


def test_create_out_is_what_libfuse_writes() -> None:
    info = SimpleNamespace(fh=2**64 - 1, direct_io=True, keep_cache=True, nonseekable=False)
    entry = SimpleNamespace(entry_timeout=1e30, attr_timeout=2.5, generation=3, st_ino=4)
    for i, name in enumerate(("size", "blocks", "mode", "nlink", "uid", "gid", "rdev", "blksize")):
        setattr(entry, f"st_{name}", 10 + i)
    entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = 1, -1, 2 * 10**9 + 7
    out = protocol.create_out(info, entry, 5)
    assert len(out) == 128 + 16
    fields = struct.unpack("=QQQQIIQQQQQQIIIIIIIIIIQIi", out)
    assert fields[:6] == (4, 3, 2**63, 2, 999_999_999, 500_000_000)
    assert fields[6:12] == (4, 10, 11, 0, 2**64 - 1, 2)
    assert fields[12:22] == (1, 999_999_999, 7, 12, 13, 14, 15, 16, 17, 0)
    assert fields[22:] == (2**64 - 1, protocol.FOPEN_PASSTHROUGH | protocol.FOPEN_DIRECT_IO, 5)
    out = protocol.create_out(info, entry, 0)
    assert struct.unpack("=QIi", out[128:])[1:] == (
        protocol.FOPEN_DIRECT_IO | protocol.FOPEN_KEEP_CACHE,
        0,
    )


class Memory:
    """Handlers that answer what they were asked, or raise what they are told to."""

    error: BaseException | None = None

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def _ask(self, *args: Any) -> None:
        self.asked.append(args)
        if self.error:
            raise self.error

    async def fallocate(self, *args: int) -> None:
        self._ask("fallocate", *args)

    async def lseek(self, *args: int) -> int:
        self._ask("lseek", *args)
        return 2**40

    async def copy_file_range(self, *args: int) -> int:
        self._ask("copy_file_range", *args)
        return args[4]

    def kill_privileges(self, inode: int) -> None:
        self._ask("kill_privileges", inode)


def message(opcode: int, body: bytes, uid: int = 0) -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, 77, 5, uid, 0, 0, 0, 0) + body


async def ask(operations: object, *messages: bytes) -> tuple[list[bool], list[bytes]]:
    """Dispatch messages; return which were taken, and the answers."""
    from largefs.channel.operations import Dispatcher

    sent: list[bytes] = []
    async with trio.open_nursery() as nursery:
        dispatch = Dispatcher(operations, nursery, sent.append, lambda fh: 0)
        taken = [
            dispatch(struct.unpack_from("=I", m, 4)[0] if len(m) >= 8 else 43, m) for m in messages
        ]
    return taken, sent


FALLOCATE = message(protocol.FALLOCATE, struct.pack("=QqqI4x", 9, 4096, 8192, 3))
COPY = struct.pack("=QqQQqQQ", 1, 2, 3, 4, 5, 2**40, 0)


async def test_dispatch() -> None:
    memory = Memory()
    taken, sent = await ask(
        memory,
        FALLOCATE,
        message(protocol.LSEEK, struct.pack("=QqI4x", 9, 1, 4)),
        message(protocol.COPY_FILE_RANGE, COPY),
        message(protocol.COPY_FILE_RANGE_64, COPY),
    )
    assert taken == [True] * 4
    assert sorted(memory.asked) == [
        ("copy_file_range", 1, 2, 4, 5, 0xFFFFF000, 0),
        ("copy_file_range", 1, 2, 4, 5, 2**40, 0),
        ("fallocate", 9, 3, 4096, 8192),
        ("lseek", 9, 1, 4),
    ]
    assert sorted(sent) == sorted(
        [
            struct.pack("=IiQ", 16, 0, 77),
            struct.pack("=IiQq", 24, 0, 77, 2**40),
            struct.pack("=IiQII", 24, 0, 77, 0xFFFFF000, 0),
            struct.pack("=IiQQ", 24, 0, 77, 2**40),
        ]
    )


async def test_what_is_not_there_is_left_to_libfuse() -> None:
    assert await ask(object(), FALLOCATE, message(50, b""), message(36, b"12345678")) == (
        [False] * 3,
        [],
    )


async def test_errors(caplog: pytest.LogCaptureFixture) -> None:
    from pyfuse3 import FUSEError

    memory = Memory()
    for error, code in (
        (FUSEError(errno.ENOSPC), errno.ENOSPC),
        (FUSEError(99999), errno.EIO),
        (ValueError("a bug"), errno.EIO),
    ):
        memory.error = error
        assert await ask(memory, FALLOCATE) == ([True], [struct.pack("=IiQ", 16, -code, 77)])
    assert "ValueError: a bug" in caplog.text


async def test_privileges_go_before_the_write() -> None:
    memory = Memory()
    write = message(protocol.WRITE, b"\0" * 64, uid=1)
    stranger = message(protocol.FALLOCATE, struct.pack("=QqqI4x", 9, 0, 1, 0), uid=1)
    assert await ask(memory, write) == ([False], [])
    await ask(memory, stranger, message(protocol.COPY_FILE_RANGE, COPY, uid=1), FALLOCATE)
    asked = [a for a in memory.asked if a[0] == "kill_privileges"]
    assert sorted(asked) == [("kill_privileges", 3), *[("kill_privileges", 5)] * 2]
    memory.error = ValueError("a bug")
    refused = ([True], [struct.pack("=IiQ", 16, -errno.EIO, 77)])
    assert await ask(memory, write) == refused
    assert await ask(memory, stranger) == refused


async def test_an_answer_even_to_what_is_cancelled() -> None:
    from largefs.channel.operations import Dispatcher

    class Slow:
        async def fallocate(self, *args: int) -> None:
            await trio.sleep_forever()

    sent: list[bytes] = []
    async with trio.open_nursery() as nursery:
        dispatch = Dispatcher(Slow(), nursery, sent.append, lambda fh: 0)
        assert dispatch(protocol.FALLOCATE, FALLOCATE)
        interrupt = message(protocol.INTERRUPT, struct.pack("=Q", 77))
        assert dispatch(protocol.INTERRUPT, interrupt)
        assert not dispatch(protocol.INTERRUPT, message(protocol.INTERRUPT, struct.pack("=Q", 78)))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sent == [struct.pack("=IiQ", 16, -errno.EINTR, 77)]


@given(
    st.sampled_from([4, 14, 16, 36, 43, 46, 47, 51, 53]),
    st.binary(max_size=80),
    st.integers(0, 120),
)
def test_hostile_requests_get_one_answer_or_none(opcode: int, body: bytes, length: int) -> None:
    hostile = message(opcode, body)[:length]
    taken, sent = trio.run(ask, Memory(), hostile)
    assert len(sent) == taken[0]
    for m in sent:
        size, error, unique = OUT_HEADER.unpack_from(m)
        assert (size, unique) == (len(m), 77)
        assert -512 < error <= 0


def test_load_comes_before_pyfuse3() -> None:
    code = "import pyfuse3; from largefs.channel import load; load()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Unavailable: pyfuse3 was imported before the channel was loaded" in run.stderr


def test_load_is_idempotent_and_brings_no_second_libfuse() -> None:
    code = (
        "from largefs.channel import load; assert load() is load(); import pyfuse3; print({"
        "line.split()[-1] for line in open('/proc/self/maps') if '/libfuse3.so' in line})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.count("/libfuse3.so") == 1


def test_a_missing_companion_is_said() -> None:
    code = (
        "import sys; sys.modules['largefs.channel._companion'] = None\n"
        "from largefs.channel import Unavailable, load\n"
        "try: load()\nexcept Unavailable as e: print(e)\nimport pyfuse3"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("the companion does not load: ")
    assert os.linesep not in run.stdout.strip()
