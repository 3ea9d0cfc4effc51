"""On the kernel's own filesystems the tool is silent, and really meets huge pages."""

import os
import subprocess

OPTIONS = ("--seed", 7, "--ops", 1200, "--race", 0.5)


def test_where_the_tests_run(stress, tmp_path):
    result = stress(tmp_path, *OPTIONS, expect=0)
    assert result["counts"]["read"] > 100 and result["counts"]["race truncate"] > 0
    assert result["counts"]["race sum"] > 0
    assert result["bytes_compared"] > 10 << 20
    assert not os.listdir(tmp_path)


def test_tmpfs_with_huge_pages(stress, mounted):
    result = stress(mounted("-t", "tmpfs", "-o", "huge=always", "tmpfs"), *OPTIONS, expect=0)
    assert result["pmd_mapped"]["most_bytes"] >= 2 << 20
    if kernel_tells_huge_pages():
        assert split(result) > 0


def kernel_tells_huge_pages():
    """Whether the kernel has PAGEMAP_SCAN, by which the tool sees what was split."""
    return tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 7)


def split(result):
    """How many 2 MiB pages were split by operations on the file."""
    return sum(n for name, n in result["pmd_mapped"]["taken"].items() if name.endswith("split"))


def test_xfs(stress, mounted, tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as out:
        out.truncate(400 << 20)
    subprocess.run(["mkfs.xfs", "-q", str(image)], check=True)
    result = stress(mounted("-o", "loop", str(image)), *OPTIONS, "--tails", expect=0)
    assert result["counts"]["fallocate"] > 20 and result["counts"]["tail"] > 2
    if os.path.exists("/sys/kernel/mm/transparent_hugepage"):
        assert result["pmd_mapped"]["most_bytes"] >= 2 << 20


def test_too_little_room(tool, mounted):
    root = mounted("-t", "tmpfs", "-o", "size=32M", "tmpfs")
    done = subprocess.run([*tool, root], capture_output=True, text=True)
    assert done.returncode == 2 and "free" in done.stderr and done.stderr.count("\n") == 1
    assert not os.listdir(root)
