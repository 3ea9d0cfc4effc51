"""Booting a kernel under QEMU, with this machine's root directory as the guest's.

virtme-ng does the booting: the root comes over 9p, read-only. The guest has a scratch disk (ext4)
at /run/lab/scratch, which TMPDIR names; /run/lab/results is a directory of the host. It has two
CPUs and 4 GiB, no network, and sees the checkout exactly as it is here, with its .venv.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from labkit.cache import LabError, directory, lock, run, say
from labkit.matrix import HERE, Entry

SCRATCH = "/run/lab/scratch"
RESULTS = "/run/lab/results"
MAX_PAGES = "/proc/sys/fs/fuse/max_pages_limit"  # since Linux 6.13
CPUS = 2
MEMORY = "4G"
SCRATCH_BYTES = 8 << 30  # sparse

# TCG runs the guest 10 to 30 times slower than the host, on cores that it shares: a CPU that the
# host does not run for some seconds is no stall. What stays one for a minute or two is reported.
KERNEL_ARGUMENTS = (
    # nothing on the host's side changes while the guest runs, so that it may cache without asking
    "rootflags=version=9p2000.L,trans=virtio,access=any,msize=512000,cache=loose",
    "loglevel=7",
    "oops=panic",
    "sysctl.kernel.hung_task_panic=1",  # else a hang would last until the time-out
    "transparent_hugepage=madvise",
    "rcupdate.rcu_cpu_stall_timeout=120",
    "nmi_watchdog=0",
    "watchdog_thresh=60",
    "fuse.enable_uring=0",
)


@dataclass(frozen=True)
class Outcome:
    """How a boot ended."""

    status: int | None  # of the command in the guest; None when the guest did not live to say
    seconds: float  # from power-on to power-off
    console: Path  # the kernel's whole log
    output: Path  # what the command printed
    results: Path  # /run/lab/results of the guest


@contextlib.contextmanager
def boot(entry: Entry, image: Path, command: str, timeout: float) -> Iterator[Outcome]:
    """Boot `image`, run the shell `command` in the guest as root, and power off.

    The command's output is copied to stderr as it comes. `timeout` is in seconds of the host's
    time, before the entry's own factor. The logs stay in runs/ENTRY until the entry's next boot,
    for which another lab waits as long as the block runs.
    """
    where = directory("runs") / entry.name
    with lock(f"run-{entry.name}"), tempfile.TemporaryDirectory(prefix="lab-") as tmp:
        results = where / "results"
        shutil.rmtree(where, ignore_errors=True)
        results.mkdir(parents=True)
        console, output, status = where / "console.log", results / "output", results / "status"
        output.touch()
        # in a file, because a kernel's command line has room for 2 KiB
        (results / "script").write_text(f"{_environment(entry)}{command}\n")
        command = f"sh {RESULTS}/script >{RESULTS}/output 2>&1; echo $? >{RESULTS}/status; sync"
        argv = _qemu(entry, image, _scratch_disk(Path(tmp)))
        argv += [f"--rwdir={RESULTS}={results}", "--show-boot-console"]
        argv += ["--script-sh", command]
        started = time.monotonic()
        with console.open("wb") as log:
            _run_bounded(argv, log.fileno(), timeout * entry.slow, follow=output)
        said = status.read_text().strip() if status.exists() else ""
        yield Outcome(
            int(said) if said else None, time.monotonic() - started, console, output, results
        )


def shell(entry: Entry, image: Path) -> int:
    """Boot `image` and give the terminal to a root shell in the guest until it exits."""
    with tempfile.TemporaryDirectory(prefix="lab-") as tmp:
        rc = Path(tmp) / "rc"
        rc.write_text(_environment(entry))
        say(f"ctrl-d ends the guest, ctrl-a x kills it; for scratch disk and environment: . {rc}")
        return subprocess.run(_qemu(entry, image, _scratch_disk(Path(tmp)))).returncode


def use_kvm(image: Path) -> bool:
    """Whether this machine's KVM boots a kernel, tried once for each boot of the machine."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    remembered = directory("kvm") / boot_id
    if not remembered.exists():
        say("trying KVM")
        argv = [*_virtme_run(image, kvm=True), "--show-boot-console"]
        argv += ["--script-sh", "echo the guest is up >/dev/kmsg; poweroff -f"]
        console = directory("kvm") / "console.log"
        with console.open("wb") as log:
            _run_bounded(argv, log.fileno(), timeout=45)
        said = console.read_text(errors="replace")
        works = "Hypervisor detected: KVM" in said and "the guest is up" in said
        say("KVM works" if works else "KVM does not work here: software emulation, which is slow")
        remembered.write_text("yes" if works else "no")
    return remembered.read_text() == "yes"


