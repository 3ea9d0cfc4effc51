"""What there is to say of one file: its text, what of it is eligible, what an import did or would do."""

import errno
import os
from dataclasses import dataclass

from largefs.hugetext.align import Mode, plan, restore
from largefs.hugetext.eligible import Description, describe
from largefs.hugetext.view import BadRecord, View, reshape


@dataclass(frozen=True)
class FileReport:
    """One file. Sizes are in bytes."""

    path: str
    size: int
    now: Description
    original: Description | None
    """The file as it came, where the import aligned it."""
    alignment: str
    """What the import did, or what it would do to the file as it is, and why no more."""


def of_path(path: str) -> FileReport:
    """Look at one file, on a mounted largefs or anywhere else; raises OSError (EIO: a bad record)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        view = View.of_file(fd)
        record = _record(fd)
        if record is None:
            said = plan(view, Mode.AUTO).reason
            return FileReport(path, view.size, describe(view), None, said)
        try:
            original = reshape(view, restore(record))
        except BadRecord as e:
            raise OSError(errno.EIO, f"what the import noted of it is damaged: {e}") from None
        said = plan(original, Mode.AUTO).reason
        return FileReport(path, view.size, describe(view), describe(original), said)
    finally:
        os.close(fd)


def _record(fd: int) -> bytes | None:
    try:
        return os.getxattr(fd, "user.largefs.alignment")
    except OSError as e:
        if e.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise
