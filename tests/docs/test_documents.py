"""What README.md and docs/*.md tell the reader to type works, and prints what they show.

Each file is one session in a copy of this machine: /etc, /usr, /var, /opt, /mnt and /srv are overlaid in a
mount namespace, so that the commands are the reader's own, and nothing of what they do stays.
tests/docs/console.py has the conventions.
"""

import os
import signal
import subprocess
import warnings
from pathlib import Path

import pytest

from tests import installed
from tests.docs import console
from tests.installed import CHECKOUT
from tests.mounts import reason_not_to_mount

pytestmark = pytest.mark.resident

FILES = sorted([CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")])

SANDBOX = """
set -eu
for d in etc usr var opt mnt srv; do
    mkdir -p "$SCRATCH/$d/upper" "$SCRATCH/$d/work"
    below=/$d
    [ $d != opt ] || below=$ROOT/opt:/opt # largefs is there as after mount-helpers/install
    mount -t overlay none -o "lowerdir=$below,upperdir=$SCRATCH/$d/upper,workdir=$SCRATCH/$d/work" "/$d"
done
# Stores need a real filesystem beneath them: of a store on overlayfs, /proc/PID/maps shows the overlay's
# file, not the mount's.
mkdir -p /var/lib/largefs "$SCRATCH/stores" "$SCRATCH/tmp"
mount --bind "$SCRATCH/stores" /var/lib/largefs
mount --bind "$SCRATCH/tmp" /var/tmp
mkdir -p "$SCRATCH/home"
export HOME="$SCRATCH/home"
cd "$CHECKOUT"
mount-helpers/install
"""


@pytest.mark.parametrize("path", FILES, ids=[p.name for p in FILES])
def test_what_the_document_says_is_so(path: Path, tmp_path: Path) -> None:
    session = console.read(path)
    for line, reason in session.not_run:
        warnings.warn(f"{path.name}:{line}: not run: {reason}", stacklevel=1)
    if not session.commands:
        pytest.skip(f"nothing to run ({len(session.not_run)} blocks are not run)")
    if reason := reason_not_to_mount() or installed.reason_not_to_install():
        pytest.skip(reason)
    root = installed.install()
    with Sandbox(tmp_path, root) as sandbox:
        for command in session.commands:
            printed, code = sandbox.run(command.text)
            where = f"{path.name}:{command.line}: {command.text}"
            assert (code != 0) == command.fails, f"{where}\nexit code {code}\n{printed}"
            if command.expected:
                shown = "\n".join(command.expected)
                assert console.matches(command.expected, printed), (
                    f"{where}\nprinted:\n{printed}\nthe document shows:\n{shown}"
                )


class Sandbox:
    """A shell in a copy of this machine."""

    def __init__(self, scratch: Path, root: Path) -> None:
        self._scratch, self._root = scratch, root

    def __enter__(self) -> "Sandbox":
        environment = {
            **{k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_"))},
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "SCRATCH": str(self._scratch),
            "ROOT": str(self._root),
            "CHECKOUT": str(CHECKOUT),
        }
        # A process namespace: when its shell ends, so does every daemon that was started in it.
        self._shell = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        printed, code = self.run(SANDBOX)
        if code:
            self.__exit__()
            pytest.skip(f"no overlays here: {printed}")
        self.run("set +eu")
        return self

    def run(self, command: str) -> tuple[str, int]:
        """Run a command; returns what it printed, both streams, and its exit code."""
        assert self._shell.stdin and self._shell.stdout
        end = "-- end of command --"
        text = f"{{ {command}\n}} </dev/null; printf '\\n%s %d\\n' '{end}' $?\n"
        self._shell.stdin.write(text.encode())
        self._shell.stdin.flush()
        printed = b""
        for line in self._shell.stdout:
            if line.startswith(end.encode()):
                return printed.decode(errors="replace").rstrip("\n") + "\n", int(line.split()[-1])
            printed += line
        return printed.decode(errors="replace"), 255

    def __exit__(self, *_: object) -> None:
        self._shell.send_signal(signal.SIGKILL)
        self._shell.wait()
        assert self._shell.stdin and self._shell.stdout
        self._shell.stdin.close()
        self._shell.stdout.close()
