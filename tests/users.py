"""Other users than root, in child processes of a test."""

import os

NOBODY = 65534


def become(uid: int) -> None:
    """Be this user, of no group but its own, from here on."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
