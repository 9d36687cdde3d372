"""One entry's checkpoint to its metrics and predictions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from loguru import logger
from tqdm import tqdm

from coconut.checkpoints.feedback import load_feedback
from coconut.checkpoints.folder import load_checkpoint
from coconut.checkpoints.meta import META_FILE, CheckpointMeta
from coconut.checkpoints.tensors import RESTORE
from coconut.checkpoints.weights import read_json
from coconut.config.schema import BASE, EvaluateConfig, Params
from coconut.data.encoded import EncodedSet, load_encoded
from coconut.data.examples import Example, read_examples
from coconut.devices import (
    Stopwatch,
    build_accelerator,
    evaluation_precision,
    is_shared,
    machine_load,
    peak_memory_mb,
    ranks_of,
)
from coconut.evaluation.answers import same_answer
from coconut.evaluation.evaluator import Evaluator
from coconut.evaluation.outcomes import Outcome, chain_matches, read_answer
from coconut.evaluation.outputs import (
    COSTS,
    METRICS,
    SET_METRICS,
    expected_metrics,
    warnings_about_results,
    write_entry,
)
from coconut.evaluation.samples import Samples, measure
from coconut.evaluation.scores import Scores, ScoreStore
from coconut.evaluation.statistics import wilson_interval
from coconut.files import check_free_space, writing
from coconut.layout import (
    ENCODED_DIR,
    EXAMPLES_DIR,
    OUTPUTS_DIR,
    checkpoint_dir,
    find_test_sets,
)
from coconut.logs import shows_progress
from coconut.methods import WORDS
from coconut.model.head import num_positions
from coconut.model.passes import PassOptions
from coconut.model.sampling import Sampling
from coconut.ranks import Ranks

if TYPE_CHECKING:
    from accelerate import Accelerator

_BYTES_PER_PREDICTION = 150
"""On disk, without its text."""
_TRAIN_KEYS = (
    *("train_seconds", "train_cpu_seconds", "train_load", "train_updates", "peak_memory_mb", "train_oom_retries"),
)


def evaluate_entry(params: Params, name: str, scored: ScoreStore | None = None) -> None:
    """Score `outputs/<name>/checkpoint` on the test sets and on valid; write metrics, costs and predictions.

    Args:
        scored: the sets that were scored before; None to score all of them.

    Raises:
        ValueError: if there is no such entry, what its training left is missing or damaged, or the model fails.
        OSError: if the outputs cannot be written.
    """
    check_entry(params, name)
    ranks = ranks_of(_accelerator(params)) if is_shared() else Ranks()
    training = _training_metrics(name)
    names = find_test_sets()
    check_free_space({OUTPUTS_DIR / name: _num_bytes(params, names)})
    evaluator = cache(lambda: open_evaluator(params, name))  # Not opened where every set was scored before.
    sets = {}
    for split in (*names, "valid"):
        rule = find_rule(params, split)
        score = partial(_score, evaluator, params, split, f"{name} {names.get(split, split)}", rule)
        sets[split] = score() if scored is None else scored.get(split, score, ranks, by=f"{rule}, {split == 'valid'}")
    test, valid = sets["test"].metrics, sets["valid"].metrics
    metrics = test | {
        "valid_accuracy": valid["accuracy"],
        "valid_loss": valid["loss"],
        "eval_oom_retries": sum(found.metrics["eval_oom_retries"] for found in sets.values()),
        **training,
    }
    if name == BASE:
        metrics["peak_memory_mb"] = round(max(ranks.gather(peak_memory_mb())), 1)
    for warning in warnings_about_results(metrics):
        logger.warning("{}: {}", name, warning)
    flat, costs = {key: metrics[key] for key in METRICS}, {key: metrics[key] for key in COSTS}
    for split in list(names)[1:]:
        flat |= {f"{names[split]}.{key}": sets[split].metrics[key] for key in SET_METRICS}
        costs[f"{names[split]}.seconds_per_example"] = sets[split].metrics["seconds_per_example"]
    for split, one in names.items():
        prefix = "" if split == "test" else f"{one}."
        flat |= {f"{prefix}{key}": value for key, value in sets[split].metrics.get("sampled", {}).items()}
    if name == BASE:
        flat |= expected_metrics(params)
    if not ranks.is_main:
        return
    with writing(OUTPUTS_DIR / name):
        write_entry(name, flat, costs, {split: sets[split] for split in names})
    if scored is not None:
        scored.drop_others()


def _num_bytes(params: Params, splits: Iterable[str]) -> int:
    """Estimate the size of the predictions, which hold what was generated, often a byte or more a token."""
    num_rows = sum(len(read_examples(EXAMPLES_DIR / f"{split}.jsonl")) for split in splits)
    return num_rows * (_BYTES_PER_PREDICTION + params.evaluate.max_new_tokens)


def find_rule(params: Params, split: str) -> str | None:
    """Return the rule by which a set's answers are found or compared, where that is not the checkpoint's."""
    rule = (params.evaluate.answer_rules or {}).get(params.data.test_names.get(split, ""))
    return "digits" if rule is None and params.data.is_multiplication(split) else rule


def follow_rule(evaluator: Evaluator, rule: str | None) -> Evaluator:
    """Return the evaluator that finds or compares answers by the rule of a set."""
    match rule:
        case "digits" | "math_verify":
            return replace(evaluator, comparison=rule)
        case "marked" | "last_number":
            return replace(evaluator, answer=rule)
    return evaluator


def _score(opened: Callable[[], Evaluator], params: Params, split: str, title: str, rule: str | None) -> Scores:
    """Score one set of questions."""
    evaluator = follow_rule(opened(), rule)
    examples = read_examples(EXAMPLES_DIR / f"{split}.jsonl")
    dataset = load_encoded(ENCODED_DIR, split, params.evaluate.max_examples)
    num_retries, watch = evaluator.num_oom_retries, Stopwatch()
    outcomes = _outcomes(evaluator, dataset, examples, title)
    num_scored = max(1, len(outcomes))
    metrics = summarise(outcomes, examples, evaluator) | {
        "seconds_per_example": round(watch.seconds / num_scored, 6),
        "cpu_seconds_per_example": round(watch.cpu_seconds / num_scored, 6),
        "loss": evaluator.loss(dataset),
        "eval_load": round(machine_load(), 3),
        # Their prompt does not fit into the model's positions, or holds words that the vocabulary lacks.
        "num_left_out": len(examples) - len(load_encoded(ENCODED_DIR, split)),
        "eval_oom_retries": sum(evaluator.ranks.gather(evaluator.num_oom_retries - num_retries)),
    }
    logger.info("{}: accuracy {accuracy:.4f} of {num_examples} examples", title, **metrics)
    if not params.evaluate.samples or split == "valid":
        return Scores(outcomes, metrics)
    samples = _sample(evaluator, params.evaluate, dataset, examples, title)
    found = measure(samples, params.evaluate.samples, evaluator.comparison)
    logger.info("{}: of {num_samples} samples the majority is right in {majority:.4f}", title, **found)
    return Scores(outcomes, metrics | {"sampled": found}, samples)


def _sample(
    evaluator: Evaluator, config: EvaluateConfig, dataset: EncodedSet, examples: Sequence[Example], title: str
) -> list[Samples]:
    sampling = Sampling(config.samples, config.temperature, config.thought_noise, config.noise_scale)
    if not evaluator.layout.num_latents or evaluator.layout.slot == "pause":
        sampling = replace(sampling, noise="none")  # There is no thought to draw.
    columns = dataset[range(len(dataset))]
    with _bar(f"{title} samples", len(dataset)) as bar:
        decoded = evaluator.sample(
            evaluator.prompts(columns["question_ids"]), sampling, config.sample_seed, on_rows=bar.update
        )
    found = []
    for index, rows in zip(columns["index"], decoded, strict=True):
        texts = evaluator.tokenizer.batch_decode([row.ids for row in rows], skip_special_tokens=True)
        gold, answers = examples[index].answer, [read_answer(text, evaluator.answer) for text in texts]
        right = [same_answer(answer, gold, evaluator.comparison) for answer in answers]
        found.append(Samples(index, gold, answers, right))
    return sorted(found, key=lambda one: one.index)


def check_entry(params: Params, name: str) -> None:
    """Refuse a name that is neither `base` nor an entry.

    Raises:
        ValueError: naming those that there are.
    """
    if name not in (BASE, *params.curriculum):
        raise ValueError(
            f"curriculum.{name}: no such entry, wanted {BASE} or one of the curriculum: {', '.join(params.curriculum)}"
        )


def _accelerator(params: Params) -> "Accelerator":
    return build_accelerator(params.runtime, evaluation_precision(params.runtime, params.evaluate.precision))


def open_evaluator(params: Params, name: str) -> Evaluator:
    """The entry's model, ready to be scored on the view that it was trained for."""
    accelerator = _accelerator(params)
    folder = checkpoint_dir(name)
    model, tokenizer, meta = load_checkpoint(folder, device=str(accelerator.device))
    if meta is None and name != BASE:
        raise ValueError(f"{folder / META_FILE}: no such file, but {name} was trained; {RESTORE}")
    seed = 0 if meta is None else None
    if meta is None:
        # The base model, which nobody has trained: it is asked to answer with a chain of thought.
        meta = CheckpointMeta.of(WORDS, 0, params.latent, prompt=params.encode.prompt)
    if meta.prompt != params.encode.prompt:
        raise ValueError(
            f"encode.prompt: found {params.encode.prompt}, wanted {meta.prompt}, by which {folder / META_FILE} says"
            " that the model was trained; set it so"
        )
    layout, room = meta.layout(), num_positions(model)
    if layout.num_latents >= room:
        raise ValueError(
            f"{folder / META_FILE}: found {layout.num_latents} thoughts, wanted fewer than the model's {room} "
            f" positions; {RESTORE}"
        )
    return Evaluator(
        model.eval(),
        load_feedback(folder, meta.thought, model, parallel_iterations=meta.parallel_iterations, seed=seed),
        tokenizer,
        layout,
        max_new_tokens=params.evaluate.max_new_tokens,
        batch_size=params.runtime.eval_batch,
        autocast=accelerator.autocast,
        options=PassOptions(fast=params.runtime.fast),
        answer=meta.answer,
        comparison=params.evaluate.tolerance,
        ranks=ranks_of(accelerator),
    )


