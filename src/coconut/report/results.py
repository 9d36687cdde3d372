"""What the pipeline left behind, one `Result` for each entry of the curriculum."""

import csv
import io
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.config.schema import BASE, Entry

ReadText = Callable[[str], str | None]
"""From a path below `outputs/` to the file's text, None where there is no such file."""


@dataclass(frozen=True)
class Prediction:
    """What one test example got."""

    index: int
    num_steps: int
    gold: str
    answer: str | None
    right: bool
    text: str


@dataclass(frozen=True)
class Result:
    """What is known about one entry; the parts of a failed pipeline stage are None or empty."""

    name: str
    parent: str | None
    method: str
    latent_stage: int
    max_latent_stage: int
    metrics: Mapping[str, float | None] | None
    history: Sequence[Mapping[str, float | None]]
    """One mapping an epoch."""
    predictions: Sequence[Prediction]

    def metric(self, name: str) -> float | None:
        """One number of `metrics.json`, None where it is missing or null."""
        return None if self.metrics is None else self.metrics.get(name)


def read_folder(folder: Path) -> ReadText:
    """Read from a folder on disk."""

    def read_text(name: str) -> str | None:
        try:
            return (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{folder / name}: not UTF-8 at byte {error.start}; delete the file and `dvc repro` makes it anew"
            ) from None

    return read_text


def read_results(curriculum: Mapping[str, Entry], read_text: ReadText) -> list[Result]:
    """Read what every entry left, in the curriculum's order; the untouched model first if it was scored.

    Raises:
        ValueError: a file is there but damaged.
    """
    results = [_read_result(entry, read_text) for entry in curriculum.values()]
    base_metrics = _read_metrics(BASE, read_text)
    if base_metrics is not None:
        predictions = _read_predictions(BASE, read_text)
        results.insert(0, Result(BASE, None, "untouched", 0, 0, base_metrics, [], predictions))
    return results


def read_facts(read_text: ReadText) -> dict[str, Any] | None:
    """What `preprocess` counted."""
    text = read_text("preprocess.json")
    return None if text is None else _parse_json(text, "preprocess.json")


def find_lineage(results: Sequence[Result], name: str) -> list[Result]:
    """The entry and its ancestors, the oldest first."""
    by_name = {result.name: result for result in results}
    lineage: list[Result] = []
    ancestor: str | None = name
    while ancestor is not None and ancestor in by_name:
        lineage.insert(0, by_name[ancestor])
        ancestor = by_name[ancestor].parent
    return lineage


def find_last(results: Sequence[Result], method: str) -> Result | None:
    """The entry that trained `method` through most entries, so the end of its curriculum.

    Of several the first, so that a variant listed later does not replace it. Entries without
    predictions count only where no other is left.
    """
    evaluated = [result for result in results if result.predictions]
    return find_end(results, method, among=evaluated) or find_end(results, method, among=results)


def find_end(results: Sequence[Result], method: str, *, among: Sequence[Result]) -> Result | None:
    """Of these entries the one that trained `method` through most entries of its lineage in `results`."""

    def depth(result: Result) -> int:
        return sum(ancestor.method == method for ancestor in find_lineage(results, result.name))

    return max((result for result in among if result.method == method), key=depth, default=None)


def _read_result(entry: Entry, read_text: ReadText) -> Result:
    return Result(
        entry.name,
        entry.parent,
        entry.method,
        entry.latent_stage,
        entry.latent.max_latent_stage,
        _read_metrics(entry.name, read_text),
        _read_history(entry.name, read_text),
        _read_predictions(entry.name, read_text),
    )


def _read_metrics(entry: str, read_text: ReadText) -> dict[str, float | None] | None:
    path = f"{entry}/metrics.json"
    text = read_text(path)
    if text is None:
        return None
    metrics = _parse_json(text, path)
    for key, value in metrics.items():
        if value is not None and type(value) not in (int, float):
            raise ValueError(
                f"outputs/{path}: {key}: found {value!r}, wanted a number or null,"
                f" made by `dvc repro --force evaluate@{entry}`"
            )
    return metrics


def _read_history(entry: str, read_text: ReadText) -> list[dict[str, float | None]]:
    path = f"{entry}/history.csv"
    rows = csv.DictReader(io.StringIO(read_text(path) or ""))
    try:
        return [{key: float(cell) if cell else None for key, cell in row.items() if key != "entry"} for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"outputs/{path}:{rows.line_num}: {error}; wanted as many numbers as the head names,"
            f" made by `dvc repro --force train@{entry}`"
        ) from None


def _read_predictions(entry: str, read_text: ReadText) -> list[Prediction]:
    path = f"{entry}/predictions.jsonl"
    # Not splitlines(): a text may hold U+2028, which JSON leaves as it is.
    lines = (read_text(path) or "").split("\n")
    rows = [_parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]
    kinds = typing.get_type_hints(Prediction)
    for number, row in enumerate(rows, 1):
        wrong = [field for field, kind in kinds.items() if not isinstance(row.get(field, ...), kind)]
        if wrong:
            raise ValueError(
                f"outputs/{path}:{number}: {wrong[0]} is missing or of another type; wanted {', '.join(kinds)},"
                f" made by `dvc repro --force evaluate@{entry}`"
            )
    return [Prediction(**{field: row[field] for field in kinds}) for row in rows]


def _parse_json(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"outputs/{place}: not valid JSON ({error}); delete the file and `dvc repro` makes it anew"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"outputs/{place}: found {type(value).__name__}, wanted a JSON object; `dvc repro` makes it")
    return value
