"""Torture of truncate, mmap and huge pages with an oracle, on any mounted filesystem."""
