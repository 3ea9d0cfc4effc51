"""A store is held by one daemon, and let go by its end however it ends."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from largefs.store import Store, owner
from tests.mounts import Mounts, largefs


def test_what_was_written_is_there_after_a_remount(mounts: Mounts) -> None:
    m = mounts.make()
    (m.path / "file").write_bytes(b"content")
    m.unmount()
    assert not (m.path / "file").exists()
    m.mount()
    assert (m.path / "file").read_bytes() == b"content"


def test_a_second_mount_of_a_store_is_refused(mounts: Mounts, tmp_path: Path) -> None:
    m = mounts.make()
    other = tmp_path / "other"
    other.mkdir()
    refused = largefs("mount", m.store, other, code=32)
    assert refused.stderr == (
        f"largefs: {m.store}: in use: mounted at {m.path} (pid {m.pid}); end that first\n"
    )
    for command in (["import", "/usr/lib/gcc", m.store], ["export", m.store, tmp_path / "out"]):
        assert "in use: mounted at" in largefs(*command, code=1).stderr
    (m.path / "file").write_bytes(b"the first mount goes on")


def _owner_on_another_host(store: Path) -> owner.Owner:
    """Record that another host holds the store, as its daemon would."""
    other = owner.Owner(
        host="elsewhere", machine="f" * 32, boot="another", pid=1, purpose="mounted at /srv"
    )
    owner.write(store, other)
    return other


def test_a_store_that_another_host_holds_is_refused(mounts: Mounts) -> None:
    m = mounts.make()
    m.unmount()
    _owner_on_another_host(m.store)
    heart = subprocess.Popen(
        ["sh", "-c", 'while :; do touch -c "$1"; sleep 1; done', "heart", m.store / "owner"]
    )
    try:
        refused = largefs("mount", m.store, m.path, code=32)
        assert "in use: mounted at /srv (pid 1 on host elsewhere)" in refused.stderr
    finally:
        heart.kill()
        heart.wait()
        (m.store / "owner").unlink()


def test_a_store_whose_other_host_is_silent_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "SILENCE", 0.5)
    Store.create(tmp_path / "store")
    _owner_on_another_host(tmp_path / "store")
    start = time.monotonic()
    with Store.open(tmp_path / "store", "test"):
        assert time.monotonic() - start >= owner.SILENCE
        assert owner.read(tmp_path / "store") == owner.current("test")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_mount_and_closes_the_store(
    mounts: Mounts, number: signal.Signals
) -> None:
    m = mounts.make()
    (m.path / "file").write_bytes(b"content")
    os.kill(m.pid, number)
    m.wait_for_end()
    assert not (m.store / "owner").exists()
    m.mount()
    assert (m.path / "file").read_bytes() == b"content"


UNFORESEEN = """
from largefs.filesystem.operations import Filesystem
async def forget(self, inodes): raise RuntimeError("unforeseen")
Filesystem.forget = forget
"""


def test_an_error_that_ends_the_mount_is_logged(mounts: Mounts) -> None:
    m = mounts.make(patch=UNFORESEEN)
    m.expected = ["."]
    (m.path / "file").write_bytes(b"content")
    (m.path / "file").unlink()
    m.wait_for_end()
    assert "CRITICAL" in m.log.read_text()
    assert "RuntimeError: unforeseen" in m.log.read_text()
    assert not (m.store / "owner").exists(), "the store was let go all the same"


def test_a_path_that_is_not_ascii(mounts: Mounts, tmp_path: Path) -> None:
    store = tmp_path / "gr\xfcn"
    largefs("mkfs", store)
    m = mounts.make(store=store)
    (m.path / "file").write_bytes(b"content")
    m.unmount()
    m.mount()
    assert (m.path / "file").read_bytes() == b"content"
