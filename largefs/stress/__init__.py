"""Truncate-and-mmap torture with an oracle, for any mounted filesystem.

A seeded generator (``generator``) makes operations; worker processes (``worker``) carry them out on
the filesystem; a model (``model``) says what every byte and every size must be, and ``session``
compares after each operation. ``race`` lets the processes loose on one file at once and checks what
the semantics still guarantee then. ``report`` names a difference by its class, ``shrink`` makes its
replay file small, and ``runner`` ties all that into one run. docs/stress.md says what is checked
and why.
"""
