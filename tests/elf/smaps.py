"""Coverage by /proc/PID/smaps and pagemap, counted by nobody's code but this (it needs root).

The words are the design's: eligible text, touched, coverage.
"""

from __future__ import annotations

import os
import re
import struct
from typing import NamedTuple

PAGE, PMD = 4096, 2 << 20
ENTRY = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) \S+ \d+\s*(.*)\n")


class Count(NamedTuple):
    """Bytes of one file's text in one process."""

    text: int
    eligible: int
    touched: int
    mapped: int
    """Of the eligible text, mapped by PMDs."""

    @property
    def coverage(self) -> float:
        return self.mapped / self.touched if self.touched else 0.0


def count(pid: int, path: str) -> Count:
    """Count the text of the file `path` in the process `pid`."""
    size = os.stat(path).st_size
    text = eligible = touched = mapped = 0
    ours = False
    with open(f"/proc/{pid}/smaps") as smaps, open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:
        for line in smaps:
            if entry := ENTRY.fullmatch(line):
                start, end, offset = (int(entry[i], 16) for i in (1, 2, 4))
                ours = entry[5] == path and "x" in entry[3] and "w" not in entry[3]
                if not ours:
                    continue
                text += end - start
                for block in range(start + -start % PMD, end - PMD + 1, PMD):
                    at = offset + block - start
                    if at % PMD == 0 and at + PMD <= size:
                        eligible += PMD
                        touched += PMD * present(pagemap.fileno(), block)
            elif ours and line.startswith(("FilePmdMapped:", "ShmemPmdMapped:")):
                mapped += int(line.split()[1]) * 1024
    return Count(text, eligible, touched, mapped)


def present(pagemap: int, block: int) -> bool:
    """Whether any page of the 2 MiB block at this address is present (pagemap's bit 63)."""
    raw = os.pread(pagemap, PMD // PAGE * 8, block // PAGE * 8)
    return any(entry >> 63 for (entry,) in struct.iter_unpack("<Q", raw))
