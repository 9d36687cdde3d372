"""Pipeline stage `preprocess`: turn raw files, hub sets or a generator's stream into `data/examples`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # This work tree's code, whichever is installed.

from coconut.pipeline.stage import Work, run_script


def load() -> Work:
    from coconut.config.params import load_params
    from coconut.data.preprocessing import preprocess
    from coconut.layout import EXAMPLES_DIR, OUTPUTS_DIR

    return lambda: preprocess(load_params().data, EXAMPLES_DIR, OUTPUTS_DIR / "preprocess.json")


if __name__ == "__main__":
    run_script(load, "preprocess")
