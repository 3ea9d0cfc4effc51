"""What the kernel knows, it does not ask again."""

import os
from pathlib import Path

import pytest

from tests.mounts import Mount, Mounts
from tests.users import NOBODY, become

WALKS = 200


def requests(mount: Mount) -> int:
    """What the daemon has answered: while the store is committed it writes nothing but answers."""
    fields = dict(s.split(": ") for s in Path(f"/proc/{mount.pid}/io").read_text().splitlines())
    return int(fields["syscw"])


def walk(uid: int, path: str) -> None:
    """Look a path up, again and again, as a user of no group in particular."""
    pid = os.fork()
    if pid == 0:
        try:
            become(uid)
            for _ in range(WALKS):
                os.lstat(path)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("uid", "root_mode", "each"),
    [(0, 0o755, 0), (NOBODY, 0o705, 0), (NOBODY, 0o755, 1)],
    ids=["root", "user", "known limit: the root directory's ACL"],
)
def test_a_warm_walk_asks_nothing(
    mounts: Mounts, monkeypatch: pytest.MonkeyPatch, uid: int, root_mode: int, each: int
) -> None:
    """Up to `each` request a walk: for the ACL of the root directory, where its group has any rights."""
    mount = mounts.make()
    mount.path.chmod(root_mode)
    (mount.path / "a/b/c").mkdir(parents=True)
    (mount.path / "a/b/c/f").write_text("x")
    monkeypatch.chdir(mount.path)  # another user cannot pass the directories above
    fd = os.open(".", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    walk(uid, "a/b/c/f")
    before = requests(mount)
    walk(uid, "a/b/c/f")
    asked = requests(mount) - before
    monkeypatch.chdir("/")
    assert asked <= each * WALKS
