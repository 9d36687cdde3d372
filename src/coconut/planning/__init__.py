"""A plan before the night: what would run, how long it takes on this machine, and whether it fits."""
