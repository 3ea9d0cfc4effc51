"""largefs doctor: which route to 2 MiB pages this machine has, why, and what would give a better
one.
"""

import ctypes
import errno
import importlib
import json
import os
import platform
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
from rich.markup import escape
from rich.table import Table

from largefs.channel.trial import max_pages_limit
from largefs.cli.arguments import json_option
from largefs.cli.errors import CANNOT_RUN, die, explained
from largefs.cli.output import show, size
from largefs.hugetext import mappings, routes
from largefs.hugetext.mappings import PMD
from largefs.store.database import read_format

JSON_SCHEMA = "largefs-doctor-1"

_LIBFUSE_OLDEST = (3, 10)
_FREE_HUGE_ENOUGH = 128 << 20  # bytes; the text of the biggest programs


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    level: Literal["ok", "warn", "bad"]  # fine; works, with a loss; cannot mount
    check: str
    what: str
    do: str = ""  # empty if there is nothing to do


@click.command(short_help="Which route to 2 MiB pages this machine has.")
@click.argument("store", required=False, type=click.Path(path_type=str))
@json_option
def command(store: str | None, as_json: bool) -> None:
    """Explain which route to 2 MiB pages this machine has, why, and what would give a better one.

    Tries things out: a 4 MiB file in STORE, removed at once, and a FUSE connection that nobody else
    sees. STORE may be an empty directory, too; without it, the one for temporary files stands for it.

    Exit code: 0 if all is fine, 1 if largefs works with losses, 2 if it cannot mount.
    """
    with explained(CANNOT_RUN):
        _look_first(store)
        findings, route = examine(store)
    if as_json:
        document = {
            "schema": JSON_SCHEMA,
            "kernel": platform.release(),
            "route": route.value,
            "findings": [asdict(finding) for finding in findings],
        }
        click.echo(json.dumps(document, indent=2))
    else:
        _print(findings, route)
    sys.exit(exit_status(findings))


def _look_first(store: str | None) -> None:
    """End where there is nothing to examine, or nothing to do it with."""
    try:
        mappings.mounts()
    except OSError as e:
        die(f"{e.filename}: {e.strerror}; make it readable: mount -t proc proc /proc", CANNOT_RUN)
    if store is None:
        return
    if not os.path.isdir(store):
        if os.path.lexists(store):
            die(f"{store}: not a directory; name a store, or an empty directory", CANNOT_RUN)
        die(f"{store}: no such directory; make a store with: largefs mkfs {store}", CANNOT_RUN)
    if os.listdir(store):  # else a place where a store could be made
        read_format(Path(store) / "meta.db")


def exit_status(findings: list[Finding]) -> int:
    """0 fine, 1 works with losses, 2 cannot mount."""
    levels = {finding.level for finding in findings}
    return 2 if "bad" in levels else 1 if "warn" in levels else 0


def examine(store: str | None) -> tuple[list[Finding], routes.Route]:
    """Run all checks; the findings, most important first, and the route that a mount would take."""
    companion = _import("largefs.channel._companion", "companion", "warn")
    route_findings, route = _routes(store, able=companion.level == "ok")
    findings = [*_fuse_device(), *_libfuse(), _import("pyfuse3", "pyfuse3", "bad"), companion]
    findings += [*_unprivileged(), *route_findings]
    findings += [*_huge_pages(), *_free_huge_memory(), *_max_pages(), *_perf()]
    if store is not None:
        findings += _space(store)
    return findings, route


def _print(findings: list[Finding], route: routes.Route) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    colour = {"ok": "green", "warn": "yellow", "bad": "bold red"}
    for finding in findings:
        table.add_row(
            f"[{colour[finding.level]}]{finding.level}", finding.check, escape(finding.what)
        )
        if finding.do:
            table.add_row("", "", f"-> {escape(finding.do)}")
    show(table)
    verdict = {
        0: "all is fine",
        1: "works, with losses: see the warnings above",
        2: "cannot mount: see what is bad above",
    }[exit_status(findings)]
    show(f"\nroute: [bold]{route.value}[/bold]; {verdict}")


