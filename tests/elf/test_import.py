"""Import and export carry out what alignment plans: every piece in its new place, and back again."""

import os
from pathlib import Path

import pytest

from largefs.hugetext.align import Mode, plan
from largefs.hugetext.view import View, reshape
from largefs.store import ROOT_INODE, Store
from largefs.transfer.exporter import Exporter
from largefs.transfer.importer import Importer
from tests.elf import images


@pytest.mark.parametrize(
    "image",
    [images.gnu_ld_pie(), images.lld(pie=True), images.lld(pie=False), images.bolt()],
    ids=["only headers change", "a PIE of lld", "a library of lld", "BOLT"],
)
def test_import_writes_the_plan_and_export_undoes_it(image: bytes, tmp_path: Path) -> None:
    planned = plan(View.of_bytes(image), Mode.AUTO)
    assert planned.changed
    aligned = reshape(View.of_bytes(image), planned.layout)
    source = tmp_path / "source"
    source.mkdir()
    (source / "program").write_bytes(image)
    Store.create(tmp_path / "store")
    with Store.open(tmp_path / "store", "test") as store:
        Importer(store).run(os.fsencode(source))
        row = store.lookup(ROOT_INODE, b"program")
        fd = store.backing.open(row.id, os.O_RDONLY)
        written = os.pread(fd, row.size + 1, 0)
        os.close(fd)
        assert written == aligned.read(0, aligned.size)
        assert row.huge
        Exporter(store).run(b"/", os.fsencode(tmp_path / "out"))
    assert (tmp_path / "out/program").read_bytes() == image
