"""largefs as mount-helpers/install lays it out, once for all suites, and a place to try it in.

The installation is real (Debian's Python, the locked versions, a build of the companion), in
`.venv/installed`, and is renewed only when something it is made of has changed.
"""

import os
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
ROOT = CHECKOUT / ".venv" / "installed"
"""LARGEFS_ROOT of the installation."""


def install() -> Path:
    """Install, if it is not; returns ROOT."""
    subprocess.run(
        [CHECKOUT / "mount-helpers/install"],
        env={**os.environ, "LARGEFS_ROOT": str(ROOT)},
        check=True,
        timeout=600,
    )
    return ROOT


def reason_not_to_install() -> str:
    """Why this machine cannot have it, or nothing."""
    if not Path("/usr/bin/apt-get").exists():
        return "mount-helpers/install is for Debian"
    return "LARGEFS_ROOT may not hold blanks" if " " in str(ROOT) else ""
