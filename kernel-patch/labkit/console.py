"""The verdict on a guest's console: anything the kernel complains of fails the run."""

import re
from pathlib import Path

# What the kernel prints when it is wrong. Each is a phrase of the report's first line.
COMPLAINT = re.compile(
    r"BUG:|Oops|WARNING:|INFO: task .* blocked .*for more than|general protection fault"
    r"|KASAN:|UBSAN:|KFENCE:|kernel BUG at|Kernel panic|Bad page (state|map|cache)|BUG: Bad"
    r"|possible (circular|recursive) locking|inconsistent lock state|possible irq lock inversion"
    r"|suspicious RCU usage|bad unlock balance|held lock freed|lock held when returning to user"
    r"|sleeping function called from invalid context|scheduling while atomic"
    r"|rcu: INFO: .*stall|soft lockup|hard LOCKUP|unable to handle|list_(add|del) corruption"
    r"|refcount_t:|detected stall|Out of memory|oom-kill|invoked oom-killer"
)

_STAMP = re.compile(r"^\s*\[\s*\d+\.\d+\]\s?")


def complaints(log: Path) -> list[str]:
    """The lines of a console log by which the kernel reports that something is wrong, in order."""
    text = log.read_text(errors="replace").replace("\r", "")
    return [_STAMP.sub("", line) for line in text.splitlines() if COMPLAINT.search(line)]
