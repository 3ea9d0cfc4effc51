r"""Read the ```console blocks of a Markdown file: what is typed, and what the reader is told to expect.

In a block, a line that starts with `# ` or `$ ` is a command (as root, as anybody; the tests run both as
root); the lines after it are what it prints. In them `...` stands for anything within the line, and a line
of nothing but `...` for any number of lines. Runs of blanks count as one. A command without such lines may
print what it likes. A command that ends with a backslash goes on in the next line, which starts with `> `.
Each command must end with exit code 0.

A comment on the line before the block changes that:

    <!-- not run: REASON -->    the block is not run; the test prints the reason, and counts it
    <!-- fails -->              the last command of the block must end with another exit code than 0

and `<!-- run: COMMAND -->`, anywhere, is a command that the reader does not see (to set the scene).
The blocks of a file are one session: one shell, from top to bottom.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

COMMENT = re.compile(r"<!-- (not run|run|fails)(?:: (.*?))? *-->")


@dataclass
class Command:
    """One command of a session."""

    line: int
    """Where it is in the file, from 1."""
    text: str
    expected: list[str] = field(default_factory=list)
    fails: bool = False


@dataclass
class Session:
    """What a file has to run."""

    commands: list[Command] = field(default_factory=list)
    not_run: list[tuple[int, str]] = field(default_factory=list)
    """Line and reason of each block that is not run."""


def read(path: Path) -> Session:
    """Read a file; raises ValueError for what cannot be meant."""
    session = Session()
    note, fence, block = "", "", Session()
    skip = ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path.name}:{number}"
        if not fence:
            if found := COMMENT.fullmatch(line.strip()):
                what, value = found.groups()
                if what == "run":
                    session.commands.append(Command(number, value))
                else:
                    note, skip = what, value or ""
                    if what == "not run" and not skip:
                        raise ValueError(f"{where}: not run, without a reason")
                continue
            if opened := re.match(r"\s*(`{3,})(\w*)", line):
                fence, language = opened.groups()
                block = Session() if language == "console" else None  # type: ignore[assignment]
                if language in ("sh", "bash", "shell"):
                    raise ValueError(f"{where}: commands belong into a console block")
            elif line.strip():
                note = skip = ""
            continue
        if line.strip() == fence:
            if block is not None:
                if note == "not run":
                    session.not_run.append((number, skip))
                else:
                    if not block.commands:
                        raise ValueError(f"{where}: a console block without a command")
                    block.commands[-1].fails = note == "fails"
                    session.commands += block.commands
            note = skip = fence = ""
        elif block is None:
            continue
        elif line[:2] in ("# ", "$ "):
            block.commands.append(Command(number, line[2:]))
        elif not block.commands:
            raise ValueError(f"{where}: output before any command")
        elif line[:2] == "> " and block.commands[-1].text.endswith("\\"):
            block.commands[-1].text += "\n" + line[2:]
        else:
            block.commands[-1].expected.append(line)
    if fence:
        raise ValueError(f"{path.name}: a block is not closed")
    return session


def matches(expected: list[str], printed: str) -> bool:
    """Whether what a command printed is what the file shows."""
    pattern = ""
    for line in expected:
        if line.strip() == "...":
            pattern += r"(?:[^\n]*\n)*?"
        else:
            parts = (re.escape(part) for part in squeeze(line).split("..."))
            pattern += r"[^\n]*".join(parts) + r"\n"
    text = "".join(squeeze(line) + "\n" for line in printed.splitlines())
    return re.fullmatch(pattern, text) is not None


def squeeze(line: str) -> str:
    """Runs of blanks as one, and none at the end."""
    return re.sub(r"\s+", " ", line).rstrip()
