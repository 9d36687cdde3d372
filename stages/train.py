"""Pipeline stage train@ENTRY: the parent's checkpoint -> outputs/ENTRY/{checkpoint, *.csv, train.json}."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # This work tree's code, whichever is installed.

from coconut.pipeline.stage import Work, run_script


def load() -> Work:
    from coconut.config.params import load_params
    from coconut.training.entry import train_entry

    return lambda entry, inputs: train_entry(load_params(), entry, inputs)


if __name__ == "__main__":
    run_script(load, "train", of_entry=True, is_shared=True, guards_itself=True)
