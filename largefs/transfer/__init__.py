"""Directory trees into a store and out of it again, with all that a tree holds, without a mount."""
