"""The first pipeline stage writes train, valid and the test sets in canonical form, and their statistics.

Train shares no question with valid or a test set, nor valid with a test set. Test sets stay as they are published.
"""

import errno
import itertools
import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from loguru import logger

from coconut.config.presets import maps_of
from coconut.config.schema import DataConfig, Generator, Source
from coconut.data.examples import Example, fold, write_examples
from coconut.data.formats import find_mismatch
from coconut.data.generators import graphs
from coconut.data.sources import Reading, find_files, read_split
from coconut.data.streams import check_size, generate
from coconut.files import check_free_space, cure_of, system_error
from coconut.layout import FURTHER_TESTS

_BYTES_PER_ROW = 64
"""Lower bound of the size of a generated example on disk."""
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
    read = {split: reading.examples for split, reading in readings.items()}
    examples, dropped = part_splits(read, data.test_names)
    if data.max_train is not None:
        dropped["train"]["beyond_max_train"] = max(0, len(examples["train"]) - data.max_train)
        examples["train"] = examples["train"][: data.max_train]
    statistics = {split: _split_statistics(readings[split], dropped[split], examples[split]) for split in examples}
    for split in examples:
        _log_split(split, statistics[split])
        if not examples[split]:
            raise ValueError(
                f"{data.path_of(split)}: no example left of {readings[split].num_rows} rows (dropped:"
                f" {_listed(statistics[split]['dropped'])}); a question stays only in the last of train, valid, test"
                " that has it: use start and rows to cut one file into splits"
            )
        _warn_of_mismatch(data, split, readings[split], examples[split])
    metrics = _with_tests_in_one(statistics)
    metrics["overlap"] = overlap(examples, data.test_names)
    metrics["max_train"] = data.max_train
    if any("graphs" in found for found in statistics.values()):
        metrics["graphs_in_paper"] = graphs.PAPER_STATISTICS
    _write(examples, metrics, examples_dir, metrics_path)
    return metrics


def _with_tests_in_one(statistics: Mapping[str, _Statistics]) -> _Statistics:
    """Put the statistics of test sets other than the first into one mapping by their names."""
    further = {split.partition("/")[2]: found for split, found in statistics.items() if "/" in split}
    plain = {split: found for split, found in statistics.items() if "/" not in split}
    return plain | ({FURTHER_TESTS: further} if further else {})


def _num_bytes(data: DataConfig) -> int:
    """Estimate the size of the examples on disk: the size of whole files, and some bytes for each other row."""
    sources = list(data.splits.values())
    whole = [source.file for source in sources if source.file is not None and source.rows is None]
    files = {path for file in whole for path in find_files(Path(data.raw_dir, file))}
    num_rows = sum(source.rows or 0 for source in sources)
    return sum(path.stat().st_size for path in files if path.is_file()) + _BYTES_PER_ROW * num_rows


def read_splits(data: DataConfig) -> dict[str, Reading]:
    """Read or generate each split.

    A generated split has a stream of its own, which leaves out the questions of the splits that are more
    held out: those of the test sets in valid, and those of all of them in train. So another test set changes train
    only by the questions that stand in both.

    Returns:
        The splits by the names of their files, in the order of `DataConfig.splits`.
    """
    sources = data.splits
    _check_sizes(data, [source for source in sources.values() if source.format == "generated"])
    readings = {split: read_split(data, split) for split, source in sources.items() if source.format != "generated"}
    tests = list(data.test_names)
    taken: set[str] = set()
    for split in (*tests, "valid", "train"):
        if split not in readings:
            readings[split] = _generate_split(data, split, () if split in tests else taken)
        taken.update(map(_key, readings[split].examples))
    return {split: readings[split] for split in sources}


def _check_sizes(data: DataConfig, sources: list[Source]) -> None:
    num_rows: Counter[Generator] = Counter()
    for source in sources:
        num_rows[data.generator_of(source)] += source.start + (source.rows or 0)
    for generator, number in num_rows.items():
        check_size(generator, number)


def _generate_split(data: DataConfig, split: str, taken: Collection[str]) -> Reading:
    source = data.splits[split]
    assert source.rows is not None
    # Test keeps the stream that it had before splits had streams of their own, so published figures still hold.
    seed = data.seed if split == "test" else f"{split}/{data.seed}"
    examples = generate(data.generator_of(source), source.rows, seed=seed, start=source.start, taken=taken)
    return Reading(examples, len(examples), {})


def part_splits(
    examples: Mapping[str, list[Example]], test_names: Mapping[str, str]
) -> tuple[dict[str, list[Example]], dict[str, dict[str, int]]]:
    """Remove questions from train that are in valid or in a test set, and from valid those that are in a test set.

    Test sets stay as published, so that accuracies can be compared with those of others. A question that stands in
    several sets is counted for the first of them.

    Args:
        examples: by split.
        test_names: the names of the test sets by split.

    Returns:
        (examples, dropped): the splits, and the number of rows that each lost, by reason.
    """
    rivals: dict[str, set[str]] = {}
    kept = {split: list(rows) for split, rows in examples.items()}
    dropped: dict[str, dict[str, int]] = {split: {} for split in examples}
    for split, name in (*test_names.items(), ("valid", "valid"), ("train", "train")):
        if split not in test_names:
            taken = set().union(*rivals.values())
            kept[split] = [e for e in examples[split] if _key(e) not in taken]
            dropped[split] = {
                f"in_{rival}": sum(_key(e) in keys for e in examples[split]) for rival, keys in rivals.items()
            }
        rivals[name] = {_key(e) for e in kept[split]}.difference(*rivals.values())
    return kept, dropped


def overlap(examples: Mapping[str, list[Example]], test_names: Mapping[str, str]) -> dict[str, int]:
    """Count the questions that two splits share, by the names of both."""
    names = {"train": "train", "valid": "valid", **test_names}
    keys = {name: {_key(example) for example in examples[split]} for split, name in names.items()}
    return {f"{first}_{second}": len(keys[first] & keys[second]) for first, second in itertools.combinations(keys, 2)}


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


def _warn_of_mismatch(data: DataConfig, split: str, reading: Reading, examples: list[Example]) -> None:
    source = data.splits[split]
    # Steps are missed where they are trained on, unless every map of the format is known to name none.
    are_missed = reading.has_steps or (split == "train" and any(fields.steps for fields in maps_of(source)))
    mismatch = find_mismatch(source.format, examples) if are_missed and source.format != "generated" else None
    if mismatch is not None:
        logger.warning(
            "{}: {} in {} as format {} reads it; if that is a surprise, correct {}.format",
            *(split, mismatch, source.file or source.hub, source.format, data.path_of(split)),
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.items() if number) or "none"


def _write(examples: Mapping[str, list[Example]], metrics: _Statistics, examples_dir: Path, metrics_path: Path) -> None:
    paths = {split: examples_dir / f"{split}.jsonl" for split in examples}
    try:
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        metrics_path.parent.mkdir(parents=True, exist_ok=True)
        for split, path in paths.items():
            write_examples(_unfinished(path), examples[split])
        _unfinished(metrics_path).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        for path in (*paths.values(), metrics_path):
            _unfinished(path).replace(path)
        # Of a set that is not asked for any more.
        for path in set((examples_dir / FURTHER_TESTS).glob("*.jsonl")) - set(paths.values()):
            path.unlink()
    except OSError as error:
        cure = cure_of(error, "make the folder writable, or free space on its disk")
        message = f"{error.filename or examples_dir}: cannot be written: {error.strerror or error}; {cure}"
        raise system_error(error.errno or errno.EIO, message) from None


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")
