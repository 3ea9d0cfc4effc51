"""Truncate-and-mmap torture with an oracle, for any mounted filesystem.

A seeded generator (``generator``) makes operations; worker processes (``worker``) carry them out; a
model (``model``) holds what every byte and every size must be. A ``session`` joins workers and
model, and ``checks`` says for each operation what is compared. ``race`` lets the processes loose on
one file at once, and checks what the semantics guarantee even then. ``report`` names a difference
by its class, ``shrink`` makes its replay file short, and ``runner`` makes one run of all that.
docs/stress.md says what is checked and why.
"""
