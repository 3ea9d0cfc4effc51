"""One mount, from its start to its end.

The order at the end is that of durability: the kernel lets go of the mount, what is open for writing is
settled, everything is committed, the store is marked clean and released.
"""

import errno
import functools
import logging
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pyfuse3
import trio

from largefs.channel import Wanted
from largefs.filesystem import CHANNEL, NO_CHANNEL_REASON
from largefs.filesystem.commits import Commits
from largefs.filesystem.files import Files
from largefs.filesystem.hints import Hints
from largefs.filesystem.operations import Filesystem
from largefs.filesystem.options import Options
from largefs.filesystem.verify import Verify
from largefs.filesystem.warmup import Warmup
from largefs.hugetext import routes
from largefs.hugetext.routes import Route
from largefs.store import Store

log = logging.getLogger(__name__)

MAX_REQUEST = 4 * 1024 * 1024
"""Bytes of data in one request, where fs.fuse.max_pages_limit allows as much."""

IDLE_READERS = 8
"""Tasks of pyfuse3 that stay when they have nothing to do; starting one costs as much as a request."""

MAX_TASKS = 10_000
"""Requests that are served at one time. Each open that waits for a warm-up is one, and no lookup, nor the
reading that the warm-up itself does through the mount (route `collapse`), may have to wait for those.
"""

CHECKSUM_TASKS = 2


class MountError(Exception):
    """Why there is no mount, as one line that says what to do."""


def check_mountpoint(mountpoint: Path, store: Path) -> None:
    """Raise MountError unless a store can be mounted there."""
    try:
        is_directory = mountpoint.is_dir()
        exists = mountpoint.exists()
    except OSError as e:
        if e.errno == errno.ENOTCONN:
            raise MountError(
                f"{mountpoint}: a dead mount, its daemon is gone; first: umount {mountpoint}"
            ) from None
        raise MountError(f"{mountpoint}: {e.strerror}") from e
    if not exists:
        raise MountError(f"{mountpoint}: no such directory; make it first: mkdir {mountpoint}")
    if not is_directory:
        raise MountError(f"{mountpoint}: not a directory; name one to mount on")
    if store.resolve().is_relative_to(mountpoint.resolve()):
        raise MountError(
            f"{mountpoint}: holds the store, which the mount would hide; name another directory"
        )
    if mountpoint.is_mount():
        raise MountError(f"{mountpoint}: something is mounted here; first: umount {mountpoint}")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as e:
        raise MountError(
            f"/dev/fuse: {e.strerror}; mount as root, or give yourself read and write access; "
            "in a container give it the device (--device /dev/fuse --cap-add SYS_ADMIN)"
        ) from None
    except OSError:
        raise MountError(
            "/dev/fuse: missing; load the fuse module (modprobe fuse), "
            "in a container give it the device (--device /dev/fuse --cap-add SYS_ADMIN)"
        ) from None


