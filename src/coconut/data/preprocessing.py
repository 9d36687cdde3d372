"""The first pipeline stage writes three splits in canonical form that share no question, and their statistics."""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from loguru import logger

from coconut.config.presets import maps_of
from coconut.config.schema import DataConfig, Source
from coconut.data.examples import Example, fold, write_examples
from coconut.data.formats import find_mismatch
from coconut.data.generators import check_size, generate, graphs
from coconut.data.sources import Reading, read_split
from coconut.files import check_free_space
from coconut.layout import SPLITS

_BYTES_PER_ROW = 64
"""Lower bound of the size of a generated example on disk."""
_MOST_HELD_OUT_FIRST = ("test", "valid", "train")
_Statistics = dict[str, Any]


def preprocess(data: DataConfig, examples_dir: Path, metrics_path: Path) -> _Statistics:
    """Read or generate the splits, remove questions that they share, and write them and their statistics.

    Nothing is written before everything has succeeded. Equal input gives equal bytes.

    Returns:
        The content of the metrics file.

    Raises:
        ValueError: The message names the file and row, or the parameter, that cannot be used.
    """
    check_free_space({examples_dir: _num_bytes(data)})
    readings = read_splits(data)
    examples, dropped = part_splits({split: reading.examples for split, reading in readings.items()})
    if data.max_train is not None:
        dropped["train"]["beyond_max_train"] = max(0, len(examples["train"]) - data.max_train)
        examples["train"] = examples["train"][: data.max_train]
    metrics: _Statistics = {
        split: _split_statistics(readings[split], dropped[split], examples[split]) for split in SPLITS
    }
    for split in SPLITS:
        _log_split(split, metrics[split])
        if not examples[split]:
            raise ValueError(
                f"data.{split}: no example left of {readings[split].num_rows} rows (dropped:"
                f" {_listed(metrics[split]['dropped'])}); a question stays only in the last of train, valid, test that"
                " has it: use start and rows to cut one file into splits"
            )
        _warn_of_mismatch(split, getattr(data, split), readings[split], examples[split])
    metrics["overlap"] = overlap(examples)
    metrics["max_train"] = data.max_train
    if any("graphs" in metrics[split] for split in SPLITS):
        metrics["graphs_in_paper"] = graphs.PAPER_STATISTICS
    _write(examples, metrics, examples_dir, metrics_path)
    return metrics


def _num_bytes(data: DataConfig) -> int:
    """Estimate the size of the examples on disk: the size of whole files, and some bytes for each other row."""
    sources = [getattr(data, split) for split in SPLITS]
    files = {Path(data.raw_dir, source.file) for source in sources if source.file is not None and source.rows is None}
    num_rows = sum(source.rows or 0 for source in sources)
    return sum(path.stat().st_size for path in files if path.is_file()) + _BYTES_PER_ROW * num_rows


def read_splits(data: DataConfig) -> dict[str, Reading]:
    """Read or generate each split.

    A generated split has a stream of its own, which leaves out the questions of the splits that are more
    held out: those of test in valid, and those of both in train. So another test set changes train only by
    the questions that stand in both.
    """
    sources: dict[str, Source] = {split: getattr(data, split) for split in SPLITS}
    generated = [source for source in sources.values() if source.format == "generated"]
    if generated:
        assert data.generator is not None, "the config requires a generator for generated splits"
        check_size(data.generator, sum(source.start + (source.rows or 0) for source in generated))
    readings = {split: read_split(data, split) for split in SPLITS if sources[split].format != "generated"}
    taken: set[str] = set()
    for split in _MOST_HELD_OUT_FIRST:
        if split not in readings:
            readings[split] = _generate_split(data, split, taken)
        taken.update(map(_key, readings[split].examples))
    return {split: readings[split] for split in SPLITS}


def _generate_split(data: DataConfig, split: str, taken: Collection[str]) -> Reading:
    source: Source = getattr(data, split)
    assert data.generator is not None
    assert source.rows is not None
    # Test keeps the stream that it had before splits had streams of their own, so published figures still hold.
    seed = data.seed if split == "test" else f"{split}/{data.seed}"
    examples = generate(data.generator, source.rows, seed=seed, start=source.start, taken=taken)
    return Reading(examples, len(examples), {})


