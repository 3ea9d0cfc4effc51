"""Replay files: JSON lines, a header and then one operation a line.

The header says what was seen and where (versions, kernel, filesystem, limits, the difference), so
that the file alone is a bug report. For a race there are no operations: the header holds its seed
and duration.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from largefs.stress.checks import KINDS
from largefs.stress.session import CannotRunError, Operation

_FORMAT = 1


@dataclass
class Race:
    """What is to be run again where there are no operations: ``race`` or ``programs``."""

    kind: str
    seed: str
    seconds: float


@dataclass
class Replay:
    """A replay file's content."""

    header: dict[str, Any]
    operations: list[Operation]
    race: Race | None = None


def save(path: Path, replay: Replay) -> None:
    """Write the file."""
    header: dict[str, Any] = {"largefs-stress": _FORMAT, **replay.header}
    if replay.race:
        header["race"] = asdict(replay.race)
    with path.open("w") as out:
        for line in [header, *(op.as_dict() for op in replay.operations)]:
            out.write(json.dumps(line) + "\n")


def load(path: Path) -> Replay:
    """Read the file; raises CannotRunError where it is none."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        header = lines[0]
        if header["largefs-stress"] != _FORMAT:
            raise CannotRunError(f"{path}: a replay file of another version of largefs")
        header["limits"], header["seed"]
        race = Race(**header["race"]) if "race" in header else None
        operations = [Operation.from_dict(line) for line in lines[1:]]
        for op in operations:
            if op.kind not in KINDS:
                raise CannotRunError(f"{path}: there is no operation '{op.kind}'")
            if not 0 <= op.worker < header["limits"]["workers"]:
                raise CannotRunError(f"{path}: operation {op.number} names worker {op.worker}")
        return Replay(header, operations, race)
    except OSError as error:
        raise CannotRunError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CannotRunError(f"{path}: not a replay file of largefs stress") from error
