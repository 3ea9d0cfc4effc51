"""Measurements side by side: the same work in several directories, by turns.

``workloads`` is what is done and timed in one directory; ``runner`` prepares the directories,
interleaves the rounds, so that a machine that gets slower or faster does so for all of them, takes
medians, and cleans up. Ratios, not numbers, are what it is for; docs/benchmarks.md says how to read
them.
"""