def part_splits(
    examples: Mapping[str, list[Example]],
) -> tuple[dict[str, list[Example]], dict[str, dict[str, int]]]:
    """Remove questions from `train` that are in `valid` or `test`, and from `valid` those that are in `test`.

    The test split stays as published, so that accuracies can be compared with those of others.

    Returns:
        (examples, dropped): the splits, and the number of rows that each lost, by reason.
    """
    test = {_key(example) for example in examples["test"]}
    valid = {_key(example) for example in examples["valid"]} - test
    kept = {"test": list(examples["test"])}
    dropped: dict[str, dict[str, int]] = {"test": {}}
    for split, rivals in (("valid", {"in_test": test}), ("train", {"in_test": test, "in_valid": valid})):
        kept[split] = [e for e in examples[split] if not any(_key(e) in keys for keys in rivals.values())]
        dropped[split] = {reason: sum(_key(e) in keys for e in examples[split]) for reason, keys in rivals.items()}
    return kept, dropped


def overlap(examples: Mapping[str, list[Example]]) -> dict[str, int]:
    """Count the questions that two splits share."""
    keys = {split: {_key(example) for example in examples[split]} for split in SPLITS}
    pairs = [("train", "valid"), ("train", "test"), ("valid", "test")]
    return {f"{first}_{second}": len(keys[first] & keys[second]) for first, second in pairs}


def _key(example: Example) -> str:
    # Published copies of one set differ in their white space.
    return fold(example.question)


def _split_statistics(reading: Reading, dropped: Mapping[str, int], examples: list[Example]) -> _Statistics:
    num_steps = Counter(len(example.steps) for example in examples)
    left_out = {"left out by where": reading.num_left_out} if reading.num_left_out else {}
    malformed = {f"malformed: {reason}": number for reason, number in reading.malformed.items()}
    statistics: _Statistics = {
        "rows_read": reading.num_rows + reading.num_left_out,
        "kept": len(examples),
        "dropped": left_out | malformed | dict(dropped),
        "empty_steps": reading.num_empty_steps,
        "repeated_questions": len(examples) - len({_key(example) for example in examples}),
        "steps_mean": round(fmean(num_steps.elements()), 3) if examples else 0.0,
        "steps_per_example": {str(number): num_steps[number] for number in sorted(num_steps)},
    }
    graph_statistics = graphs.statistics(examples)
    if graph_statistics is not None:
        statistics["graphs"] = graph_statistics
    return statistics


def _log_split(split: str, statistics: _Statistics) -> None:
    logger.info(
        "{}: {} rows read, {} examples kept, {:.2f} steps each; dropped: {}; repeated questions: {}; empty steps: {}",
        *(split, statistics["rows_read"], statistics["kept"], statistics["steps_mean"]),
        *(_listed(statistics["dropped"]), statistics["repeated_questions"], statistics["empty_steps"]),
    )


def _warn_of_mismatch(split: str, source: Source, reading: Reading, examples: list[Example]) -> None:
    # Steps are missed where they are trained on, unless every map of the format is known to name none.
    are_missed = reading.has_steps or (split == "train" and any(fields.steps for fields in maps_of(source)))
    mismatch = find_mismatch(source.format, examples) if are_missed and source.format != "generated" else None
    if mismatch is not None:
        logger.warning(
            "{}: {} in {} as format {} reads it; if that is a surprise, correct data.{}.format",
            *(split, mismatch, source.file or source.hub, source.format, split),
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.items() if number) or "none"


def _write(examples: Mapping[str, list[Example]], metrics: _Statistics, examples_dir: Path, metrics_path: Path) -> None:
    paths = {split: examples_dir / f"{split}.jsonl" for split in SPLITS}
    try:
        examples_dir.mkdir(parents=True, exist_ok=True)
        metrics_path.parent.mkdir(parents=True, exist_ok=True)
        for split, path in paths.items():
            write_examples(_unfinished(path), examples[split])
        _unfinished(metrics_path).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        for path in (*paths.values(), metrics_path):
            _unfinished(path).replace(path)
    except OSError as error:
        raise OSError(
            f"{error.filename or examples_dir}: cannot be written: {error.strerror or error};"
            " make the folder writable, or free space on its disk"
        ) from None


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")
