"""The store: what is on disk. Knows nothing of FUSE; every part of it runs without a mount."""
