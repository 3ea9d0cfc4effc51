"""The layers of an overlay, as containers have them: on a mount all is as on the host's filesystem."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.hugetext.support import mounted
from tests.mounts import Mounts

WORK = """
set -e
cd merged
rm one/file                             # a whiteout
mv one/other two/other                  # copied up, a whiteout
mv two/dir two/renamed                  # EXDEV, so copied, and a whiteout
rm -r three; mkdir three; echo new > three/new  # an opaque directory
echo more >> two/long; chmod 6755 two/long; ln two/long two/again  # copied up, and a link
setfattr -n user.key -v value one
ln -s nowhere link; mkfifo fifo; mknod device c 1 3
touch -d @1000000000 two/long
"""


def snapshot(top: Path) -> dict[str, tuple[object, ...]]:
    """What lstat and xattrs say of all below `top`, without what two runs must differ in."""
    found = {}
    for path in [top, *sorted(top.rglob("*"))]:
        st = path.lstat()
        size = 0 if path.is_dir() else st.st_size
        xattrs = {x for x in os.listxattr(path, follow_symlinks=False) if "origin" not in x}
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        name = str(path.relative_to(top))
        found[name] = (oct(st.st_mode), st.st_nlink, st.st_rdev, size, xattrs, content)
    return found


def prepare(place: Path) -> str:
    """The layers of an overlay in `place`; returns its mount options."""
    for name in ("lower/one", "lower/two/dir/sub", "lower/three", "upper", "work", "merged"):
        (place / name).mkdir(parents=True)
    for name in ("one/file", "one/other", "two/dir/sub/x", "two/dir/y", "three/gone"):
        (place / "lower" / name).write_text(name)
    (place / "lower/two/long").write_bytes(b"long" * (1 << 18))
    return f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"


@pytest.mark.parametrize("options", ["", "route=none"], ids=["passthrough", "daemon"])
def test_layers_on_a_mount(mounts: Mounts, tmp_path: Path, options: str) -> None:
    host = tmp_path / "host"
    host.mkdir()
    mount = mounts.make("dev", *filter(None, [options]))
    results = []
    for place in (host, mount.path):
        layers = prepare(place)
        with mounted("-t", "overlay", "-o", layers, "none", str(place / "merged")):
            subprocess.run(["bash", "-c", WORK], cwd=place, check=True)
            results.append(snapshot(place / "merged"))
        results[-1] |= {f"upper/{k}": v for k, v in snapshot(place / "upper").items()}
    assert results[1] == results[0]
    assert results[1]["upper/one/file"][0] == "0o20000", "a whiteout"
