"""The kernels the lab knows: what each is built from, and what is expected of it.

A kernel's key changes when anything that goes into it does: the source package's version, the
series, the configuration, the compiler. Equal keys are the same kernel. What the series changes in
documentation and selftests goes into no kernel.
"""

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SERIES = HERE / "series"


@dataclass(frozen=True)
class Entry:
    """One row of the matrix."""

    name: str
    package: str  # Debian's source package
    suite: str  # of Debian's archive, which holds it
    fragments: tuple[str, ...]  # of config/, in order
    route: str  # to 2 MiB text through FUSE's own page cache: folio, collapse or none
    series: bool = False
    slow: int = 1  # multiplies every time-out

    @property
    def fragment_files(self) -> list[Path]:
        """The configuration fragments, a later one overriding an earlier."""
        return [HERE / "config" / f"{f}.config" for f in self.fragments]

    @property
    def patches(self) -> list[Path]:
        """The patches applied to the source, in order: all but the cover letter, which is 0000."""
        patches = sorted(SERIES.glob("[0-9]*.patch")) if self.series else []
        return [p for p in patches if not p.name.startswith("0000-")]


ENTRIES = {
    e.name: e
    for e in (
        Entry(
            "7.3-series",
            "linux-source-7.3",
            "trixie-backports",
            ("base", "7.3", "series"),
            route="folio",
            series=True,
        ),
        Entry("7.3-stock", "linux-source-7.3", "trixie-backports", ("base", "7.3"), route="none"),
        Entry(
            "6.12-collapse",
            "linux-source-6.12",
            "trixie",
            ("base", "collapse"),
            route="collapse",
        ),
        Entry(
            "7.3-series-debug",
            "linux-source-7.3",
            "trixie-backports",
            ("base", "7.3", "series", "debug"),
            route="folio",
            series=True,
            slow=6,
        ),
    )
}


_NO_KERNEL = ("tools/", "Documentation/", "MAINTAINERS ")


def digest(texts: list[str]) -> str:
    """A short name for some texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def changes(patch: Path, *, kernel_only: bool = False) -> str:
    """What a patch changes, without its message and the mail signature: they build nothing."""
    text = patch.read_text().rsplit("\n-- \n", 1)[0].strip()
    files = text.split("\ndiff --git a/")[1:]
    return "\n".join(f for f in files if not (kernel_only and f.startswith(_NO_KERNEL)))


def key(entry: Entry, version: str) -> str:
    """What identifies the built kernel of `entry` from source package version `version`."""
    cc = subprocess.run(["gcc", "--version"], check=True, capture_output=True, text=True).stdout
    compiler = hashlib.sha256(cc.splitlines()[0].encode()).hexdigest()[:6]
    version = version.replace(":", "_")
    series = digest([changes(p, kernel_only=True) for p in entry.patches])
    config = digest([f.read_text() for f in entry.fragment_files])
    return f"{version}-s{series}-c{config}-g{compiler}"
