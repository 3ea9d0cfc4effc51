"""Where the lab keeps what it makes (outside the checkout), and how its steps run commands.

- sources/: Debian's source tarballs
- build/: kernel trees while they are built
- ccache/: compiled objects, so that a second kernel is quick
- kernels/: bzImage and config, for each entry's key
- runs/: logs and results of the last build and boot of each entry
- apt/, venv/, kvm/: a private apt configuration, virtme-ng, and whether KVM works
"""

import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "largefs" / "kernels"


class LabError(Exception):
    """A step failed; the message is one line that says what to do."""


class CannotRunError(LabError):
    """The machine lacks what the lab needs; the message says what."""


def directory(name: str) -> Path:
    """The cache's directory `name`, made if need be."""
    path = ROOT / name
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Keep other labs out of one part of the cache; waits for them."""
    with (directory("locks") / name).open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another lab that holds '{name}'")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def say(line: str) -> None:
    """Tell the user what goes on; stdout is for results."""
    print(f"lab: {line}", file=sys.stderr, flush=True)


def run(
    *command: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> str:
    """Run a command to its end and return its stdout; with `log`, both outputs go there instead.

    Raises LabError, with the command's last line or the log's path, if it fails.
    """
    argv = [str(c) for c in command]
    environ = {**os.environ, **env} if env else None
    if log:
        with log.open("a") as f:
            f.write(f"$ {shlex.join(argv)}\n")
            f.flush()
            done = subprocess.run(argv, cwd=cwd, env=environ, stdout=f, stderr=subprocess.STDOUT)
        if done.returncode:
            raise LabError(f"{shlex.join(argv[:3])} failed: see {log}")
        return ""
    res = subprocess.run(argv, cwd=cwd, env=environ, capture_output=True, text=True)
    if res.returncode:
        last = ((res.stderr.strip() or res.stdout.strip()).splitlines() or ["no output"])[-1]
        raise LabError(f"{shlex.join(argv)} failed: {last}")
    return res.stdout