def summarise(outcomes: Sequence[Outcome], examples: Sequence[Example], evaluator: Evaluator) -> dict[str, Any]:
    """Shares and means over the outcomes; `cot_match` is None where the layout leaves no step visible."""
    layout = evaluator.layout
    num_right = sum(outcome.right for outcome in outcomes)
    low, high = wilson_interval(num_right, len(outcomes))
    # A chain that is cut inside its steps is no gold text to compare with.
    visible = [
        o for o in outcomes if not layout.num_dropped_tokens and len(examples[o.index].steps) > layout.num_dropped_steps
    ]
    matches = [chain_matches(outcome, examples[outcome.index], layout) for outcome in visible]
    return {
        "accuracy": _share(outcome.right for outcome in outcomes),
        "accuracy_low": low,
        "accuracy_high": high,
        "num_examples": len(outcomes),
        "generated_tokens": _share(outcome.num_generated_tokens for outcome in outcomes),
        "thoughts": float(layout.num_latents),
        "truncated_share": _share(outcome.truncated for outcome in outcomes),
        "no_answer_share": _share(outcome.answer is None for outcome in outcomes),
        "cot_match": _share(matches) if matches else None,
    }


def _share(values: Any) -> float:
    collected = [float(value) for value in values]
    return sum(collected) / max(1, len(collected))


def _bar(title: str, num_rows: int) -> "tqdm[Any]":
    return tqdm(desc=title, total=num_rows, unit="row", disable=not shows_progress(), dynamic_ncols=True)


def _outcomes(evaluator: Evaluator, dataset: EncodedSet, examples: Sequence[Example], title: str) -> list[Outcome]:
    with _bar(title, len(dataset)) as bar:
        return evaluator.outcomes(dataset, examples, on_rows=bar.update)


def _training_metrics(name: str) -> dict[str, Any]:
    """Read what training cost; the untouched base model cost nothing."""
    if name == BASE:
        return dict.fromkeys(_TRAIN_KEYS, 0.0) | {"train_updates": 0, "train_oom_retries": 0}
    path = OUTPUTS_DIR / name / "train.json"
    summary = read_json(path)
    numbers = {key: summary.get(key) for key in _TRAIN_KEYS}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"{path}: {key}: found {value!r:.80}, wanted a number; `dvc repro train@{name}` restores it"
            )
    return numbers
