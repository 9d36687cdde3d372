"""One entry's checkpoint to its metrics and predictions."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loguru import logger
from tqdm import tqdm

from coconut.checkpoints.feedback import load_feedback
from coconut.checkpoints.folder import META_FILE, load_checkpoint
from coconut.checkpoints.meta import CheckpointMeta
from coconut.config.schema import BASE, Params
from coconut.data.examples import Example, read_examples
from coconut.data.mapped import EncodedSet, load_encoded
from coconut.data.views import MarkerIds
from coconut.devices import build_accelerator, peak_memory_mb
from coconut.evaluation.evaluator import Evaluator, Outcome, chain_matches
from coconut.evaluation.statistics import wilson_interval
from coconut.files import check_free_space, writing
from coconut.layout import ENCODED_DIR, EXAMPLES_DIR, OUTPUTS_DIR, RECEIPTS_DIR, checkpoint_dir
from coconut.logs import shows_progress

_BYTES_PER_PREDICTION = 150
"""On disk, without its text."""
_TRAIN_KEYS = ("train_seconds", "train_updates", "peak_memory_mb", "train_oom_retries")


def evaluate_entry(params: Params, name: str) -> None:
    """Score `outputs/<name>/checkpoint` on test and valid; write `metrics.json` and `predictions.jsonl`.

    Raises:
        ValueError: if there is no such entry, or what its training left is missing or damaged.
        OSError: if the outputs cannot be written.
    """
    if name not in (BASE, *params.curriculum):
        raise ValueError(
            f"curriculum.{name}: no such entry, wanted {BASE} or one of the curriculum: {', '.join(params.curriculum)}"
        )
    accelerator = build_accelerator(params.runtime, params.evaluate.precision)
    folder = checkpoint_dir(name)
    model, tokenizer, meta = load_checkpoint(folder, device=str(accelerator.device))
    if meta is None and name != BASE:
        raise ValueError(f"{folder / META_FILE}: no such file, but {name} was trained; `dvc repro` restores it")
    seed = 0 if meta is None else None
    if meta is None:
        # The base model, which nobody has trained: it is asked to answer with a chain of thought.
        meta = CheckpointMeta.of("cot", 0, params.latent, prompt=params.encode.prompt)
    evaluator = Evaluator(
        model.eval(),
        load_feedback(folder, meta.thought, model, parallel_iterations=meta.parallel_iterations, seed=seed),
        tokenizer,
        meta.plan(),
        MarkerIds.of(tokenizer),
        max_new_tokens=params.evaluate.max_new_tokens,
        batch_size=params.runtime.eval_batch,
        autocast=accelerator.autocast,
    )
    examples = {split: read_examples(EXAMPLES_DIR / f"{split}.jsonl") for split in ("test", "valid")}
    datasets = {split: load_encoded(ENCODED_DIR, split, params.evaluate.max_examples) for split in examples}
    # A prediction holds what was generated, often a byte or more a token.
    num_bytes = len(examples["test"]) * (_BYTES_PER_PREDICTION + params.evaluate.max_new_tokens)
    check_free_space({OUTPUTS_DIR / name: num_bytes})
    start = time.monotonic()
    test = _outcomes(evaluator, datasets["test"], examples["test"], f"{name} test")
    seconds_per_example = (time.monotonic() - start) / max(1, len(test))
    valid = _outcomes(evaluator, datasets["valid"], examples["valid"], f"{name} valid")
    metrics = summarise(test, examples["test"], evaluator) | {
        "loss": evaluator.loss(datasets["test"]),
        "valid_accuracy": _share(outcome.right for outcome in valid),
        "valid_loss": evaluator.loss(datasets["valid"]),
        "seconds_per_example": round(seconds_per_example, 6),
        "eval_oom_retries": evaluator.num_oom_retries,
        **_training_metrics(name),
    }
    logger.info("{}: accuracy {accuracy:.4f} of {num_examples} test examples", name, **metrics)
    with writing(OUTPUTS_DIR / name):
        _write(name, {key: metrics[key] for key in METRICS}, test)


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
    "seconds_per_example",
    "train_seconds",
    "train_updates",
    "peak_memory_mb",
    "train_oom_retries",
    "eval_oom_retries",
)
"""Keys of `metrics.json`, the same for every entry, test split under plain names."""


def summarise(outcomes: Sequence[Outcome], examples: Sequence[Example], evaluator: Evaluator) -> dict[str, Any]:
    """Shares and means over the outcomes; `cot_match` is None where the plan leaves no step visible."""
    plan = evaluator.plan
    num_right = sum(outcome.right for outcome in outcomes)
    low, high = wilson_interval(num_right, len(outcomes))
    # A chain that icot has cut inside its steps is no gold text to compare with.
    visible = [
        o for o in outcomes if not plan.num_dropped_tokens and len(examples[o.index].steps) > plan.num_dropped_steps
    ]
    matches = [chain_matches(outcome, examples[outcome.index], plan) for outcome in visible]
    return {
        "accuracy": _share(outcome.right for outcome in outcomes),
        "accuracy_low": low,
        "accuracy_high": high,
        "num_examples": len(outcomes),
        "generated_tokens": _share(outcome.num_generated_tokens for outcome in outcomes),
        "thoughts": float(plan.num_latents),
        "truncated_share": _share(outcome.truncated for outcome in outcomes),
        "no_answer_share": _share(outcome.answer is None for outcome in outcomes),
        "cot_match": _share(matches) if matches else None,
    }


def _share(values: Any) -> float:
    collected = [float(value) for value in values]
    return sum(collected) / max(1, len(collected))


def _outcomes(evaluator: Evaluator, dataset: EncodedSet, examples: Sequence[Example], title: str) -> list[Outcome]:
    with tqdm(desc=title, total=len(dataset), unit="row", disable=not shows_progress(), dynamic_ncols=True) as bar:
        return evaluator.outcomes(dataset, examples, on_rows=bar.update)


def _training_metrics(name: str) -> dict[str, Any]:
    """What training cost; the untouched base model cost nothing."""
    if name == BASE:
        cost = {"train_seconds": 0.0, "train_updates": 0, "train_oom_retries": 0}
        return cost | {"peak_memory_mb": round(peak_memory_mb(), 1)}
    path = OUTPUTS_DIR / name / "train.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {key: summary[key] for key in _TRAIN_KEYS}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: {error!r}, wanted a JSON object with {', '.join(_TRAIN_KEYS)};"
            f" `dvc repro train@{name}` restores it"
        ) from None


def _write(name: str, metrics: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    output_dir = OUTPUTS_DIR / name
    RECEIPTS_DIR.mkdir(parents=True, exist_ok=True)
    predictions_path, metrics_path, receipt_path = (
        output_dir / "predictions.jsonl",
        output_dir / "metrics.json",
        RECEIPTS_DIR / f"{name}.json",
    )
    for path in (predictions_path, metrics_path, receipt_path):
        path.unlink(missing_ok=True)  # It may be linked into DVC's cache, which must not be written to.
    with predictions_path.open("w", encoding="utf-8") as file:
        for outcome in sorted(outcomes, key=lambda outcome: outcome.index):
            file.write(json.dumps(dataclasses.asdict(outcome), ensure_ascii=False) + "\n")
    metrics_path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    # What the report depends on: DVC cannot name the outputs of all entries, but it can watch a folder.
    files = ("metrics.json", "predictions.jsonl", "history.csv")
    receipt = {file: _digest(output_dir / file) for file in files if (output_dir / file).exists()}
    with writing(receipt_path):
        receipt_path.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
