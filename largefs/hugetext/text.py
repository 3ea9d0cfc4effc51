"""What the filesystem and the import want to know of a file's text, in one look."""

from dataclasses import dataclass

from largefs.hugetext.elf import ET_DYN, Malformed, NotElf, read
from largefs.hugetext.eligible import Range, is_text, span, text_ranges
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
    """The text of an open file; raises OSError only."""
    return of_view(View.of_file(fd))


def of_view(view: View) -> Text:
    """The text of a file seen through a view; raises OSError only."""
    try:
        elf = read(view)
    except (NotElf, Malformed):
        return NONE
    spans = [span(s) for s in elf.loads if is_text(s)]
    return Text(
        size=sum(s.end - s.start for s in spans),
        ranges=text_ranges(elf, view.size),
        is_shared_object=elf.e_type == ET_DYN and not elf.is_program,
    )
