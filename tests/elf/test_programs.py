"""Programs of the packages do the same work before and after alignment, and say the same."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from elftools.elf.elffile import ELFFile

from tests.elf.overlay import Roots
from tests.elf.packages import elf_files

pytestmark = pytest.mark.timeout(1200)  # the first run downloads

SOURCE = """
int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
int puts(const char *); int printf(const char *, ...);
int main(void) { puts("compiled"); printf("%d\\n", fib(20)); return 7; }
"""


class Job(NamedTuple):
    """Work for programs: a shell script, and the aligned files that must be part of it."""

    name: str
    aligned: str
    """Patterns of file names, any of which must have been changed by alignment."""
    script: str


JOBS = [
    Job(
        "compile C with clang",
        "libclang-cpp.so.* libLLVM-*.so*",
        "c=$(ls /usr/bin/clang-[0-9]* | head -n 1); $c -O2 -S -o - a.c && $c -O2 a.c -o a; ./a",
    ),
    Job(
        "compile Rust",
        "librustc_driver-*.so",
        """echo 'fn main() { let v: Vec<u64> = (1..9).map(|x| x * x).collect();
        println!("{:?} {}", v, v.iter().sum::<u64>()); }' >a.rs
        rustc -O --emit asm=a.s,link=a a.rs && cksum <a.s && ./a""",
    ),
    Job(
        "compile D",
        "ldc2",
        """echo 'int square(int x) { return x * x; }' >a.d
        ldc2 -betterC -O2 -c --output-s -of=a.s a.d && cat a.s""",
    ),
    Job("link with mold", "mold", "gcc -fuse-ld=mold a.c -o a && cksum <a && ./a"),
    Job(
        "link with lld",
        "libLLVM-*.so*",
        "d=$(ls -d /usr/lib/llvm-*/bin | head -n 1); PATH=$d:$PATH gcc -fuse-ld=lld a.c -o a; ./a",
    ),
    Job(
        "query PostgreSQL",
        "postgres",
        """d=$(ls -d /usr/lib/postgresql/*/bin | head -n 1); chown nobody .
        as="setpriv --reuid=65534 --regid=65534 --clear-groups"
        $as $d/initdb -D /tmp/d --no-sync --locale=C -U me >/dev/null && $as $d/postgres --single \
        -D /tmp/d -F postgres <<END
        create table t as select i, md5(i::text) m from generate_series(1, 20000) i
        select count(*), min(m), max(m) from t where i % 7 = 3
END""",
    ),
    Job(
        "query MariaDB",
        "mariadbd",
        """mkdir d; mariadbd --no-defaults --bootstrap --user=root --datadir=/tmp/d --tmpdir=/tmp \
        --log-error=/tmp/log --log-bin=0 <<END
create database b;
create table b.t (i int primary key, m char(32)) engine=InnoDB;
insert into b.t select seq, md5(seq) from (with recursive s(seq) as \
(select 1 union all select seq + 1 from s where seq < 900) select seq from s) q;
select count(*), min(m), max(m) from b.t where i % 7 = 3 into outfile '/tmp/out';
END
        cat out || cat log""",
    ),
    Job(
        "solve with Z3",
        "z3",
        """echo '(declare-const x Int) (declare-const y Int) (assert (= (+ (* x x) (* y y)) 1105))
        (assert (< 0 x y)) (check-sat) (get-model)' | z3 -in""",
    ),
    Job(
        "typeset with Ghostscript",
        "libgs.so.*",
        """echo '/Helvetica findfont 40 scalefont setfont 72 400 moveto (set in type) show
        showpage' >a.ps
        gs -q -dNOPAUSE -dBATCH -sDEVICE=ppmraw -r72 -o a.ppm a.ps && cksum <a.ppm""",
    ),
    Job(
        "encode video with x265",
        "libx265.so.*",
        """seq 1 99999 | head -c 460800 >a.yuv
        x265 --input a.yuv --input-res 320x240 --fps 25 --pools 1 --frame-threads 1 -o a.hevc \
        2>/dev/null && cksum <a.hevc""",
    ),
    Job(
        "multiply matrices with OpenBLAS",
        "libopenblasp-*.so",
        """/usr/bin/python3 -c '
import ctypes, glob, zlib
blas = ctypes.CDLL(glob.glob("/usr/lib/*/openblas-pthread/libopenblasp-*.so")[0])
n = 200
a = (ctypes.c_double * (n * n))(*((i * 37 % 101) / 7 for i in range(n * n)))
c = (ctypes.c_double * (n * n))()
one, zero = ctypes.c_double(1), ctypes.c_double(0)
blas.cblas_dgemm(101, 111, 112, n, n, n, one, a, n, a, n, zero, c, n)
print(c[0], c[n * n - 1], zlib.crc32(bytes(c)))'""",
    ),
    Job(
        "configure with CMake",
        "cmake",
        """echo 'cmake_minimum_required(VERSION 3.20)
        project(p C)
        add_executable(a a.c)' >CMakeLists.txt
        cmake -S . -B build && cmake -E tar cf a.tar --mtime=2020-01-01 a.c && cksum <a.tar""",
    ),
    Job(
        "boot a firmware in QEMU",
        "qemu-system-x86_64",
        r"""printf '\372\260\101\346\351\260\061\346\364' >boot; head -c 501 /dev/zero >>boot
        printf '\125\252' >>boot; timeout 50 qemu-system-x86_64 -display none -debugcon stdio \
        -device isa-debug-exit -drive file=boot,format=raw,readonly=on; echo " $?" """,
    ),
    Job(
        "run JavaScript in Chromium",
        "chromium",
        """page='<p><script>document.write([..."largefs"].sort().join("") + 6 * 7)</script>'
        /usr/lib/chromium/chromium --headless --no-sandbox --disable-gpu --dump-dom \
        "data:text/html,$page" 2>/dev/null""",
    ),
    Job(
        "draw a page with Firefox",
        "libxul.so",
        """mkdir p; /usr/lib/firefox-esr/firefox-esr --headless --no-remote --profile /tmp/p \
        --screenshot /tmp/a.png 'data:text/html,<h1 style="color:green">largefs</h1>' 2>/dev/null
        cksum <a.png""",
    ),
]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A directory for any user, with a C source in it. It is /tmp to the programs."""
    return refill(tmp_path / "work")


def refill(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    directory.chmod(0o777)
    (directory / "a.c").write_text(SOURCE)
    return directory


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_real_work(job: Job, roots: Roots, work: Path) -> None:
    patterns = job.aligned.split()
    names = [Path(path).name for path in roots.changed]
    if not any(fnmatch.filter(names, pattern) for pattern in patterns):
        pytest.skip(f"none of {job.aligned} here, or none that alignment changes")
    before, after = (
        roots.run(root, refill(work), "sh", "-c", job.script)
        for root in (roots.before, roots.after)
    )
    assert before.status in (0, 7), before
    assert before.stdout, before
    assert (after.status, after.stdout) == (before.status, before.stdout)


VERSIONS = r"""
while read -r program; do
    echo "== $program"
    timeout 8 "$program" --version </dev/null >out 2>&1 && echo "== done" || echo "== failed $?"
    head -c 4000 out
