"""The manual pages that mount-helpers/install makes of the documents."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.installed import CHECKOUT

PAGES = ("largefs.1", "mount.largefs.8", "largefs-check.8", "largefs-stress.1")


def manual(root: Path, page: str) -> Path:
    return root / "usr/local/share/man" / f"man{page[-1]}" / page


def rendered(page: Path) -> str:
    """What man(1) shows of it; fails on what groff warns of, but for lines that it cannot adjust."""
    done = subprocess.run(
        ["man", "--warnings", "--local-file", page],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "120"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "cannot adjust line" not in line] == []
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_page(root: Path, page: str) -> None:
    name, section = page.rsplit(".", 1)
    shown = rendered(manual(root, page))
    assert re.match(rf"{re.escape(name)}\({section}\)", shown)
    whatis = subprocess.run(["lexgrog", manual(root, page)], capture_output=True, text=True)
    assert f'"{name} - ' in whatis.stdout, whatis


def test_each_mount_option_has_its_paragraph(root: Path) -> None:
    document = (CHECKOUT / "docs/mount-options.md").read_text()
    options = re.findall(r"^### (.+)$", document, re.MULTILINE)
    shown = rendered(manual(root, "mount.largefs.8"))
    assert len(options) > 5
    for option in options:
        assert re.search(rf"^ *{re.escape(option.replace('`', ''))}$", shown, re.MULTILINE), option
    assert len(re.findall(r"^ +(?:•|-|o)\s+Default:", shown, re.MULTILINE)) >= len(options)
