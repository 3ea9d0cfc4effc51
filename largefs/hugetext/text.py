"""What the filesystem and the import want to know of a file's text, in one look."""

from dataclasses import dataclass

from largefs.hugetext.elf import ET_DYN, Malformed, NotElf, read
from largefs.hugetext.eligible import Range, text_ranges, text_size
from largefs.hugetext.view import View


@dataclass(frozen=True, slots=True)
class Text:
    """The text of a file."""

    size: int
    """Bytes of all its text, in whole pages; 0 if the file is no ELF file or is malformed."""
    ranges: list[Range]
    """Its eligible text, as ranges of the file in bytes."""
    is_shared_object: bool
    """Whether ld.so may map it; a position-independent program counts only as a program."""

    @property
    def eligible(self) -> int:
        """Bytes of eligible text."""
        return sum(r.length for r in self.ranges)


NONE = Text(0, [], False)


def of_file(fd: int) -> Text:
    """The text of an open file, by its headers; raises OSError only."""
    view = View.of_file(fd)
    try:
        elf = read(view)
    except (NotElf, Malformed):
        return NONE
    return Text(
        size=text_size(elf),
        ranges=text_ranges(elf, view.size),
        is_shared_object=elf.e_type == ET_DYN and not elf.is_program,
    )
