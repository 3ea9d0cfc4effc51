"""The collapse route: a helper process calls MADV_COLLAPSE through the mount, then programs run."""

import errno
import shutil
import subprocess
import time
from collections.abc import Callable

from tests.kernel import pages
from tests.kernel.conftest import Mapper, Mounted
from tests.kernel.pages import PMD
from tests.kernel.programs import BIGTEXT_BLOCKS, program

# A helper maps the whole file, so that mapping offset and file offset are congruent.
WORKS = 0


def collapse(helper: Mapper) -> list[int]:
    """MADV_COLLAPSE; again while it says EAGAIN, as madvise(2) has it: a page was in use just then."""
    for _ in range(50):
        result: list[int] = helper.command("collapse")
        if result != [errno.EAGAIN]:
            break
        time.sleep(0.1)
    return result


def test_collapse(
    route: str,
    passthrough: Callable[..., Mounted],
    mapper: Callable[..., Mapper],
    record_coverage: Callable[[str, pages.Coverage], None],
) -> None:
    fs = passthrough("--opt-in", "--max-write", str(4 << 20))
    shutil.copy(program("bigtext"), fs.source)
    path = fs.at / "bigtext"
    pages.drop_caches()
    blocks = path.stat().st_size // PMD
    helper = mapper(path, blocks * PMD)
    result = collapse(helper)
    if route == "none":
        assert result == [errno.EINVAL]
    else:
        assert result == [WORKS]
        assert helper.pmd_mapped() == blocks * PMD

    with subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"%d\n" % (BIGTEXT_BLOCKS * 512)
        reached = pages.coverage(process.pid, path)
    record_coverage("collapse", reached)
    if route == "none":
        assert reached.pmd_mapped == 0
    else:
        assert reached.ratio >= 0.95
    assert path.read_bytes() == program("bigtext").read_bytes()


def test_written_after_collapse(
    route: str, passthrough: Callable[..., Mounted], mapper: Callable[..., Mapper]
) -> None:
    """Opening collapsed text for writing, and writing it, loses nothing."""
    fs = passthrough("--opt-in", "--max-write", str(4 << 20))
    data = bytearray(pages.pattern(2 * PMD))
    (fs.source / "text").write_bytes(data)
    path = fs.at / "text"
    helper = mapper(path, 2 * PMD)
    assert collapse(helper) == [errno.EINVAL if route == "none" else WORKS]
    with path.open("r+b") as f:
        f.seek(PMD - 3)
        f.write(b"across")
    data[PMD - 3 : PMD + 3] = b"across"
    assert helper.read(0, 2 * PMD) == data
    assert path.read_bytes() == data
