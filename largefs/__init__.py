"""largefs: a FUSE filesystem that lets Linux map executable text with 2 MiB pages."""
