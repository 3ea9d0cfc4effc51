"""Build of the C companion; everything else is in pyproject.toml.

The extension is optional: where it does not build, largefs still runs, without passthrough and in
4 KiB pages (docs/kernel-routes.md).
"""

import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup


def pkg_config(option: str) -> list[str]:
    """Compiler flags of libfuse 3; none, with a word to the user, where it is missing.

    No linker flags: the companion uses the libfuse that pyfuse3 is linked to (companion.c).
    """
    try:
        out = subprocess.run(
            ["pkg-config", option, "fuse3"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        print("largefs: libfuse 3 not found: install libfuse3-dev and pkg-config", file=sys.stderr)
        return []
    return shlex.split(out.stdout)


sources = sorted(str(p) for p in Path("largefs/channel").glob("*.c"))

setup(
    ext_modules=[
        Extension(
            "largefs.channel._companion",
            sources=sources,
            depends=sorted(str(p) for p in Path("largefs/channel").glob("*.h")),
            extra_compile_args=[
                *pkg_config("--cflags"),
                "-std=gnu11",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wno-unused-parameter",
            ],
            optional=True,
        )
    ]
    if sources
    else []
)