def _routes(store: str | None, able: bool) -> tuple[list[Finding], routes.Route]:
    """Findings on each route down to the one that is taken; without the companion (`able`), that is
    none.
    """
    place = store if store is not None else tempfile.gettempdir()
    try:
        probe = routes.probe(place)
    except OSError as e:
        what = f"cannot try the routes in {place}: {e.strerror}"
        do = "give a directory you may write to, or run as root"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            do = f"make room: {size(PMD * 2)} for a trial file"
        return [Finding("warn", "route", what, do)], routes.Route.NONE
    findings = []
    for offer in probe.offers:
        name = f"route {offer.route.value}"
        if offer.route is routes.Route.NONE:
            do = "take one of the remedies above"
            findings.append(Finding("warn", name, f"taken: {offer.reason}", do))
        elif offer.works and able:
            findings.append(Finding("ok", name, f"taken: {offer.reason}"))
        else:
            lack = ", but the companion is missing" if offer.works else ""
            prefix = "open" if offer.works else "closed"
            what = f"{prefix}: {offer.reason}{lack}"
            findings.append(Finding("ok", name, what, offer.remedy))
            continue
        return findings, offer.route
    raise AssertionError("the last route is always usable")


def _fuse_device() -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        do = "modprobe fuse; in a container, run it with --device /dev/fuse"
        yield Finding("bad", "/dev/fuse", "missing", do)
    except OSError as e:
        do = "run as root, or give yourself read and write access to /dev/fuse"
        yield Finding("bad", "/dev/fuse", f"cannot be opened: {e.strerror}", do)
    else:
        yield Finding("ok", "/dev/fuse", "can be opened")


def _libfuse() -> Iterator[Finding]:
    install = "apt-get install libfuse3-3 fuse3, or your distribution's libfuse 3"
    try:
        libfuse = ctypes.CDLL("libfuse3.so.4")
    except OSError:
        try:
            libfuse = ctypes.CDLL("libfuse3.so.3")
        except OSError:
            yield Finding("bad", "libfuse", "libfuse 3 is not installed", install)
            return
    libfuse.fuse_pkgversion.restype = ctypes.c_char_p
    version = libfuse.fuse_pkgversion().decode()
    if tuple(int(n) for n in version.split(".")[:2]) < _LIBFUSE_OLDEST:
        oldest = ".".join(map(str, _LIBFUSE_OLDEST))
        yield Finding("bad", "libfuse", f"{version} is too old", f"install {oldest} or later")
    else:
        yield Finding("ok", "libfuse", version)


def _import(module: str, name: str, level: Literal["warn", "bad"]) -> Finding:
    try:
        importlib.import_module(module)
    except ImportError as e:
        loss = "no passthrough, so 4 KiB pages: " if level == "warn" else ""
        do = "install gcc, pkg-config, python3-dev and libfuse3-dev, then install largefs again"
        return Finding(level, name, f"{loss}{e}", do)
    return Finding("ok", name, "can be loaded")


def _unprivileged() -> Iterator[Finding]:
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        yield Finding(
            "bad", "fusermount3", "missing; users other than root need it", "apt-get install fuse3"
        )
    try:
        with open("/etc/fuse.conf") as f:
            allowed = any(line.strip() == "user_allow_other" for line in f)
    except OSError:
        allowed = False
    if not allowed:
        what = "other users, root too, will not see your mounts"
        do = "write user_allow_other into /etc/fuse.conf, if they should"
        yield Finding("ok", "allow_other", what, do)


