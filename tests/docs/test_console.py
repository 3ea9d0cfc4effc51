"""The reader of console blocks itself."""

from pathlib import Path

import pytest

from tests.docs.console import Session, matches, read


def session(tmp_path: Path, text: str) -> Session:
    path = tmp_path / "a.md"
    path.write_text(text)
    return read(path)


def test_commands_output_and_notes(tmp_path: Path) -> None:
    found = session(
        tmp_path,
        "Text\n<!-- run: true -->\n```console\n# one \\\n> two\nout\n$ three\n```\n"
        "<!-- not run: no such machine -->\n```console\n# four\n```\n"
        "```\n# a comment in a file\n```\n<!-- fails -->\n```console\n# five\n```\n",
    )
    assert [c.text for c in found.commands] == ["true", "one \\\ntwo", "three", "five"]
    assert found.commands[1].expected == ["out"]
    assert [c.fails for c in found.commands] == [False, False, False, True]
    assert found.not_run == [(12, "no such machine")]


@pytest.mark.parametrize(
    "text",
    [
        "```console\nout\n```\n",
        "```console\n```\n",
        "```console\n# one\n",
        "```sh\nls\n```\n",
        "<!-- not run -->\n```console\n# one\n```\n",
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"a\.md"):
        session(tmp_path, text)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        (["a ... c"], "a  bb c\n", True),
        (["a ... c"], "a b\nc\n", False),
        (["a", "...", "c"], "a\nb\nb\nc\n", True),
        (["a", "...", "c"], "a\nc\n", True),
        (["a"], "a\nb\n", False),
        (["a (b)"], "a (b)\n", True),
        (["1.0"], "110\n", False),
    ],
)
def test_matching(expected: list[str], printed: str, same: bool) -> None:
    assert matches(expected, printed) is same
