"""Published sets that `format: fields` reads, each a module with a table `PRESETS`: one or more maps for each name.

A set that is published in several forms has a map for each; the rows decide which one fits.
"""
