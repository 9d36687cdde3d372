"""Pipeline stage `base`: the model every curriculum starts from, with the markers in its vocabulary."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # This work tree's code, whichever is installed.

from coconut.pipeline.stage import Work, run_script


def load() -> Work:
    from coconut.checkpoints.origin import prepare_base
    from coconut.checkpoints.tensors import save_tensors
    from coconut.config.params import load_params
    from coconut.config.schema import BASE
    from coconut.data.examples import read_examples
    from coconut.layout import EXAMPLES_DIR, SPLITS, checkpoint_dir, optimizer_file

    def main() -> None:
        """Write `outputs/base/checkpoint`, and that its optimizer starts fresh."""
        # Every split: a vocabulary without the test set's words could not even ask its questions.
        examples = (example for split in SPLITS for example in read_examples(EXAMPLES_DIR / f"{split}.jsonl"))
        prepare_base(load_params(), examples, checkpoint_dir(BASE))
        save_tensors({}, optimizer_file(BASE))

    return main


if __name__ == "__main__":
    run_script(load, "base")
