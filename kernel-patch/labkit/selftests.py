"""`lab selftests`: the series' own selftests, as a maintainer would run them, in a kernel's guest.

They are built from the kernel's tree, with its headers and Makefiles, once for each version of source
and series, and kept in the cache.
"""

import shlex
import shutil
from pathlib import Path

from labkit import source
from labkit.build import build, make
from labkit.cache import LabError, directory, lock, run, say
from labkit.guest import boot
from labkit.matrix import Entry, changes, digest
from labkit.suite import TIMEOUT, problems

PROGRAMS = {
    "filesystems/fuse": ("large_folios_test",),
    "mm": ("exec_huge_fault", "exec_huge_text"),
}
EVERYTHING = "./large_folios_test && ./exec_huge_fault"


def selftests(entry: Entry, command: list[str]) -> int:
    """Run a command (by default all selftests) where they are, in a guest; 1 if anything failed.

    A test that the kernel lacks the means for says so and is skipped.
    """
    if not entry.series:
        raise LabError(f"{entry.name} is without the series, and so without its selftests")
    image, programs = build(entry), _built(entry)
    say(f"running the selftests on {entry.name} in a guest")
    there = f"cd {shlex.quote(str(programs))} && mount -t tmpfs tmpfs /tmp"
    script = f"{there} && {shlex.join(command) or EVERYTHING}"
    with boot(entry, image, script, TIMEOUT) as outcome:
        wrong = problems(outcome)
    print("\n".join(wrong) or f"{entry.name}: all passed, in {outcome.seconds:.0f} s")
    return bool(wrong)


def _built(entry: Entry) -> Path:
    """The directory with the programs, from the cache or else built."""
    tarball = source.fetch(entry)
    version = source.version_of(tarball).replace(":", "_")
    programs = directory("selftests") / f"{version}-s{digest([changes(p) for p in entry.patches])}"
    with lock("selftests"):
        if programs.exists():
            return programs
        log = directory("runs") / "build-selftests.log"
        log.write_text("")
        say(f"building the selftests (log: {log})")
        tree = directory("build") / "selftests"
        source.unpack(tarball, tree, entry.patches)
        make(tree, "headers", log=log)
        new = programs.with_name(f".{programs.name}")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for where, names in PROGRAMS.items():
            for name in names:
                # the rule of one program, not all of the directory's: others want more libraries
                output = tree / "tools/testing/selftests" / where
                make(output, f"{output}/{name}", f"OUTPUT={output}", log=log)
                shutil.copy(output / name, new)
        new.rename(programs)
        run("rm", "-rf", tree)
    return programs
