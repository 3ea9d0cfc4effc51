"""The parts of the tool, each against something simpler than itself."""

import ctypes
import mmap
import os
import random
import signal
import subprocess
import time

import pytest

from largefs.stress import program, race, syscalls
from largefs.stress.checks import perform
from largefs.stress.generator import POOL, Generator
from largefs.stress.model import Inode
from largefs.stress.report import Difference, Write, explain
from largefs.stress.session import Limits, Operation, Session, Tally, pmd_taken
from largefs.stress.shrink import shrink
from largefs.stress.syscalls import Arena

SIZE = 1 << 16


def test_model_against_bytes():
    source = Arena(SIZE, random.Random(1).randbytes(SIZE))
    inode, simple, rng = Inode(1, SIZE), bytearray(), random.Random(2)
    for _ in range(3000):
        what, a = rng.randrange(6), rng.randrange(SIZE // 2)
        n = rng.randrange(1, SIZE // 4)
        if what == 0:
            inode.write(a, source.address, n)
            simple.extend(bytes(max(0, a + n - len(simple))))
            simple[a : a + n] = source.memory[:n]
        elif what == 1:
            inode.truncate(a)
            simple[a:] = b""
            simple.extend(bytes(a - len(simple)))
        elif what == 2:
            inode.zero(a, n)
            end = min(a + n, len(simple))
            simple[a:end] = bytes(max(0, end - a))
        elif what == 3 and a + n < len(simple):
            inode.collapse(a, n)
            del simple[a : a + n]
        elif what == 4 and a < len(simple) and len(simple) + n <= SIZE:
            inode.insert(a, n)
            simple[a:a] = bytes(n)
        else:
            end = min(a + n, len(simple))
            assert inode.is_zero(a, end) == (not any(simple[a:end]))
        assert inode.size == len(simple)
        assert inode.memory[:SIZE] == simple.ljust(SIZE, b"\0")


def test_first_difference():
    a, b = Arena(SIZE), Arena(SIZE)
    assert syscalls.first_difference(a.address, b.address, SIZE) is None
    for place in (SIZE - 1, 4097, 1, 0):
        b.memory[place] = 1
        assert syscalls.first_difference(a.address, b.address, SIZE) == place


def test_program_sums_its_own_text(tmp_path):
    if not program.supported():
        pytest.skip("the program is for x86-64")
    path = tmp_path / "program"
    text = program.build(random.Random(3).randbytes((2 << 20) + 4096 + 8))
    path.write_bytes(text)
    path.chmod(0o755)
    done = subprocess.run([path], input=b"shs", stdout=subprocess.PIPE, check=True)
    assert done.stdout == program.sums(text) * 3
    swapped = text[:4096] + text[8192:12288] + text[4096:8192] + text[12288:]
    assert program.sums(swapped) != program.sums(text)


def test_explanations():
    pool = Arena(SIZE, random.Random(4).randbytes(SIZE))
    writes = [
        Write(1, 7, "a", 0, 4096, 0),
        Write(2, 7, "a", 0, 4096, 8192),
        Write(3, 8, "b", 0, 64, 100),
    ]
    old, new = pool.memory[16:32], pool.memory[8208:8224]

    def kind(offset, expected, found):
        return explain(pool, writes, 7, offset, expected, found)[0]

    assert kind(16, new, old) == "lost-write"
    assert kind(16, new, bytes(16)) == "lost-write"
    assert kind(16, bytes(16), old) == "stale"
    assert kind(5000, bytes(16), old) == "misplaced"
    assert kind(16, new, b"\xff" * 16) == "garbage"


STAMP = race._stamp(4, 0, 5)


@pytest.mark.parametrize(
    ("words", "low", "high", "kind"),
    [
        ([STAMP] * 512, 4, 4, None),
        ([0] * 512, 3, 3, None),
        ([0] * 512, 0, 4, None),
        ([0] * 256 + [STAMP] * 256, 3, 4, None),
        ([0] * 256 + [STAMP] * 256, 4, 4, "lost-write"),
        ([STAMP] * 512, 5, 5, "stale"),
        ([STAMP] * 512, 6, 8, "lost-write"),
        ([STAMP] * 512, 2, 3, "garbage"),
        ([race._stamp(4, 0, 6)] * 512, 4, 4, "misplaced"),
        ([12345 << 40 | 0xFFFFF] * 512, 4, 4, "garbage"),
    ],
)
def test_race_judges_a_block(words, low, high, kind):
    found = b"".join(word.to_bytes(8, "little") for word in words)
    answer = race._judge(found, 5, 0, low, high)
    assert (answer and answer[0]) == kind


def test_same_seed_same_operations(tmp_path):
    lists = []
    pool = Arena(POOL, random.Random(5).randbytes(POOL))
    for turn in range(2):
        limits, tally, done = Limits(max_size=3 << 20), Tally(), []
        with Session(f"{tmp_path}/{turn}", pool, limits, tally) as session:
            for op in Generator("seed", session.model, limits, tally, set()):
                perform(session, op)
                done.append(op.as_dict())
                if len(done) == 300:
                    break
        lists.append(done)
    assert lists[0] == lists[1]


def test_shrink_finds_the_two_that_matter():
    operations = [Operation(n, "read", 0, {"len": 1000}) for n in range(500)]

    def reproduce(candidate):
        numbers = [op.number for op in candidate]
        if 123 in numbers and 456 in numbers:
            return Difference("stale", "", operation=456)
        return None

    short, shown = shrink(operations, Difference("stale", ""), reproduce, 10)
    assert [op.number for op in short] == [123, 456] and shown is not None
    assert all(op.arguments["len"] <= 64 for op in short)
    assert shrink(operations, Difference("size", ""), reproduce, 1) == (operations, None)


@pytest.fixture
def session(tmp_path):
    """A session: one file of 8192 bytes, open and mapped by worker 0, two pages beyond its end."""
    pool = Arena(POOL, random.Random(6).randbytes(POOL))
    with Session(f"{tmp_path}/s", pool, Limits(), Tally()) as session:
        flags = os.O_RDWR | os.O_CREAT
        do(session, "open", h=1, path="a", flags=flags)
        do(session, "write", h=1, off=0, len=8192, via="pwrite", **{"from": 0})
        do(session, "map", m=3, h=1, off=0, len=16384, prot="r", shared=True, huge=False)
        yield session


def do(session, kind, **arguments):
    """One operation, that must not be skipped."""
    assert perform(session, Operation(9, kind, 0, arguments))


# What is done to the file behind the model's back, and the class of the difference.
READ = {"h": 1, "off": 0, "len": 8192, "via": "pread"}
MREAD = {"m": 3, "off": 0, "len": 8192, "via": "load"}


@pytest.mark.parametrize(
    ("behind", "kind", "arguments", "expected"),
    [
        (lambda f: f.truncate(100), "mread", MREAD, "sigbus"),
        (lambda f: f.truncate(100), "mread", MREAD | {"via": "copy"}, "sigbus"),
        (lambda f: f.truncate(100), "mread", MREAD | {"via": "vm"}, "sigbus"),
        (lambda f: f.truncate(100), "fork", MREAD | {"write": False, "from": 0}, "sigbus"),
        (lambda f: f.truncate(100), "read", READ, "short"),
        (lambda f: f.truncate(100), "fsync", {"h": 1, "data": False}, "size"),
        (lambda f: f.truncate(9000), "read", READ | {"len": 9000}, "short"),
        (lambda f: f.truncate(9000), "probe", {"m": 3, "at": [0, 8191, 8192]}, "no-sigbus"),
        (lambda f: f.truncate(100), "probe", {"m": 3, "at": [0, 8191, 8192]}, "sigbus"),
        (lambda f: f.pwrite(b"x" * 20, 50), "read", READ, "garbage"),
        (lambda f: f.pwrite(bytes(20), 50), "mread", MREAD, "lost-write"),
        (lambda f: f.pwrite(f.pread(50, 1000), 50), "read", READ, "misplaced"),
        (lambda f: f.unlink(), "rename", {"path": "a", "path2": "b"}, "errno"),
    ],
)
def test_what_happens_behind_the_model(session, behind, kind, arguments, expected):
    behind(_File(f"{session.root}/a"))
    with pytest.raises(Difference) as found:
        do(session, kind, **arguments)
    assert found.value.kind == expected, found.value


class _File:
    """A file by its path, for the lambdas above."""

    def __init__(self, path):
        self.path = path
        self.fd = os.open(path, os.O_RDWR)

    def truncate(self, size):
        os.ftruncate(self.fd, size)

    def pread(self, length, offset):
        return os.pread(self.fd, length, offset)

    def pwrite(self, data, offset):
        os.pwrite(self.fd, data, offset)

    def unlink(self):
        os.unlink(self.path)


RW = {"m": 4, "h": 1, "off": 0, "len": 8192, "prot": "rw", "huge": False}
ALL = {"m": 4, "off": 0, "len": 8192, "via": "load"}


def test_private_copies(session):
    """A private mapping keeps what was written to it, page by page, until the page is cut off."""
    do(session, "map", **RW, shared=False)
    do(session, "mwrite", m=4, off=10, len=100, via="store", sync=False, **{"from": 500})
    do(session, "write", h=1, off=0, len=8192, via="pwritev", **{"from": 9000})
    do(session, "read", **READ)
    do(session, "mread", **ALL)
    assert session.arena(Operation(0, "", 0, {})).memory[10:110] == session.pool.memory[500:600]
    fork = {"m": 4, "off": 50, "len": 5000, "write": True, "from": 100}
    do(session, "fork", **fork)  # what the child writes is its own
    do(session, "mread", **ALL)
    do(session, "truncate", h=1, size=0)
    do(session, "truncate", h=1, size=8192)
    do(session, "mread", **ALL)
    assert session.arena(Operation(0, "", 0, {})).memory[:8192] == bytes(8192)


def test_private_write_must_not_reach_the_file(session):
    do(session, "map", **RW, shared=False)
    do(session, "mwrite", m=4, off=10, len=100, via="store", sync=False, **{"from": 500})
    _File(f"{session.root}/a").pwrite(session.pool.memory[500:600], 10)
    with pytest.raises(Difference) as found:
        do(session, "read", **READ)
    assert found.value.kind == "misplaced" and "a private mapping of a" in found.value.text


@pytest.mark.parametrize("length", [4096, 8192, 4 << 20])
def test_mappings_move(session, length):
    do(session, "map", **RW, shared=True)
    do(session, "madvise", m=4, off=0, len=4096, advice=mmap.MADV_HUGEPAGE, count=False)
    do(session, "remap", m=4, len=length, huge=True)
    do(session, "mwrite", m=4, off=7, len=2000, via="store", sync=True, **{"from": 77})
    do(session, "read", **READ)
    assert session.model.mappings[4].length == length
    do(session, "probe", m=4, at=[0, 4095, *([8191, 8192] if length > 8192 else [])])


@pytest.mark.parametrize("via", ["pread", "preadv", "sendfile", "splice"])
@pytest.mark.parametrize("length", [1, 8000, 200_000])
def test_ways_to_read_and_write(session, via, length):
    write = {"preadv": "pwritev", "splice": "splice"}.get(via, "pwrite")
    do(session, "write", h=1, off=4000, len=length, via=write, **{"from": 12345})
    do(session, "read", h=1, off=3, len=length, via=via)
    _File(f"{session.root}/a").pwrite(b"?", 4000)
    with pytest.raises(Difference) as found:
        do(session, "read", h=1, off=3900, len=length + 100, via=via)
    assert found.value.offset == 4000


def test_direct_reads_and_writes(session):
    do(session, "open", h=9, path="a", flags=os.O_RDWR | os.O_DIRECT)
    if "o-direct" in session.tally.unsupported:
        pytest.skip("this filesystem has no O_DIRECT")
    do(session, "write", h=9, off=4096, len=4096, via="pwrite", **{"from": 8192})
    do(session, "mread", **MREAD)
    do(session, "map", **RW, shared=True)
    do(session, "mwrite", m=4, off=5000, len=10, via="store", sync=False, **{"from": 1})
    do(session, "read", h=9, off=0, len=8192, via="pread")
    unaligned = Operation(9, "read", 0, {"h": 9, "off": 1, "len": 4096, "via": "pread"})
    assert not perform(session, unaligned), "left out, as a shortened replay needs it"


def test_running_programs(session):
    if not program.supported():
        pytest.skip("the program is for x86-64")
    do(session, "build", path="p", len=2 << 20, chunk=1 << 20, **{"from": 0})
    do(session, "exec", x=5, path="p")
    do(session, "sum", x=5, huge=True)
    do(session, "busy", path="p")
    do(session, "chmod", path="p", mode=0o711)
    do(session, "clone", path="p", path2="c", size=5000)
    do(session, "whole", path="c", via="read", cold=True)
    do(session, "sum", x=5, huge=False)
    assert session.call(Operation(9, "end", 0, {"x": 5})) == (0, -1)  # behind the model's back
    with pytest.raises(Difference) as found:
        do(session, "busy", path="p")
    assert found.value.kind == "errno" and "ETXTBSY" in found.value.text


def test_what_takes_a_huge_page_is_counted():
    assert pmd_taken("cut", [0, 1, 2, 5], 3 << 20, 6 << 20) == {"cut: split": 3, "cut: removed": 1}


def test_bytes_behind_the_end(session):
    do(session, "truncate", h=1, size=5000)
    do(session, "mread", m=3, off=4096, len=4096, via="load")
    with open(f"{session.root}/a", "r+b") as file, mmap.mmap(file.fileno(), 5000) as memory:
        address = ctypes.addressof(view := ctypes.c_char.from_buffer(memory))
        ctypes.memset(address + 5000, 0x41, 10)
        del view
        with pytest.raises(Difference) as found:
            do(session, "mread", m=3, off=4096, len=4096, via="load")
    assert (found.value.kind, found.value.offset) == ("tail", 5000)


def test_stored_behind_the_end_and_extended(session):
    do(session, "map", m=4, h=1, off=0, len=8192, prot="rw", shared=True, huge=False)
    do(session, "truncate", h=1, size=5000)
    place = {"off": 5000, "len": 100, "from": 77}
    do(session, "tail", m=4, h=1, size=5001, **place)
    os.truncate(f"{session.root}/a", 5200)  # as if the kernel had kept what was stored
    with open(f"{session.root}/a", "r+b") as file:
        file.seek(5000)
        file.write(session.pool.memory[77:177])
    do_truncate = {"h": 1, "size": 5200}
    do(session, "truncate", **do_truncate)
    with pytest.raises(Difference) as found:
        do(session, "read", h=1, off=4900, len=300, via="pread")
    assert (found.value.kind, found.value.offset) == ("stale", 5000)


@pytest.mark.parametrize(
    ("ranges", "wrong"),
    [
        ([(0, 8192)], False),
        ([(0, 4096), (4096, 8192)], False),
        ([(4096, 8192)], True),
        ([], True),
        ([(0, 4096), (2048, 8192)], True),
        ([(0, 9000)], True),
    ],
)
def test_data_in_a_hole(session, monkeypatch, ranges, wrong):
    monkeypatch.setattr(session, "call", lambda op: (ranges, 8192))
    if not wrong:
        do(session, "seek", h=1)
        return
    with pytest.raises(Difference) as found:
        do(session, "seek", h=1)
    assert found.value.kind == "hole"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a replay file"),
        ("{}\n", "not a replay file"),
        ("not JSON\n", "not a replay file"),
        ('{"largefs-stress": 99}\n', "another version"),
        (
            '{"largefs-stress": 1, "seed": 1, "limits": {"workers": 1}}\n'
            '{"n": 1, "op": "x", "w": 0}\n',
            "no operation 'x'",
        ),
    ],
)
def test_bad_replay_file(tool, tmp_path, content, message):
    path = tmp_path / "replay"
    path.write_text(content)
    done = subprocess.run([*tool, tmp_path, "--replay", path], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--ops", "5", "--mode", "race"),
        ("--ops", "5", "--mode", "programs"),
        ("--mode", "race", "--skip", "race"),
        ("--mode", "programs", "--race", "0"),
        ("--seconds", "0"),
        ("--seconds", "nan"),
        ("--race", "nan"),
    ],
)
def test_what_would_never_end_or_do_nothing(tool, tmp_path, options):
    done = subprocess.run([*tool, tmp_path, *options], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_missing_directory(tool, tmp_path):
    done = subprocess.run([*tool, tmp_path / "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and "No such file" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(tool, tmp_path, number):
    """By a signal to the whole process group, as a terminal and timeout(1) send it."""
    running = subprocess.Popen(
        [*tool, tmp_path, "--race", "0"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # not nohup(1)'s
    )
    while not list(tmp_path.glob("*/session0/file0")):
        assert running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, number)
    said = running.communicate(timeout=30)[1]
    assert "interrupted" in said and said.count("\n") == 1
    assert running.returncode == 2 and not os.listdir(tmp_path)


def test_log_and_sequence(tool, tmp_path):
    """The log tells every operation in words, and which of them were left out."""
    log, root = tmp_path / "log", tmp_path / "root"
    root.mkdir()
    options = ("--ops", "300", "--race", "0", "--seed", "1", "--log", log)
    subprocess.run([*tool, root, *options], check=True, stdout=subprocess.DEVNULL)
    first, second, *rest = log.read_text().splitlines()
    assert first == "session 0" and second.strip() == "1 worker 0: open h=1 path=file0 flags=0x42"
    assert len(rest) > 299 and any("truncate" in line for line in rest)
