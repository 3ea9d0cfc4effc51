"""A small program that reads all of its own text and says what it saw.

The generated ELF executable has one read-only, executable segment, which is the whole file, at a 2
MiB-aligned address. For each byte on its standard input it sums the segment, word by word, and
writes two sums of 8 bytes: of the words, and of the running sums, so that pages that changed places
show. The byte ``h`` makes it ask for huge pages first (MADV_HUGEPAGE). It ends at the end of its
input.
"""

from __future__ import annotations

import os
import platform
import struct
from array import array
from dataclasses import dataclass
from itertools import accumulate

BASE = 0x4000_0000
_CODE_AT = 0xC0
_MASK = (1 << 64) - 1

# x86-64, Intel syntax; 0x40000060 is p_filesz in the program header at the start of the segment
_CODE = bytes.fromhex(
    "4883ec20"  # sub rsp, 32
    "31c0 31ff 4889e6 ba01000000 0f05"  # next: read(0, rsp, 1)
    "4883f801 7560"  # cmp rax, 1; jne done
    "803c2468 7518"  # cmp byte ptr [rsp], 'h'; jne sum
    "b81c000000 bf00000040 8b342560000040 ba0e000000 0f05"  # madvise(BASE, p_filesz, MADV_HUGEPAGE)
    "be00000040 8b0c2560000040 c1e903"  # sum: rsi = BASE; ecx = p_filesz / 8
    "4531c0 4531c9"  # xor r8d, r8d; xor r9d, r9d
    "4c0306 4d01c1 4883c608 ffc9 75f2"  # again: r8 += [rsi]; r9 += r8; rsi += 8; loop
    "4c890424 4c894c2408"  # mov [rsp], r8; mov [rsp + 8], r9
    "b801000000 bf01000000 4889e6 ba10000000 0f05 eb8c"  # write(1, rsp, 16); jmp next
    "b83c000000 31ff 0f05"  # done: exit(0)
)


def supported() -> bool:
    """Whether this machine can run the program."""
    return platform.machine() == "x86_64"


def build(body: bytes) -> bytes:
    """The executable, as long as ``body`` (a multiple of 8 bytes), which fills the rest of it."""
    assert len(body) % 8 == 0 and len(body) > 4096
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,  # ET_EXEC
        62,  # EM_X86_64
        1,
        BASE + _CODE_AT,
        64,
        0,
        0,
        64,
        56,
        2,
        0,
        0,
        0,
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, BASE, BASE, len(body), len(body), 2 << 20)
    stack = struct.pack(
        "<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16
    )  # PT_GNU_STACK: not executable
    head = (header + load + stack).ljust(_CODE_AT, b"\0") + _CODE
    return head + body[len(head) :]


def sums(text: bytes) -> bytes:
    """What the program answers when its segment holds ``text``."""
    words = array("Q", text)
    total = sum(words) & _MASK
    running = sum(accumulate(words)) & _MASK
    return struct.pack("<QQ", total, running)


@dataclass(frozen=True)
class Running:
    """A running program: its process, and the pipes to and from it."""

    pid: int
    to: int
    back: int

    def sums(self, huge: bool) -> bytes:
        """The sums of its text as it sees it; b"" when it died (``ended`` tells of what)."""
        try:
            os.write(self.to, b"h" if huge else b"s")
            return os.read(self.back, 16)
        except BrokenPipeError:
            return b""

    def ended(self) -> int:
        """Close the pipes, which ends it, and wait; exit code, negative for a signal."""
        os.close(self.to)
        os.close(self.back)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start(path: str) -> Running:
    """Execute the program at ``path``; raises OSError as posix_spawn(3) does."""
    to_child, from_child = os.pipe(), os.pipe()
    try:
        pid = os.posix_spawn(
            path,
            [path],
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, to_child[0], 0),
                (os.POSIX_SPAWN_DUP2, from_child[1], 1),
            ],
        )
    except OSError:
        os.close(to_child[1])
        os.close(from_child[0])
        raise
    finally:
        os.close(to_child[0])
        os.close(from_child[1])
    return Running(pid, to_child[1], from_child[0])
