"""The units, and the protocol between the daemon and systemd (sd_notify(3))."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.installed import CHECKOUT
from tests.mount_helpers.conftest import Shell
from tests.mounts import LARGEFS, reason_not_to_mount


def test_messages_to_the_journal_have_its_priorities(here: Path, store: Path) -> None:
    """And neither name nor time, which the journal adds (sd-daemon(3)); elsewhere they have a name."""
    if reason := reason_not_to_mount():
        pytest.skip(reason)
    for name in ("journal", "terminal"):
        with open(here / name, "w") as log:
            st = os.fstat(log.fileno())
            daemon = subprocess.Popen(
                [LARGEFS, "mount", "-f", store, here / "mnt"],
                env={
                    **os.environ,
                    "JOURNAL_STREAM": f"{st.st_dev}:{st.st_ino + (name != 'journal')}",
                },
                stderr=log,
            )
        try:
            deadline = time.monotonic() + 20
            while "mounted at" not in (here / name).read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            daemon.terminate()
            assert daemon.wait(20) == 0
    store_mounted = rf"{re.escape(str(store))}: mounted at {re.escape(str(here / 'mnt'))}; "
    assert re.match(f"<6>{store_mounted}", (here / "journal").read_text())
    assert re.match(
        rf"largefs\[{daemon.pid}\]: INFO: {store_mounted}", (here / "terminal").read_text()
    )


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_is_told_when_the_mount_is_usable(here: Path, store: Path, abstract: bool) -> None:
    if reason := reason_not_to_mount():
        pytest.skip(reason)
    address = f"@largefs-test-{os.getpid()}" if abstract else str(here / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0") if abstract else address)
        systemd.settimeout(20)
        daemon = subprocess.Popen(
            [LARGEFS, "mount", "-f", store, here / "mnt"],
            env={**os.environ, "NOTIFY_SOCKET": address},
            stderr=subprocess.DEVNULL,
        )
        try:
            assert systemd.recv(4096).decode().splitlines()[0] == "READY=1"
            assert (here / "mnt/file").read_text() == "text\n"
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(20) == 0
            assert not (here / "mnt").is_mount()
        finally:
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()
                subprocess.run(["umount", "-l", here / "mnt"], check=False)


def test_the_units_are_valid(shell: Shell) -> None:
    """As systemd sees them, with /opt/largefs in its place."""
    if not Path("/usr/bin/systemd-analyze").exists():
        pytest.skip("no systemd-analyze")
    units = CHECKOUT / "mount-helpers/systemd"
    said = shell(
        f"cp {units}/* .; cp largefs@.service largefs@gcc.service;"
        "systemd-analyze verify --man=no ./largefs@gcc.service ./mnt-largefs-gcc.mount"
    )
    ours = [line for line in said.stderr.splitlines() if "largefs" in line]
    assert not ours


def test_the_unit_does_as_it_says(shell: Shell) -> None:
    """Its command line and its capabilities, by hand: there is no systemd in a test."""
    unit = (CHECKOUT / "mount-helpers/systemd/largefs@.service").read_text()
    values = dict(
        line.split("=", 1) for line in unit.splitlines() if "=" in line and line[0] != "#"
    )
    keep = values["CapabilityBoundingSet"].lower().replace("cap_", "").split()
    bounds = "-all," + ",".join(f"+{c}" for c in keep)
    command = values["ExecStart"].replace("/var/lib/largefs/%i", "$PWD/store")
    command = command.replace("/mnt/largefs/%i", "$PWD/mnt")
    said = shell(
        f"""
        mkdir from mnt; cp /usr/bin/python3 from; $ROOT/usr/local/bin/largefs mkfs store
        $ROOT/usr/local/bin/largefs import from store >/dev/null
        setpriv --no-new-privs --bounding-set {bounds} -- {command} 2>log &
        for i in $(seq 100); do findmnt mnt >/dev/null && break; sleep 0.1; done
        mnt/python3 -c 'import os; print(os.getxattr("mnt/python3", "user.largefs.route").decode())'
        mkdir mnt/new; chown 1:1 mnt/new; mknod mnt/null c 1 3; setcap cap_chown=ep mnt/python3 || true
        kill %1; wait %1; ! findmnt mnt
        """
    )
    assert said.stdout.split()[0] in ("passthrough", "folio", "collapse", "none")


def test_the_sysctl_is_what_the_kernel_takes() -> None:
    limit = Path("/proc/sys/fs/fuse/max_pages_limit")
    if not os.access(limit, os.W_OK) or os.geteuid():
        pytest.skip("no fs.fuse.max_pages_limit here (Linux 6.13 and later), or not ours to change")
    before = limit.read_text()
    try:
        subprocess.run(
            ["sysctl", "-q", "-p", CHECKOUT / "mount-helpers/60-largefs.conf"], check=True
        )
        assert limit.read_text() == "1024\n"
    finally:
        limit.write_text(before)
