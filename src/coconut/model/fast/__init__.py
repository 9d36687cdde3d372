"""The fast path: the same numbers as `coconut.model.passes` but for rounding, with less work and memory."""
