"""Pipeline stage probe@ENTRY: outputs/ENTRY/checkpoint -> outputs/ENTRY/thoughts.{json,csv,jsonl}."""

import argparse
import sys
from pathlib import Path

# Before the installed package: `dvc exp run --temp` and the queue work in a copy, whose code is the one that counts.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from coconut.pipeline.stage import begin

if __name__ == "__main__":
    inputs = begin()

from coconut.config.params import load_params
from coconut.config.schema import BASE
from coconut.pipeline.stage import run_stage
from coconut.probing.entry import probe_entry


def main(entry_name: str) -> None:
    probe_entry(load_params(), entry_name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entry", help="a key of `curriculum` in params.yaml, or base")
    entry_name = parser.parse_args().entry
    run_stage(main, "probe_base" if entry_name == BASE else f"probe@{entry_name}", entry_name, inputs=inputs)
