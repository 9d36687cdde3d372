"""Added measurements, a file each: a module with `measure(subject)`, which returns rows of `thoughts.csv`."""
