"""The mount options: what may stand behind -o, and what it means. docs/mount-options.md has the reasons."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from largefs.filesystem.warmup import When
from largefs.hugetext.routes import Route

KERNEL = frozenset("ro rw suid nosuid dev nodev exec noexec sync async".split())
"""Options of mount(2) that libfuse passes on to the kernel."""

IGNORED = frozenset(
    # for mount(8) and fstab(5) alone
    "defaults auto noauto user nouser users nousers owner noowner group nogroup nofail _netdev "
    "comment uhelper helper "
    # always on, and what mountinfo shows of every FUSE mount (mount(8) hands it on at a remount)
    "default_permissions user_id group_id rootmode fd "
    # without effect on any FUSE filesystem: the kernel leaves access times to the daemon
    # (S_NOATIME, fuse_iget() in fs/fuse/inode.c), and libfuse refuses most of them
    "atime noatime relatime norelatime strictatime nostrictatime diratime nodiratime lazytime nolazytime "
    # directories are as durable as commit= says
    "dirsync".split()
)
"""Options that are accepted and change nothing."""


class OptionError(ValueError):
    """An option that is unknown or has a bad value; the text is one line."""


@dataclass(frozen=True)
class Options:
    """The options of one mount."""

    hugetext: When = When.OPEN
    commit: float = 5.0
    """Seconds after which changes are committed without fsync."""
    verify: bool = False
    route: Route | None = None
    """None: the first that works."""
    log: Path | None = None
    """A file for the daemon's messages; None: the system log, or standard error in the foreground."""
    allow_other: bool = field(default_factory=lambda: os.geteuid() == 0)
    kernel: frozenset[str] = frozenset()
    remount: bool = False
    """Change the kernel's options of a mount that is there."""


def parse(text: str, *, sloppy: bool = False) -> Options:
    """Read a comma-separated list; raises OptionError, but with `sloppy` passes over the unknown."""
    options = Options()
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name in IGNORED or name.startswith(("x-", "X-")):
            continue
        if item == "remount":
            options = replace(options, remount=True)
        elif item in KERNEL:
            options = replace(options, kernel=options.kernel - {_opposite(item)} | {item})
        elif known := _ours(options, name, value):
            options = known
        elif not sloppy:
            raise OptionError(f"unknown mount option '{item}'; docs/mount-options.md lists them")
    return options


def _opposite(item: str) -> str:
    """The option of KERNEL that `item` takes back: of two, the last one holds (mount(8))."""
    pairs = {"ro": "rw", "rw": "ro", "sync": "async", "async": "sync"}
    return pairs.get(item) or (item[2:] if item.startswith("no") else "no" + item)


def _ours(options: Options, name: str, value: str) -> Options | None:
    match name:
        case "hugetext":
            return replace(options, hugetext=When(_one_of(name, value, [w.value for w in When])))
        case "route":
            return replace(options, route=Route(_one_of(name, value, [r.value for r in Route])))
        case "commit":
            return replace(options, commit=_seconds(value))
        case "log" if value:
            return replace(options, log=Path(value).absolute())
        case "verify" | "noverify" if not value:
            return replace(options, verify=name == "verify")
        case "allow_other" | "noallow_other" if not value:
            return replace(options, allow_other=name == "allow_other")
    return None


def _one_of(name: str, value: str, choices: list[str]) -> str:
    if value not in choices:
        raise OptionError(f"mount option {name}={value}: must be one of {', '.join(choices)}")
    return value


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise OptionError(f"mount option commit={value}: must be 0.1 to 3600 seconds")
    return seconds
