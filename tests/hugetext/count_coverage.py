#!/usr/bin/env python3
"""Count the coverage of processes straight from /proc/PID/smaps and /proc/PID/pagemap.

    count_coverage.py [--file PREFIX] PID...

An independent check of `largefs report`: it shares no code with it. For each executable file-backed
mapping, of files below PREFIX if given, and in all, prints in bytes:

    eligible   whole 2 MiB-aligned blocks, congruent with the file offset, wholly below EOF
    touched    eligible blocks of which pagemap says that a page is present
    pmd        FilePmdMapped (ShmemPmdMapped on tmpfs)
    coverage   pmd / touched

As root; needs nothing but Python.
"""

import argparse
import os
import struct

HUGE = 2 * 1024 * 1024
PAGE = os.sysconf("SC_PAGE_SIZE")


def text_mappings(pid):
    """Yield (start, end, offset, path, PMD-mapped bytes)."""
    current = None
    with open(f"/proc/{pid}/smaps", errors="backslashreplace") as smaps:
        for line in smaps:
            words = line.split()
            if not words[0].endswith(":"):
                if current:
                    yield current
                start, end = (int(x, 16) for x in words[0].split("-"))
                executable = words[1][2] == "x" and words[4] != "0"
                path = line.split(None, 5)[5].rstrip("\n") if len(words) > 5 else ""
                current = [start, end, int(words[2], 16), path, 0] if executable else None
            elif current and words[0] in ("FilePmdMapped:", "ShmemPmdMapped:"):
                current[4] += int(words[1]) * 1024
            elif current and words[0] == "VmFlags:" and "ht" in words:
                current = None  # hugetlbfs: no page cache, no PmdMapped
    if current:
        yield current


def count(pid, start, end, offset):
    """(eligible, touched) of one mapping."""
    if (start - offset) % HUGE:
        return 0, 0
    size = os.stat(f"/proc/{pid}/map_files/{start:x}-{end:x}").st_size
    eligible = touched = 0
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for block in range((start + HUGE - 1) // HUGE * HUGE, end - HUGE + 1, HUGE):
            if offset + (block - start) + HUGE > size:
                break
            eligible += HUGE
            pagemap.seek(block // PAGE * 8)
            entries = struct.unpack(f"{HUGE // PAGE}Q", pagemap.read(HUGE // PAGE * 8))
            if any(entry & (1 << 63) for entry in entries):
                touched += HUGE
    return eligible, touched


def line(eligible, touched, pmd, name):
    coverage = f"{min(1, pmd / touched):8.3f}" if touched else "       -"
    print(f"{eligible:12} {touched:12} {pmd:12} {coverage}  {name}")


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--file", metavar="PREFIX", default="")
    arguments.add_argument("pid", type=int, nargs="+")
    options = arguments.parse_args()
    print("    eligible      touched          pmd coverage  mapping")
    sums = [0, 0, 0]
    for pid in options.pid:
        for start, end, offset, path, pmd in text_mappings(pid):
            if path.startswith(options.file):
                counts = [*count(pid, start, end, offset), pmd]
                sums = [a + b for a, b in zip(sums, counts, strict=True)]
                if counts[0]:
                    line(*counts, f"{pid} {start:x}-{end:x} {path}")
    line(*sums, "total")


if __name__ == "__main__":
    main()
