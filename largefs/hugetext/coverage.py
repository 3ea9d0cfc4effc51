"""Coverage: how much of the executable text of processes is on 2 MiB pages, and why the rest is
not.

Works on every filesystem, from /proc alone. Every byte of an executable file-backed mapping is
accounted for once: it is ineligible, for a Reason; or eligible and untouched; or touched and
PMD-mapped; or touched and not, for a Reason. All numbers are in bytes. coverage = pmd_mapped /
touched (docs/routes.md has the definitions).
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

from largefs.hugetext import mappings
from largefs.hugetext.mappings import PMD, Mapping


class Reason(Enum):
    """Why text is not on a 2 MiB page: a name for machines, what it means, what to do about it."""

    def __init__(self, label: str, meaning: str, remedy: str) -> None:
        self.label, self.meaning, self.remedy = label, meaning, remedy

    # Not eligible, whatever the kernel does.
    SMALL = ("small", "mapping shorter than 2 MiB", "nothing: a 2 MiB page does not fit")
    NOT_CONGRUENT = (
        "not-congruent",
        "address and file offset differ modulo 2 MiB",
        "largefs import aligns it; or link it with -z max-page-size=2097152",
    )
    EDGE = ("edge", "head or tail of the mapping, less than a 2 MiB block", "nothing")
    END_OF_FILE = (
        "end-of-file",
        "last block of the file, not full",
        "nothing: Linux maps none beyond a file's end",
    )
    SIZE_UNKNOWN = (
        "size-unknown",
        "the file's size cannot be read: deleted, or out of reach",
        "run as root",
    )
    # Eligible and touched, but mapped in small pages.
    DISABLED = (
        "disabled",
        "the process switched 2 MiB pages off (PR_SET_THP_DISABLE or MADV_NOHUGEPAGE)",
        "start it without that",
    )
    COPIED = (
        "copied",
        "written to by the process or its debugger (private copy)",
        "nothing, or remove breakpoints",
    )
    MAPPED_SMALL = (
        "mapped-small",
        "in a 2 MiB folio, but mapped by small pages: before the warm-up, or split (mprotect)",
        "start the program again",
    )
    NO_ROUTE = (
        "no-route",
        "this mount has no route to 2 MiB pages on this kernel",
        "see: largefs doctor STORE",
    )
    NO_LARGE_FOLIOS = (
        "no-large-folios",
        "the filesystem keeps its page cache in small folios",
        "run the program from a largefs mount",
    )
    SMALL_FOLIOS = (
        "small-folios",
        "read into the page cache in small folios, without a warm-up",
        "stop the program, then: largefs warm FILE",
    )
    UNTOLD = (
        "untold",
        "small pages; only root can see whether the folio is small",
        "run as root",
    )


# Filesystems whose page cache never holds a 2 MiB folio, up to Linux 7.3: none of them calls
# mapping_set_large_folios(), and btrfs stops below that size. Only words depend on this, never
# numbers.
_SMALL_FOLIO_FILESYSTEMS = {"squashfs", "vfat", "exfat", "iso9660", "udf", "ntfs3", "btrfs"}


@dataclass(slots=True)
class Text:
    """Sums over executable text."""

    length: int = 0  # of the mappings
    eligible: int = 0
    touched: int = 0
    pmd_mapped: int = 0
    why: dict[Reason, int] = field(default_factory=dict)  # bytes by reason, none of them 0

    @property
    def coverage(self) -> float | None:
        """0.0 to 1.0; None if no eligible block was touched.

        Kernels before the SIGBUS fixes of 2025 may map the last, partial block of a file by a PMD
        too; more than all is all.
        """
        return min(1.0, self.pmd_mapped / self.touched) if self.touched else None

    def blame(self, reason: Reason, size: int) -> None:
        """Count `size` bytes as not PMD-mapped for a reason."""
        if size > 0:
            self.why[reason] = self.why.get(reason, 0) + size

    def add(self, other: "Text") -> None:
        """Add another sum to this one."""
        self.length += other.length
        self.eligible += other.eligible
        self.touched += other.touched
        self.pmd_mapped += other.pmd_mapped
        for reason, size in other.why.items():
            self.blame(reason, size)


def total(texts: Iterable[Text]) -> Text:
    """The sum."""
    result = Text()
    for text in texts:
        result.add(text)
    return result


@dataclass(frozen=True, slots=True)
class MappedText:
    """One executable mapping and its account."""

    mapping: Mapping
    text: Text


@dataclass(frozen=True, slots=True)
class Process:
    """One process and the executable mappings that were asked for."""

    pid: int
    program: str  # path of its executable; its comm where that cannot be read
    mapped: list[MappedText]
    text: Text


@dataclass(frozen=True, slots=True)
class Skipped:
    """A process that could not be read."""

    pid: int
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a collection found."""

    processes: list[Process]
    skipped: list[Skipped]