class Mount:
    """A mounted store."""

    def __init__(self, store: Store, mountpoint: Path, options: Options) -> None:
        self._store = store
        self._mountpoint = mountpoint
        self._options = options
        self._commits = Commits(store, options.commit)
        self._files = Files(store, self._commits, CHANNEL)
        self._warmup = Warmup(store, options.hugetext, mountpoint)
        self._operations = Filesystem(
            store,
            self._files,
            self._commits,
            Hints(store, self._warmup),
            self._warmup,
            Verify(store, enabled=options.verify),
            opendir_needed=CHANNEL is None,
        )

    def run(self, on_ready: Callable[[str], None]) -> None:
        """Mount and serve until it is unmounted or SIGTERM, SIGINT or SIGHUP comes.

        `on_ready` gets one line about the route as soon as the mount is usable. Raises MountError.
        """
        _raise_file_limit()
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # somebody broke a lease of backing.has_writer
        probe = _probe(self._store.path)
        if CHANNEL is not None:
            CHANNEL.want(self._wanted(probe))
        try:
            pyfuse3.init(self._operations, str(self._mountpoint), self._fuse_options())
        except RuntimeError as e:
            if type(e) is not RuntimeError:
                raise
            raise MountError(
                f"{self._mountpoint}: the mount was refused; {_who_may_mount()}"
            ) from e
        try:
            try:
                trio.run(functools.partial(self._serve, probe, on_ready))
            finally:
                self._end()
        except Exception as e:  # a group, if it comes from a nursery
            log.critical("%s: the mount ends by an error", self._mountpoint, exc_info=True)
            raise MountError(f"{self._mountpoint}: the mount ended by an error: {e!r}") from e

    def _wanted(self, probe: routes.Probe) -> Wanted:
        """What to ask of the kernel. Passed through, no file has folios in FUSE's own cache.

        So not with the routes that want those; but where there is no route at all, it is quicker.
        """
        asked = self._options.route
        through = (asked or probe.best.route) is Route.PASSTHROUGH
        through |= asked is None and probe.best.route is Route.NONE
        return Wanted(
            max_write=MAX_REQUEST,
            passthrough=probe.backing and through,
            large_folios=asked in (None, Route.FOLIO),
            kill_privileges=True,
            dont_mask=True,
        )

    def _fuse_options(self) -> set[str]:
        fsname = _Encoded(f"fsname={_escape(self._store.path)}")
        options = {"default_permissions", fsname, "subtype=largefs"}
        if self._options.allow_other:
            options.add("allow_other")
        return options | self._options.kernel

    async def _serve(self, probe: routes.Probe, on_ready: Callable[[str], None]) -> None:
        async with trio.open_nursery() as nursery:
            for task in (
                self._commits.run,
                self._commits.run_removals,
                self._files.run_watch,
                self._warmup.run_background,
                *[self._files.run_checksums] * CHECKSUM_TASKS,
            ):
                nursery.start_soon(_never_fails, task)
            if CHANNEL is not None:
                nursery.start_soon(_never_fails, CHANNEL.serve, self._operations)
            nursery.start_soon(self._wait_for_signal)
            nursery.start_soon(self._get_ready, probe, on_ready)
            for inode in self._store.unsettled:
                self._files.settle_later(inode)
            self._store.unsettled = []
            await pyfuse3.main(min_tasks=IDLE_READERS, max_tasks=MAX_TASKS)
            self._warmup.stop()
            nursery.cancel_scope.cancel()

    async def _get_ready(self, probe: routes.Probe, on_ready: Callable[[str], None]) -> None:
        """Use the mount once: then INIT is answered, and it is known which route is open."""
        await trio.to_thread.run_sync(os.stat, self._mountpoint, abandon_on_cancel=True)
        said = self._choose_route(probe)
        log.info("%s: mounted at %s; %s", self._store.path, self._mountpoint, said)
        on_ready(said)

    def _choose_route(self, probe: routes.Probe) -> str:
        """Take the first route that works, and say in one line what that means."""
        usable = {offer.route for offer in probe.offers if offer.works}
        if not self._files.passthrough:
            usable.discard(Route.PASSTHROUGH)
        if not self._files.large_folios:
            usable.discard(Route.FOLIO)
        wanted = self._options.route or next((r for r in Route if r in usable), Route.NONE)
        route = wanted if wanted in usable else Route.NONE
        self._warmup.route = route
        if route is not Route.NONE:
            return f"2 MiB pages by the route {route.value}"
        offers = {offer.route: offer.reason for offer in probe.offers}
        why = NO_CHANNEL_REASON or offers[wanted if wanted is not route else Route.PASSTHROUGH]
        if wanted is Route.NONE:
            why = "asked for" if self._options.route else why
        return f"text in 4 KiB pages: {why} (largefs doctor {self._store.path} says more)"

    async def _wait_for_signal(self) -> None:
        ends = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup(1)
            ends.remove(signal.SIGHUP)
        with trio.open_signal_receiver(*ends) as signals:
            async for number in signals:
                log.info("%s: ends on %s", self._mountpoint, signal.Signals(number).name)
                self._warmup.stop()  # main() waits for the opens that wait for it
                pyfuse3.terminate()
                return

    def _end(self) -> None:
        pyfuse3.close(unmount=True)
        self._files.finish()


def _probe(store: Path) -> routes.Probe:
    """Try the routes. It takes some room: a full disk must be mounted without, to be cleared up."""
    try:
        return routes.probe(store)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = "no room to try the routes; make room and mount again"
        offers = tuple(routes.Offer(route, route is Route.NONE, why) for route in Route)
        return routes.Probe(offers, offered=None, backing=False)


async def _never_fails(task: Callable[..., Awaitable[None]], *args: object) -> None:
    """Run a background task; if it ends by an exception, that must not end the mount."""
    try:
        await task(*args)
    except Exception:
        log.exception("a background task ended: %r", task)


class _Encoded(str):
    """An option with a path in it: pyfuse3 calls encode("us-ascii"), which not every path survives."""

    def encode(self, encoding: str = "", errors: str = "") -> bytes:
        """The bytes of the path."""
        return os.fsencode(str(self))


def _escape(path: Path) -> str:
    """A path within a list of options, as libfuse's fuse_opt.c reads it."""
    return str(path).replace("\\", "\\\\").replace(",", "\\,")


def _raise_file_limit() -> None:
    """Every open inode takes a descriptor or two: as many as the system lets us have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _who_may_mount() -> str:
    if os.geteuid() == 0:
        return "see the message above, and dmesg"
    return "as an ordinary user: install fuse3 for fusermount3, and own the mountpoint"
