"""What an evaluated entry leaves: its metrics, predictions and samples, and the receipt that the report depends on."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.config.schema import Params
from coconut.evaluation.scores import Scores
from coconut.files import digest_file, replace_file
from coconut.layout import OUTPUTS_DIR, RECEIPTS_DIR

METRICS = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "num_examples",
    "loss",
    "generated_tokens",
    "thoughts",
    "truncated_share",
    "no_answer_share",
    "cot_match",
    "valid_accuracy",
    "valid_loss",
    "num_left_out",
)
"""Keys of `metrics.json`, the same for every entry, the first test set under plain names."""
COSTS = (
    "seconds_per_example",
    "train_seconds",
    "train_updates",
    "peak_memory_mb",
    "train_oom_retries",
    "eval_oom_retries",
    "train_cpu_seconds",
    "train_load",
    "cpu_seconds_per_example",
    "eval_load",
)
"""Keys of `costs.json`: what is another number in every run, so that `dvc metrics diff` shows what has changed."""
SET_METRICS = (
    *("accuracy", "accuracy_low", "accuracy_high", "num_examples", "loss", "generated_tokens", "truncated_share"),
    *("no_answer_share", "cot_match", "num_left_out"),
)
"""Keys of every further test set, as `NAME.accuracy`."""
_REPORTED = ("metrics.json", "costs.json", "predictions.jsonl", "history.csv", "updates.csv", "train.json")
"""What the report reads of an entry."""


def expected_metrics(params: Params) -> dict[str, float]:
    """Return what others report for the untouched model, by the names of the metrics."""
    expected, names = params.evaluate.expected or {}, params.data.test_names
    prefixes = {name: "" if split == "test" else f"{name}." for split, name in names.items()}
    return {f"{prefixes[name]}expected": value for name, value in expected.items()}


def write_entry(name: str, metrics: Mapping[str, Any], costs: Mapping[str, Any], sets: Mapping[str, Scores]) -> None:
    """Write the metrics, what they cost, and the predictions and samples of every set."""
    output_dir = OUTPUTS_DIR / name
    further_dir = output_dir / "predictions"
    shutil.rmtree(further_dir, ignore_errors=True)
    further_dir.mkdir()
    files = {}
    for split, scores in sets.items():
        further = split.partition("/")[2]
        in_order = sorted(scores.outcomes, key=lambda outcome: outcome.index)
        file = f"predictions/{further}.jsonl" if further else "predictions.jsonl"
        files[file] = "".join(outcome.to_json() for outcome in in_order)
        if scores.samples:
            file = f"predictions/samples/{further}.jsonl" if further else "predictions/samples.jsonl"
            files[file] = "".join(samples.to_json() for samples in scores.samples)
    for file, content in files.items():
        (output_dir / file).parent.mkdir(exist_ok=True)
        replace_file(output_dir / file, content)
    # With one set it is all that the folder holds, and DVC warns of every folder that holds nothing.
    replace_file(further_dir / "files.json", json.dumps(list(files), indent=2) + "\n")
    replace_file(output_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    replace_file(output_dir / "costs.json", json.dumps(costs, indent=2) + "\n")
    write_receipt(RECEIPTS_DIR, name, [*_REPORTED, *(file for file in files if "/" in file)])


def write_receipt(folder: Path, name: str, files: Sequence[str]) -> None:
    """Write digests of an entry's files, which the report depends on.

    DVC cannot name the outputs of all entries, but it can watch a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output_dir = OUTPUTS_DIR / name
    receipt = {file: digest_file(output_dir / file) for file in files if (output_dir / file).exists()}
    replace_file(folder / f"{name}.json", json.dumps(receipt, indent=2) + "\n")


def warnings_about_results(metrics: Mapping[str, Any]) -> list[str]:
    """Sentences about results that say more about the set-up than about the model."""
    warnings = []
    if metrics["no_answer_share"] == 1:
        warnings.append(
            "no generated text holds an answer; the model was trained too little, or evaluate.max_new_tokens cuts the"
            " text off before its answer (see predictions.jsonl)"
        )
    elif metrics["accuracy"] == 0 and metrics["valid_accuracy"] == 0:
        warnings.append(
            "no answer is right, neither in test nor in valid; train longer, on more rows, or with another lr, and"
            " compare gold and answer in predictions.jsonl"
        )
    return warnings
