"""Pipeline stage evaluate@ENTRY: outputs/ENTRY/checkpoint -> outputs/ENTRY/{metrics.json, predictions.jsonl}."""

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
from coconut.config.schema import BASE
from coconut.evaluation.entry import evaluate_entry
from coconut.evaluation.scores import ScoreStore
from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.stage import run_stage


def main(entry_name: str, inputs: StageInputs | None = None) -> None:
    """Write the entry's scores; sets that were scored before with the same inputs are taken from `.resume`."""
    scored = None if inputs is None else ScoreStore(inputs, entry_name)
    evaluate_entry(load_params(), entry_name, scored)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entry", help="a key of `curriculum` in params.yaml, or base")
    entry_name = parser.parse_args().entry
    name = "evaluate_base" if entry_name == BASE else f"evaluate@{entry_name}"
    run_stage(partial(main, inputs=inputs), name, entry_name, inputs=inputs)
