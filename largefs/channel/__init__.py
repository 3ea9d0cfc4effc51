"""The /dev/fuse connection: INIT negotiation, backing files, the operations pyfuse3 lacks."""