done <programs
"""


def test_versions(roots: Roots, work: Path) -> None:
    """Every program that is aligned, or uses a library that is, says the same as before."""
    changed = {Path(path).name for path in roots.changed}
    programs = [
        f"/{path.relative_to(roots.before)}"
        for path in elf_files(roots.before)
        if ".so" not in path.name and os.access(path, os.X_OK) and changed & uses(path)
    ]
    said = []
    for root in (roots.before, roots.after):
        (work / "programs").write_text("".join(f"{p}\n" for p in programs))
        run = roots.run(root, work, "sh", "-c", VERSIONS, seconds=140)
        assert run.status == 0, run
        text = run.stdout.decode(errors="replace")
        said.append(re.sub(r"\d+-\d+-\d+ +\d+:\d+:\d+", "TIME", text))
    assert said[1] == said[0]
    done = said[0].count("== done")
    print(f"{done} of {len(programs)} programs said their version")
    assert done >= 40


def uses(path: Path) -> set[str]:
    """The file's name, and the names of the libraries that it asks for."""
    with path.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")} if dynamic else set()
    return {path.name, *needed, *(dlopen for name, dlopen in DLOPEN if name in needed)}


DLOPEN = [("libjli.so", "libjvm.so")]
"""Libraries that load another one by themselves: every program of Java's does so."""
