"""The stress tool with its oracle on a plain passthrough filesystem that opted in.

Requests of 1 MiB (folios are capped below the PMD) and of 4 MiB, with and without the writeback
cache. LARGEFS_LAB_OPS says how many operations for each; the long run is 100000.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.conftest import GUEST, SLOW, Mounted

OPS = int(os.environ.get("LARGEFS_LAB_OPS", "500"))
LARGEFS = Path(sys.executable).with_name("largefs")
MIB = 1 << 20


@pytest.mark.timeout(OPS * SLOW + 300)
@pytest.mark.parametrize("options", [(), ("--writeback",)], ids=["writethrough", "writeback"])
@pytest.mark.parametrize("max_write", [1 * MIB, 4 * MIB], ids=["1MiB", "4MiB"])
def test_stress(
    max_write: int, options: tuple[str, ...], passthrough: Callable[..., Mounted]
) -> None:
    fs = passthrough("--opt-in", "--max-write", str(max_write), *options)
    seed = random.randrange(1 << 31)
    command = [LARGEFS, "stress", fs.at, "--ops", str(OPS), "--seed", str(seed)]
    command += ["--timeout", "600", "--save", "/run/lab/results" if GUEST else "."]
    # FUSE passes lseek() on without flushing first, and the server knows nothing of dirty pages: so
    # SEEK_DATA misses what is only in the page cache, on the stock kernel as well.
    command += ["--skip", "seek"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}"
