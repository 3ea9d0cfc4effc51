"""POSIX semantics: the pyfuse3 Operations, over a store and a channel."""