def pids() -> list[int]:
    """All processes of this PID namespace, ascending."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def program_of(pid: int) -> str:
    """Path of a process's executable, or its comm; '' if it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        pass
    try:
        with open(f"/proc/{pid}/comm", "rb") as f:  # any bytes: the process chooses them
            return os.fsdecode(f.read().rstrip(b"\n"))
    except OSError:
        return ""


def collect(
    candidates: Iterable[int], wanted: Callable[[Mapping], bool] = lambda mapping: True
) -> Report:
    """Account for the executable mappings of `candidates` that are `wanted`.

    Processes without such a mapping, and those that end meanwhile, are left out; those that may not
    be read are in `skipped`.
    """
    report = Report([], [])
    for pid in candidates:
        try:
            process = _process(pid, wanted)
        except PermissionError:
            report.skipped.append(Skipped(pid, "no permission: another user's process"))
        except (FileNotFoundError, ProcessLookupError):
            continue
        else:
            if process.mapped:
                report.processes.append(process)
    return report


def _process(pid: int, wanted: Callable[[Mapping], bool]) -> Process:
    program = program_of(pid)
    chosen = [mapping for mapping in mappings.executable_mappings(pid) if wanted(mapping)]
    mapped: list[MappedText] = []
    if chosen:
        pagemap = mappings.open_pagemap(pid)
        try:
            disabled = _thp_disabled(pid)
            for mapping in chosen:
                text = _account(pid, pagemap, mapping, disabled or "nh" in mapping.flags)
                mapped.append(MappedText(mapping, text))
        finally:
            os.close(pagemap)
    return Process(pid, program, mapped, total(m.text for m in mapped))


def _thp_disabled(pid: int) -> bool:
    with open(f"/proc/{pid}/status", "rb") as f:  # it has the comm in it, see program_of
        return b"THP_enabled:\t0\n" in f.read()


def _account(pid: int, pagemap: int, mapping: Mapping, disabled: bool) -> Text:
    text = Text(length=mapping.length, pmd_mapped=mapping.pmd_mapped)
    if mapping.length < PMD:
        text.blame(Reason.SMALL, mapping.length)
        return text
    if not mapping.congruent:
        text.blame(Reason.NOT_CONGRUENT, mapping.length)
        return text
    inner = len(mapping.inner_blocks()) * PMD
    text.blame(Reason.EDGE, mapping.length - inner)
    size = mappings.file_size(pid, mapping)
    if size is None:
        text.blame(Reason.SIZE_UNKNOWN, inner)
        return text
    eligible = mapping.eligible_blocks(size)
    text.eligible = len(eligible) * PMD
    text.blame(Reason.END_OF_FILE, inner - text.eligible)
    present = mappings.present_blocks(pagemap, eligible)
    text.touched = len(present) * PMD
    _blame_small_pages(text, pid, pagemap, mapping, present, disabled)
    return text


def _blame_small_pages(
    text: Text,
    pid: int,
    pagemap: int,
    mapping: Mapping,
    present: list[mappings.Block],
    disabled: bool,
) -> None:
    """Say why the touched blocks that are not PMD-mapped are not."""
    missing = text.touched - text.pmd_mapped
    if missing <= 0:
        return
    if disabled:
        text.blame(Reason.DISABLED, missing)
        return
    copied = sum(PMD for block in present if block.copied)
    suspects = [block for block in present if not block.pmd and not block.copied]
    folios = [mappings.in_pmd_folio(pagemap, block) for block in suspects]
    small = sum(PMD for pmd_folio in folios if pmd_folio is False)
    untold = sum(PMD for pmd_folio in folios if pmd_folio is None)
    if untold:  # without frame numbers, small folios and old mappings look alike
        small, untold = 0, missing - copied
    text.blame(Reason.COPIED, copied)
    text.blame(Reason.UNTOLD, untold)
    if small:
        text.blame(_why_small(pid, mapping), small)
    # What is left has a PMD folio and yet no PMD; a kernel without PAGEMAP_SCAN tells it only by
    # this subtraction.
    text.blame(Reason.MAPPED_SMALL, missing - copied - untold - small)


def _why_small(pid: int, mapping: Mapping) -> Reason:
    fstype = next(
        (mount.fstype for mount in mappings.mounts(pid) if mount.device == mapping.device), ""
    )
    if fstype.split(".")[0] in ("fuse", "fuseblk"):
        path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        try:
            route = os.getxattr(path, "user.largefs.route")
        except OSError:
            return Reason.NO_LARGE_FOLIOS
        return Reason.NO_ROUTE if route == b"none" else Reason.SMALL_FOLIOS
    return Reason.NO_LARGE_FOLIOS if fstype in _SMALL_FOLIO_FILESYSTEMS else Reason.SMALL_FOLIOS
