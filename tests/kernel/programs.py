"""The C programs of this suite, compiled once into build/kernel-tests of the checkout.

The lab compiles them on the host (`python -m tests.kernel.programs`), where it takes a second;
the guest, which sees the checkout but may not write to it, finds them there.
"""

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "kernel-tests"
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")  # of Debian's package
BIGTEXT_BLOCKS = 8

_OURS = ("-Wall", "-Wextra", "-Werror", "-pthread")
_SOURCES: dict[str, tuple[Path, tuple[str, ...]]] = {
    "passthrough": (HERE / "passthrough.c", _OURS),
    "mapper": (HERE / "mapper.c", _OURS),
    "bigtext": (HERE / "bigtext.c", (*_OURS, f"-DBLOCKS={BIGTEXT_BLOCKS}")),
    # libfuse's examples, as they are
    "example_ll": (EXAMPLES / "passthrough_ll.c", ("-w", "-pthread")),
    "example_fh": (EXAMPLES / "passthrough_fh.c", ("-w", "-pthread")),
}


def program(name: str) -> Path:
    """The compiled program `name`; raises FileNotFoundError if this machine lacks its source."""
    source, flags = _SOURCES[name]
    if not source.exists():
        raise FileNotFoundError(source)
    built = BUILT / name
    newest = max(source.stat().st_mtime, Path(__file__).stat().st_mtime)
    if not built.exists() or built.stat().st_mtime < newest:
        BUILT.mkdir(parents=True, exist_ok=True)
        libfuse = _pkg_config() if source.parent == EXAMPLES else []
        command = ["gcc", "-O2", "-o", str(built), str(source), *flags, *libfuse]
        subprocess.run(command, check=True)
    return built


def _pkg_config() -> list[str]:
    done = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "fuse3"], check=True, capture_output=True, text=True
    )
    return done.stdout.split()


def main() -> None:
    """Compile everything that can be."""
    for name, (source, _) in _SOURCES.items():
        if source.exists():
            program(name)


if __name__ == "__main__":
    main()
