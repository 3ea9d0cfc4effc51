"""-o verify, without a mount."""

import stat
from pathlib import Path

import pytest

from largefs.filesystem import verify
from largefs.store import ROOT_INODE, Store


async def test_what_is_good_does_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "REMEMBERED", 3, raising=False)
    Store.create(tmp_path / "store")
    with Store.open(tmp_path / "store", "a test") as store:
        checked = verify.Verify(store, enabled=True)
        for name in range(10):
            row = store.make(ROOT_INODE, b"%d" % name, stat.S_IFREG | 0o644, 0, 0)
            await checked.on_open(row._replace(writing=0))
            assert row.id in checked._good
            assert len(checked._good) <= 3
