"""Pipeline stage train@ENTRY: the parent's checkpoint -> outputs/ENTRY/{checkpoint, *.csv, train.json}."""

import argparse
import sys
from functools import partial
from pathlib import Path

# Before the installed package: `dvc exp run --temp` and the queue work in a copy, whose code is the one that counts.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from coconut.pipeline.stage import begin

if __name__ == "__main__":
    inputs = begin()

from coconut.pipeline.launch import share_out

if __name__ == "__main__":
    share_out(inputs)

from coconut.config.params import load_params
from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.stage import run_stage
from coconut.training.entry import train_entry


def main(entry_name: str, inputs: StageInputs | None = None) -> None:
    train_entry(load_params(), entry_name, inputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entry", help="a key of `curriculum` in params.yaml")
    entry_name = parser.parse_args().entry
    run_stage(partial(main, inputs=inputs), f"train@{entry_name}", entry_name)  # Guards itself, before it writes.
