"""Pipeline stage `preprocess`: turn raw files, hub sets or a generator's stream into `data/examples`."""

import sys
from pathlib import Path

# Before the installed package: `dvc exp run --temp` and the queue work in a copy, whose code is the one that counts.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from coconut.pipeline.stage import begin

if __name__ == "__main__":
    inputs = begin()

from coconut.config.params import load_params
from coconut.data.preprocessing import preprocess
from coconut.layout import EXAMPLES_DIR, OUTPUTS_DIR
from coconut.pipeline.stage import run_stage


def main() -> None:
    """Write `data/examples/{train,valid,test}.jsonl` and `outputs/preprocess.json`."""
    preprocess(load_params().data, EXAMPLES_DIR, OUTPUTS_DIR / "preprocess.json")


if __name__ == "__main__":
    run_stage(main, "preprocess", inputs=inputs)
