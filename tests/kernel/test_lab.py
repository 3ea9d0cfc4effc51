"""The host's half of the suite: boot the kernel with the series, run this suite in its guest."""

import subprocess
from pathlib import Path

import pytest

LAB = Path(__file__).parents[2] / "kernel-patch" / "lab"
CANNOT_RUN = 77  # the lab's exit status


@pytest.mark.timeout(3600)
def test_kernel_with_the_series(capfd: pytest.CaptureFixture[str]) -> None:
    """About ten minutes the first time, when the kernel is built; then it comes from the cache."""
    with capfd.disabled():  # it takes minutes: show how it gets on
        done = subprocess.run([LAB, "test", "7.3-series"])
    if done.returncode == CANNOT_RUN:
        pytest.skip("this machine lacks what kernel-patch/lab needs: see its message above")
    assert done.returncode == 0, "see the lab's table above"
