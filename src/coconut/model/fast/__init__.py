"""The fast path: the same numbers, less work."""
