"""Measurements side by side with other filesystems."""
