"""Map a file as text and wait: the real mappings of the tests.

    map_file.py PATH OFFSET LENGTH SHIFT [ACTION...]

Maps [OFFSET, OFFSET + LENGTH) privately, readable and executable, at an address congruent to OFFSET
modulo 2 MiB, plus SHIFT. Then does the actions in order, prints the address, and ends with its
standard input. The actions:

    touch         every page
    touch-first   one page, in the first whole block
    write         one page, privately
    split         touch every page while one is protected differently
    hugepage, nohugepage        madvise
    disable       PR_SET_THP_DISABLE
    nobody        become the user nobody
"""

import ctypes
import os
import sys

HUGE = 2 << 20
READ, WRITE, EXEC = 1, 2, 4
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def check(result):
    if result:
        raise OSError(ctypes.get_errno(), "failed")


path, offset, length, shift = sys.argv[1], *map(int, sys.argv[2:5])
with open(path, "rb") as f:
    area = libc.mmap(None, length + 3 * HUGE, 0, 0x22, -1, 0)
    address = -(-area // HUGE) * HUGE + HUGE + offset % HUGE + shift
    if libc.mmap(address, length, READ | EXEC, 0x12, f.fileno(), offset) != address:
        raise OSError(ctypes.get_errno(), "mmap")
for action in sys.argv[5:]:
    inside = -(-address // HUGE) * HUGE + 4096 if length > HUGE else address
    if action == "touch":
        check(libc.madvise(address, length, 22))
    elif action == "touch-first":
        check(libc.madvise(inside, 4096, 22))
    elif action == "hugepage":
        check(libc.madvise(address, length, 14))
    elif action == "nohugepage":
        check(libc.madvise(address, length, 15))
    elif action == "disable":
        check(libc.prctl(41, 1, 0, 0, 0))
    elif action == "write":
        check(libc.mprotect(address, length, READ | WRITE | EXEC))
        ctypes.memset(inside, 0x90, 1)
        check(libc.mprotect(address, length, READ | EXEC))
    elif action == "split":
        check(libc.mprotect(inside, 4096, READ))
        check(libc.madvise(address, length, 22))
        check(libc.mprotect(inside, 4096, READ | EXEC))
    elif action == "nobody":
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        check(libc.prctl(4, 1, 0, 0, 0))  # PR_SET_DUMPABLE: readable to other processes of nobody
    else:
        sys.exit(f"unknown action {action}")
print(hex(address), flush=True)
sys.stdin.read()
