"""Pipeline stage evaluate@ENTRY: outputs/ENTRY/checkpoint -> outputs/ENTRY/{metrics.json, predictions.jsonl}."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # This work tree's code, whichever is installed.

from coconut.pipeline.stage import StageInputs, Work, run_script


def load() -> Work:
    from coconut.config.params import load_params
    from coconut.evaluation.entry import evaluate_entry
    from coconut.evaluation.scores import ScoreStore

    def main(entry: str, inputs: StageInputs | None) -> None:
        """Write the entry's scores; sets that were scored before with the same inputs are taken from `.resume`."""
        evaluate_entry(load_params(), entry, None if inputs is None else ScoreStore(inputs, entry))

    return main


if __name__ == "__main__":
    run_script(load, "evaluate", of_entry=True, is_shared=True)
