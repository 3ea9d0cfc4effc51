"""largefs itself on this kernel: by each route that the kernel should have, real programs run."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from largefs.hugetext.routes import Route
from tests.kernel import pages
from tests.kernel.programs import BIGTEXT_BLOCKS, program
from tests.mounts import Mount, Mounts, largefs

# By the way text gets large folios in FUSE's own cache (the fixture `route`): what largefs can take.
# Passthrough needs Linux 6.9 and huge text on the scratch disk's ext4: by its large folios, which
# 6.16 brought, or before that by MADV_COLLAPSE where the kernel has READ_ONLY_THP_FOR_FS.
POSSIBLE = {
    "folio": {Route.PASSTHROUGH, Route.FOLIO},
    "none": {Route.PASSTHROUGH},
    "collapse": {Route.PASSTHROUGH, Route.COLLAPSE},
}


@contextmanager
def at_work(path: Path, *arguments: str, **environment: str) -> Iterator[int]:
    """Run a program of the mount until it has said something; yields its process id."""
    process = subprocess.Popen(
        [path, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout
        assert process.stdout.readline(), "the program said nothing"
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def mounted(mounts: Mounts, source: Path, route: Route | None) -> Mount:
    """A mount of an import of `source`, nothing of it cached."""
    store = source.with_name("store")
    largefs("mkfs", store)
    largefs("import", source, store)
    pages.drop_caches()
    return mounts.make(*([f"route={route.value}"] if route else []), store=store)


@pytest.mark.parametrize("wanted", [Route.PASSTHROUGH, Route.FOLIO, Route.COLLAPSE])
def test_route(
    wanted: Route,
    route: str,
    mounts: Mounts,
    tmp_path: Path,
    record_coverage: Callable[[str, pages.Coverage], None],
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(program("bigtext"), source)
    mount = mounted(mounts, source, wanted)
    path = mount.path / "bigtext"
    with at_work(path) as pid:
        reached = pages.coverage(pid, path)
    assert reached.touched >= BIGTEXT_BLOCKS * pages.PMD
    taken = Route(os.getxattr(path, "user.largefs.route").decode())
    if wanted in POSSIBLE[route]:
        assert taken is wanted
        record_coverage(f"largefs {wanted.value}", reached)
        assert reached.ratio >= 0.95
    else:
        assert taken is Route.NONE
        assert reached.pmd_mapped == 0
    assert path.read_bytes() == program("bigtext").read_bytes()


def test_program_copied_into_the_mount(route: str, mounts: Mounts) -> None:
    """A new file that is executable gets large folios at once, by the route that needs no warm-up."""
    if route != "folio":
        pytest.skip("this kernel has no folio route")
    mount = mounts.make(f"route={Route.FOLIO.value}")
    path = mount.path / "bigtext"
    subprocess.run(["cp", program("bigtext"), path], check=True)
    pages.drop_caches()
    with at_work(path) as pid:
        reached = pages.coverage(pid, path)
    assert reached.touched >= BIGTEXT_BLOCKS * pages.PMD
    assert reached.ratio >= 0.95


def test_node(
    route: str,
    mounts: Mounts,
    tmp_path: Path,
    record_coverage: Callable[[str, pages.Coverage], None],
) -> None:
    """A program from a distribution, by the route that largefs chooses."""
    node = os.path.realpath(shutil.which("node") or pytest.skip("nodejs is not installed"))
    libraries = re.findall(r"=> (\S*libnode\S*)", subprocess.getoutput(f"ldd {node}"))
    source = tmp_path / "source"
    source.mkdir()
    for file in (node, *libraries):
        shutil.copy2(file, source)
    mount = mounted(mounts, source, None)
    path = mount.path / os.path.basename((libraries or [node])[0])
    work = "console.log(6 * 7); process.stdin.resume()"
    with at_work(
        mount.path / os.path.basename(node), "-e", work, LD_LIBRARY_PATH=str(mount.path)
    ) as pid:
        reached = pages.coverage(pid, path)
    taken = Route(os.getxattr(path, "user.largefs.route").decode())
    assert taken in POSSIBLE[route]
    record_coverage(f"largefs {taken.value}, node", reached)
    assert reached.touched >= 4 * pages.PMD
    assert reached.ratio >= 0.95
