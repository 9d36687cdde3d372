"""Pipeline stage `base`: the model every curriculum starts from, with the markers in its vocabulary."""

import sys
from collections.abc import Iterator
from pathlib import Path

# Before the installed package: `dvc exp run --temp` and the queue work in a copy, whose code is the one that counts.
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from coconut.pipeline.stage import begin

if __name__ == "__main__":
    inputs = begin()
    from coconut.pipeline.launch import share_imports

    share_imports()

from coconut.checkpoints.origin import prepare_base
from coconut.checkpoints.tensors import save_tensors
from coconut.config.params import load_params
from coconut.config.schema import BASE
from coconut.data.examples import Example, read_examples
from coconut.layout import EXAMPLES_DIR, SPLITS, checkpoint_dir, optimizer_file
from coconut.pipeline.stage import run_stage


def read_all() -> Iterator[Example]:
    """Read every split: a vocabulary without the test set's words could not even ask its questions."""
    for split in SPLITS:
        yield from read_examples(EXAMPLES_DIR / f"{split}.jsonl")


def main() -> None:
    """Write `outputs/base/checkpoint`, and that its optimiser starts fresh."""
    prepare_base(load_params(), read_all(), checkpoint_dir(BASE))
    save_tensors({}, optimizer_file(BASE))


if __name__ == "__main__":
    run_stage(main, "base", inputs=inputs)
