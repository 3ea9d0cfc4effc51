"""What Tab completes in bash, as bash-completion(1) would find it."""

import subprocess
from pathlib import Path

import pytest

COMPLETE = """
source "$1"
COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2))
compopt() { echo "as $2"; }  # says no otherwise: nothing is being completed
"$(complete -p largefs | sed 's/.*-F \\([^ ]*\\).*/\\1/')" largefs
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["mou"], {"mount"}),
        (["check", "--"], {"--data", "--repair", "--json", "--help"}),
        (["import", "/usr"], {"as default"}),  # names of files
    ],
    ids=["command", "option", "path"],
)
def test_tab(root: Path, words: list[str], offered: set[str]) -> None:
    script = root / "usr/local/share/bash-completion/completions/largefs"
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", script, "largefs", *words],
        env={"PATH": f"{root}/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split("\n")) - {""} == offered
    assert not done.stderr