def _huge_pages() -> Iterator[Finding]:
    if not routes.THP.exists():
        do = "run a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
        yield Finding("warn", "huge pages", "this kernel has none", do)
        return
    pmd = int((routes.THP / "hpage_pmd_size").read_text())
    if pmd != PMD:
        do = "run a kernel with 4 KiB base pages"
        what = f"a PMD of this kernel maps {pmd >> 10} KiB, not 2 MiB"
        yield Finding("warn", "huge pages", what, do)
        return
    switch = (routes.THP / "enabled").read_text().strip()
    yield Finding("ok", "huge pages", f"PMD of 2 MiB; enabled: {switch} (any setting will do)")


def _free_huge_memory() -> Iterator[Finding]:
    try:
        with open("/proc/buddyinfo") as f:
            zones = [[int(count) for count in line.split()[4:]] for line in f]
    except OSError:  # hidden in some containers
        return
    order = (PMD // os.sysconf("SC_PAGE_SIZE")).bit_length() - 1
    pages = sum(count << i for zone in zones for i, count in enumerate(zone) if i >= order)
    free = pages * os.sysconf("SC_PAGE_SIZE")
    what = f"{free >> 20} MiB free in pieces of 2 MiB or more"
    if free < _FREE_HUGE_ENOUGH:
        do = "as root: echo 1 >/proc/sys/vm/compact_memory; or free some memory"
        yield Finding("warn", "memory", what, do)
    else:
        yield Finding("ok", "memory", what)


def _max_pages() -> Iterator[Finding]:
    limit = max_pages_limit()
    wanted = PMD // os.sysconf("SC_PAGE_SIZE")
    if limit is None:
        yield Finding("ok", "request size", "up to 1 MiB; 2 MiB needs Linux 6.13")
    elif limit < wanted:
        what = f"fs.fuse.max_pages_limit is {limit}: requests end at {limit * 4} KiB"
        yield Finding("ok", "request size", what, f"sysctl -w fs.fuse.max_pages_limit={wanted}")
    else:
        yield Finding("ok", "request size", f"up to {limit * 4} KiB")


def _perf() -> Iterator[Finding]:
    error = _open_itlb_counter()
    if not error:
        what, do = "iTLB misses can be counted", ""
    elif error in (errno.EACCES, errno.EPERM):
        what, do = "iTLB misses: no permission to count", "sysctl -w kernel.perf_event_paranoid=1"
    else:
        what, do = f"iTLB misses cannot be counted here: {os.strerror(error)}", ""
        if error in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
            do = "measure on the bare machine: virtual CPUs often have no such counter"
    yield Finding("ok", "perf events", what, do)


def _open_itlb_counter() -> int:
    """Try perf_event_open(2) for this process's iTLB read misses; the error number, 0 if it
    works.
    """
    number = {"x86_64": 298, "aarch64": 241}.get(platform.machine())
    if number is None:
        return errno.ENOSYS
    hardware_cache, itlb, read, miss, version0 = 3, 4, 0, 1, 64
    exclude_kernel = 1 << 5
    attributes = struct.pack(
        "IIQ4Q", hardware_cache, version0, itlb | read << 8 | miss << 16, 0, 0, 0, exclude_kernel
    )
    buffer = ctypes.create_string_buffer(attributes.ljust(version0, b"\0"), version0)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(number), buffer, 0, -1, -1, ctypes.c_ulong(0))
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def _space(store: str) -> Iterator[Finding]:
    vfs = os.statvfs(store)
    free, total = vfs.f_bavail * vfs.f_frsize, vfs.f_blocks * vfs.f_frsize
    fstype = routes.filesystem_type(store)
    what = f"{fstype}, {size(free)} of {size(total)} free"
    if vfs.f_flag & os.ST_RDONLY:
        yield Finding("bad", "store", f"{what}, read-only", "remount it read-write")
    elif free < max(total // 50, PMD):
        yield Finding("warn", "store", what, "free some space: an extent takes 2 MiB at a time")
    else:
        yield Finding("ok", "store", what)
    if not os.listdir(store):
        what = f"{store} is empty, so no largefs store"
        yield Finding("bad", "store", what, f"make it one: largefs mkfs {store}")