def _environment(entry: Entry) -> str:
    """What the guest's shell runs before anything else: the scratch disk and the environment."""
    environment = {
        "HOME": os.environ.get("HOME", "/root"),
        "PATH": os.environ["PATH"],
        "TMPDIR": SCRATCH,
        "LARGEFS_LAB": entry.name,
        "LARGEFS_LAB_ROUTE": entry.route,
        "LARGEFS_LAB_SLOW": str(entry.slow),
        "PYTHONDONTWRITEBYTECODE": "1",
        **{k: v for k, v in os.environ.items() if k.startswith("LARGEFS_LAB_")},
    }
    exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in environment.items())
    return (
        f"{exports}mkdir -p {SCRATCH} && mount /dev/vda {SCRATCH} && "
        f"cd {shlex.quote(str(HERE.parent))} || exit\n"
        "[ ! -e {0} ] || echo 1024 >{0}  # requests of 4 MiB\n".format(MAX_PAGES)
    )


def _scratch_disk(directory: Path) -> Path:
    disk = directory / "scratch.img"
    disk.touch()
    os.truncate(disk, SCRATCH_BYTES)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=1,nodiscard", disk)
    return disk


def _qemu(entry: Entry, image: Path, scratch: Path) -> list[str]:
    hung = f"--kopt=sysctl.kernel.hung_task_timeout_secs={300 * entry.slow}"
    return [*_virtme_run(image, kvm=use_kvm(image)), f"--blk-disk=scratch={scratch}", hung]


def _virtme_run(image: Path, *, kvm: bool) -> list[str]:
    argv = [str(_virtme()), f"--kimg={image}", "--mods=none", "--force-9p"]
    argv += [f"--cpus={CPUS}", f"--memory={MEMORY}"]
    argv += [f"--kopt={k}" for k in KERNEL_ARGUMENTS]
    return argv if kvm else [*argv, "--disable-kvm"]


def _virtme() -> Path:
    """virtme-run of the locked version, installed into a venv of its own."""
    requirements = HERE / "requirements.txt"
    venv = directory("venv")
    program, stamp = venv / "bin/virtme-run", venv / "requirements.txt"
    with lock("venv"):
        if not (stamp.exists() and stamp.read_bytes() == requirements.read_bytes()):
            say("installing virtme-ng")
            run("python3", "-m", "venv", "--clear", venv)
            pip = (venv / "bin/python", "-m", "pip", "-q", "--disable-pip-version-check")
            run(*pip, "install", "--no-deps", "--require-hashes", "-r", requirements)
            stamp.write_bytes(requirements.read_bytes())
    if not program.exists():
        raise LabError(f"virtme-ng did not install into {venv}: remove it and try again")
    return program


def _run_bounded(argv: list[str], log: int, timeout: float, follow: Path | None = None) -> None:
    """Run virtme-run, and QEMU under it, until it ends or `timeout` seconds are over.

    The console goes to the descriptor `log`, what is written to `follow` to stderr as it comes.
    """
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    deadline = time.monotonic() + timeout
    try:
        with (follow or Path(os.devnull)).open(errors="replace") as tail:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                sys.stderr.write(tail.read())
            sys.stderr.write(tail.read())
        if process.poll() is None and follow:
            say(f"the guest did not end within {timeout:.0f} s: killed")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # QEMU too, however virtme-run ended
        process.wait()
