"""Print eligible text before and after alignment, over all ELF files of the packages.

Run it as `.venv/bin/python -m tests.elf.table`; LARGEFS_PACKAGES=all takes more packages.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import NamedTuple

from largefs.hugetext.align import Mode, plan
from largefs.hugetext.view import View
from tests.elf.packages import PACKAGES, Unreachable, elf_files, find, unpacked


class Row(NamedTuple):
    text: int
    headers: int
    before: int
    after: int
    name: str


def main() -> None:
    rows, reasons, packages = [], Counter[str](), 0
    for names in PACKAGES:
        if ":" in names:  # another architecture's
            continue
        try:
            tree = unpacked(find(names))
        except Unreachable as reason:
            print(f"without {names}: {reason}", file=sys.stderr)
            continue
        packages += 1
        for path in elf_files(tree):
            fd = os.open(path, os.O_RDONLY)
            try:
                view = View.of_file(fd)
                p, h = plan(view, Mode.AUTO), plan(view, Mode.HEADERS)
            finally:
                os.close(fd)
            if p.changed or p.text >= 2 << 20:
                reasons[p.reason] += 1
            name = f"{names.partition('|')[0]}: {path.name}"
            rows.append(Row(p.text, h.after, p.before, p.after, name))
    print(f"{len(rows)} ELF files of {packages} packages; text in MiB, eligible\n")
    print("| file | text | before | --align=headers | --align=auto |\n|---|--:|--:|--:|--:|")
    large = [r for r in rows if r.text >= 2 << 20]
    show(total("**all files**", rows))
    show(total(f"**the {len(large)} with 2 MiB of text or more**", large))
    for row in sorted(rows, reverse=True)[:20]:
        show(row)
    print("\nof the files with 2 MiB of text or more:\n")
    for reason, count in reasons.most_common():
        print(f"- {count}: {reason}")


def total(name: str, rows: list[Row]) -> Row:
    return Row(*(sum(column) for column in list(zip(*rows, strict=True))[:4]), name)


def show(row: Row) -> None:
    sizes = [row.text, row.before, row.headers, row.after]
    print(f"| {row.name} | {' | '.join(f'{size / (1 << 20):.1f}' for size in sizes)} |")


if __name__ == "__main__":
    main()
