"""A store on a disk that fails, and in the hands of more than one process."""

import errno
import os
import stat
from pathlib import Path

import pytest

from largefs.store import ROOT_INODE, Store, backing
from largefs.store.store import fail
from largefs.transfer.importer import Importer

FILE = stat.S_IFREG | 0o644


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty store."""
    Store.create(tmp_path / "store")
    return tmp_path / "store"


def test_a_cloned_file_that_cannot_be_read_is_left_out(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone is made without reading: it is the sum that finds what the disk has lost."""

    def clone(_: Importer, fd: int, to: int) -> bool:
        return os.write(to, b"shared") == 6

    def unreadable(*_: object) -> int:
        raise fail(errno.EIO)

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "f").write_bytes(b"shared")
    monkeypatch.setattr(Importer, "_clone", clone)
    monkeypatch.setattr(backing, "read_full", unreadable)
    with Store.open(path, "test") as store:
        tally = Importer(store).run(os.fsencode(tmp_path / "source"))
        assert [reason for _, reason in tally.failed] == [os.strerror(errno.EIO)]
        assert store.find(ROOT_INODE, b"f") is None
