"""How options are read, with no mount."""

import re
from dataclasses import fields

import pytest

from largefs.filesystem.options import IGNORED, KERNEL, OptionError, Options, parse
from tests.installed import CHECKOUT


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        ("ro,rw", {"rw"}),
        ("rw,ro", {"ro"}),
        ("noexec,exec", {"exec"}),
        ("suid,nosuid", {"nosuid"}),
        ("sync,async,ro", {"async", "ro"}),
        ("defaults,noatime,relatime,lazytime,x-a.b,X-c,_netdev,user_id=0", set()),
    ],
)
def test_of_two_opposites_the_last_one_holds(text: str, kernel: set[str]) -> None:
    assert parse(text).kernel == kernel


@pytest.mark.parametrize(
    "text", ["commit=0", "commit=x", "commit", "hugetext=no", "route=best", "log="]
)
def test_bad_values_are_refused_by_name(text: str) -> None:
    with pytest.raises(OptionError, match=text.split("=")[0]):
        parse(text)


def test_remount_is_seen() -> None:
    assert parse("remount,ro").remount
    assert not parse("ro").remount


def test_every_option_has_its_entry_and_every_entry_its_option() -> None:
    page = (CHECKOUT / "docs/mount-options.md").read_text()
    named = set(re.findall(r"`([a-z_]+)(?:=[^`]*)?`", page))
    headed = {
        n for line in re.findall(r"^### (.*)$", page, re.M) for n in re.findall(r"`([a-z_]+)", line)
    }
    assert {f.name for f in fields(Options)} - {"kernel", "remount"} <= headed
    assert named >= KERNEL | IGNORED - {"nouser", "nousers", "noowner", "nogroup", "nostrictatime"}
    values = {"hugetext": "off", "route": "none", "commit": "1", "log": "/x"}
    for name in headed:
        parse(f"{name}={values[name]}" if name in values else name)
