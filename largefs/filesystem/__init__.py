"""POSIX semantics: the pyfuse3 Operations, over a store and a channel.

operations.py  every FUSE operation
files.py       open files: who writes, and what is recorded afterwards
commits.py     when changes become durable
attributes.py  from a row of the store to a reply
acl.py         inheritance of ACLs, and their agreement with the permission bits
hints.py       the xattrs user.largefs.*
warmup.py      text into 2 MiB folios before a program runs
verify.py      -o verify: checksums before the first read
options.py     the mount options
daemon.py      mounts, serves, ends

Importing this package loads the channel's companion, which must stand before pyfuse3's libfuse.
"""

from largefs import channel

CHANNEL: channel.Channel | None
"""The companion, or None where the mount has to do without."""

NO_CHANNEL_REASON = ""
"""Why there is no companion."""

try:
    CHANNEL = channel.load()
except channel.Unavailable as e:
    CHANNEL = None
    NO_CHANNEL_REASON = str(e)
