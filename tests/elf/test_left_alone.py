"""Real files of the kinds that alignment must leave alone: they stay, and the reason says why."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from largefs.hugetext.align import Mode, plan
from tests.elf.files import opened
from tests.elf.packages import Unreachable, elf_files, find, unpacked


@pytest.fixture(scope="module")
def big() -> Path:
    """A program that alignment does change."""
    return member("cmake", "cmake")


def member(names: str, file: str) -> Path:
    try:
        return next(path for path in elf_files(unpacked(find(names))) if path.name == file)
    except (Unreachable, StopIteration) as reason:
        pytest.skip(f"no {file} of {names}: {reason}")


def reason(path: Path, **arguments: str) -> str:
    with opened(path) as view:
        p = plan(view, Mode.AUTO, **arguments)
    return "changed" if p.changed else p.reason


def copy(big: Path, to: Path) -> Path:
    to.write_bytes(big.read_bytes())
    to.chmod(0o755)
    return to


def test_the_program_itself_is_changed(big: Path) -> None:
    assert reason(big) == "changed"


def test_a_self_extracting_zip(big: Path, tmp_path: Path) -> None:
    """As unzipsfx and many installers are made: the archive is found from the end of the file."""
    program = copy(big, tmp_path / "installer")
    with zipfile.ZipFile(program, "a") as archive:
        archive.writestr("payload", "found by offset")
    assert "follow the program, which may find them by offset" in reason(program)
    assert zipfile.ZipFile(program).read("payload") == b"found by offset"


def test_an_appimage(big: Path, tmp_path: Path) -> None:
    """The magic and a squashfs after the program, as the AppImage specification (type 2) says."""
    program = copy(big, tmp_path / "x.AppImage")
    with program.open("r+b") as file:
        file.seek(8)
        file.write(b"AI\2")
        file.seek(0, os.SEEK_END)
        file.write(b"hsqs" + bytes(4092))
    assert reason(program) == "an AppImage: it finds its filesystem by offset"


def test_a_shell_archive(big: Path, tmp_path: Path) -> None:
    """As makeself makes them: a script, and the archive behind its last line."""
    script = tmp_path / "setup.run"
    script.write_bytes(b'#!/bin/sh\ntail -n +3 "$0" | tar x\nexit\n' + big.read_bytes())
    assert reason(script) == "not an ELF file"


def test_a_file_of_debugging_information(big: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.debug"
    subprocess.run(["objcopy", "--only-keep-debug", big, out], check=True)
    assert reason(out) == "debugging information only: its text is in another file"


def test_an_object_file_and_a_module(tmp_path: Path) -> None:
    source, out = tmp_path / "a.s", tmp_path / "a.ko"
    source.write_text(".text\n.fill 5 << 20, 1, 0x90\n")
    subprocess.run(["gcc", "-c", source, "-o", out], check=True)
    assert reason(out) == "an object file or kernel module: it is never mapped to run"
    with out.open("ab") as file:  # as the kernel's scripts/sign-file leaves it
        file.write(bytes(600) + b"~Module signature appended~\n")
    assert reason(out) == "an object file or kernel module: it is never mapped to run"


def test_a_signature_that_only_the_importer_sees(big: Path) -> None:
    assert reason(big, signed="security.ima").startswith("signed (security.ima)")


def test_32_bit_programs() -> None:
    assert reason(member("valgrind", "memcheck-x86-linux")) == "a 32-bit ELF file"


def test_a_go_program_needs_nothing_unless_something_is_appended(tmp_path: Path) -> None:
    hugo = member("hugo", "hugo")
    assert reason(hugo).startswith("nothing to do")
    bundle = copy(hugo, tmp_path / "bundle")
    with bundle.open("ab") as file:
        file.write(b"embedded files")
    assert "14 bytes follow the program" in reason(bundle)


def test_a_program_without_section_headers(big: Path, tmp_path: Path) -> None:
    """What the sections described is still there, and now is anyone's."""
    stripped = copy(big, tmp_path / "stripped")
    with stripped.open("r+b") as file:
        file.seek(40)
        file.write(bytes(8))
        file.seek(58)
        file.write(bytes(6))
    assert "follow the program" in reason(stripped)


def test_a_truncated_program(big: Path, tmp_path: Path) -> None:
    short = copy(big, tmp_path / "short")
    os.truncate(short, 3 << 20)
    assert "end of the file" in reason(short) or "inside the file" in reason(short)
