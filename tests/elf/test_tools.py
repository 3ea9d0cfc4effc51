"""Debugger, profiler and core dump see the same program in an aligned file."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from largefs.hugetext import elf
from largefs.hugetext.align import Mode, plan
from largefs.hugetext.view import View
from tests.elf.files import opened, write_sparse
from tests.elf.packages import Unreachable, find, needed, unpacked

# 4 MiB of text with a function at either end: moved text, that symbols and lines must follow.
SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
__attribute__((noinline)) int first(int n) { return n * 3; }
asm(".text\n.globl filler\nfiller: .fill 4 << 20, 1, 0x90\nret");
void filler(void);
__attribute__((noinline)) int last(int n)
{
	volatile int spin;
	for (spin = 0; spin < n; spin++)
		;
	return first(n) + 1;
}
int main(int argc, char **argv)
{
	filler();
	printf("%d\n", last(argc > 1 ? atoi(argv[1]) : 5));
	if (argc > 2)
		abort();
	return 0;
}
"""


@pytest.fixture(scope="module", params=["ld", "lld"])
def programs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The same PIE, as linked and aligned, under the same name in two directories."""
    directory = tmp_path_factory.mktemp(request.param)
    (directory / "big.c").write_text(SOURCE)
    link, environment = [], None
    if request.param == "lld":
        try:
            trees = [
                unpacked(p) for p in needed([find("lld-14|lld-19"), find("libllvm14|libllvm18")])
            ]
        except Unreachable as reason:
            pytest.skip(str(reason))
        lld = next(lib for tree in trees for lib in tree.glob("usr/lib/llvm-*/bin/ld.lld"))
        libraries = ":".join(str(tree / "usr/lib/x86_64-linux-gnu") for tree in trees)
        environment = {"PATH": f"{lld.parent}:/usr/bin:/bin", "LD_LIBRARY_PATH": libraries}
        link = ["-fuse-ld=lld"]
    old, new = directory / "old/big", directory / "new/big"
    old.parent.mkdir()
    new.parent.mkdir()
    compile_ = [
        "gcc",
        "-g",
        "-O1",
        "-pie",
        "-fPIE",
        "-Wl,--build-id=sha1",
        *link,
        "-o",
        old,
        "big.c",
    ]
    subprocess.run(compile_, cwd=directory, env=environment, check=True)
    with opened(old) as view:
        p = plan(view, Mode.AUTO)
        assert p.before == 0 and p.after >= 2 << 20, p
        assert ("inserted holes" in p.reason) == (request.param == "lld")
        write_sparse(view, p.layout, new)
    return old, new


def said(*argv: str | Path) -> str:
    """What a tool prints, without what two runs do not share: the directory and the process."""
    run = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run
    return re.sub(r"/\S+/(old|new)/|process \d+", "MASKED", run.stdout)


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"no {name} here")


def test_gdb(programs: tuple[Path, Path]) -> None:
    """Breakpoints by symbol and by line, a backtrace, disassembly, values."""
    script = ["-ex", "break last", "-ex", "break big.c:14", "-ex", "run 9", "-ex", "backtrace"]
    script += ["-ex", "info symbol first", "-ex", "x/4i first", "-ex", "continue", "-ex", "print n"]
    script += ["-ex", "info line first", "-ex", "delete", "-ex", "continue"]
    before, after = (said(tool("gdb"), "-nx", "-batch", *script, path) for path in programs)
    assert "Breakpoint 1, last (n=9) at big.c:" in before and "main (argc=2" in before
    hexadecimal = r"0x[0-9a-f]+"
    assert re.sub(hexadecimal, "0x", after) == re.sub(hexadecimal, "0x", before)
    assert [int(a, 16) % 4096 for a in re.findall(hexadecimal, after)] == [
        int(a, 16) % 4096 for a in re.findall(hexadecimal, before)
    ]


def test_addr2line_nm_and_objdump(programs: tuple[Path, Path]) -> None:
    tool("addr2line")
    symbols, again = (said("nm", path) for path in programs)
    assert symbols == again
    addresses = [
        line.split()[0]
        for line in symbols.splitlines()
        if re.search(r" T (first|last|main)$", line)
    ]
    assert len(addresses) == 3
    before, after = (said("addr2line", "-f", "-e", path, *addresses) for path in programs)
    assert before == after and all(
        f"\n{name}\n" in f"\n{before}" for name in ("first", "last", "main")
    )
    before, after = (
        said("objdump", "-d", "--no-show-raw-insn", "--disassemble=last", path) for path in programs
    )
    assert before == after and "<first>" in before


def test_strip_and_objcopy_take_it(programs: tuple[Path, Path], tmp_path: Path) -> None:
    """binutils rewrites an aligned file into one that runs; its p_align stays."""
    tool("strip")
    out = tmp_path / "stripped"
    subprocess.run(["strip", "-o", out, programs[1]], check=True)
    assert said(out, "6") == said(programs[0], "6")


def test_perf(programs: tuple[Path, Path], tmp_path: Path) -> None:
    """Samples of moved text resolve to its symbols.

    Each file has a cache of its own: perf keeps binaries by build id, and believes that two of one
    build id have the same offsets (docs/alignment.md, limits).
    """
    for path in programs:
        perf = [tool("perf"), "--buildid-dir", tmp_path / path.parent.name]
        data = tmp_path / f"{path.parent.name}.data"
        record = [*perf, "record", "-q", "-e", "cpu-clock", "-o", data, path, "300000000"]
        run = subprocess.run(record, capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"perf does not work here: {run.stderr.strip()[-200:]}")
        report = said(*perf, "report", "-i", data, "--stdio", "--sort", "dso,symbol")
        shares = re.findall(r"(?m)^ +([0-9.]+)% +big +\[\.\] last", report)
        assert shares and float(shares[0]) > 50, report


def test_core_dump(programs: tuple[Path, Path], tmp_path: Path) -> None:
    """The kernel dumps the page with the build id, and gdb finds its way from core to symbols."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith("|") or "/" in pattern:
        pytest.skip(f"core dumps go to {pattern}")
    ids = []
    for path in programs:
        home = tmp_path / path.parent.name
        home.mkdir()
        abort = ["sh", "-c", 'ulimit -c unlimited && exec "$0" 5 abort', path]
        subprocess.run(abort, cwd=home, capture_output=True)
        (core,) = home.iterdir()
        trace = said(tool("gdb"), "-nx", "-batch", "-ex", "backtrace", path, core)
        assert re.search(r"main \(argc=3, .*\) at big.c:", trace), trace
        with opened(path) as view:
            build_id = elf.read(view).build_id
        assert build_id in build_ids(core.read_bytes())
        with opened(core) as view:
            assert plan(view, Mode.AUTO).reason == "a core dump"
        ids.append(build_id)
    assert ids[0] == ids[1]


def build_ids(core: bytes) -> list[str | None]:
    """The build ids of the ELF headers in a core dump: each in the first page of its mapping."""
    found = []
    for segment in elf.read(View.of_bytes(core)).loads:
        page = core[segment.p_offset : segment.p_offset + segment.p_filesz]
        if page[:4] == b"\x7fELF":
            for at in range(0, min(len(page), 4096) - 16, 4):
                if page[at : at + 16] == bytes([4, 0, 0, 0, 20, 0, 0, 0, 3, 0, 0, 0]) + b"GNU\0":
                    found.append(page[at + 16 : at + 36].hex())
    return found
