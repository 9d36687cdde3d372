"""Reads the outputs of the pipeline: one `Result` for each entry of the curriculum."""

import csv
import io
import json
import math
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.config.schema import BASE, Entry
from coconut.tracking import flatten

ReadText = Callable[[str], str | None]
"""From a path below `outputs/` to the file's text, None where there is no such file."""


EVALUATE_BASE = "evaluate_base"
"""The pipeline stage that scores the untouched model."""
_MAX_DEPTH = 20
"""Levels of JSON in any file that the stages write."""
_LARGEST = 1e100
"""A number beyond this is damage; sums and products of smaller ones stay finite."""


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one test example."""

    index: int
    num_steps: int
    gold: str
    answer: str | None
    right: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that is known about one entry; the parts of a failed pipeline stage are None or empty."""

    name: str
    parent: str | None
    method: str
    latent_stage: int
    max_latent_stage: int
    metrics: Mapping[str, float | None] | None
    history: Sequence[Mapping[str, float | None]]
    """One mapping an epoch."""
    predictions: Sequence[Prediction]
    mark: str | None = None
    """The reason why its metrics and predictions are not of this run (see `provenance`); None when they are."""
    training_mark: str | None = None
    """The same for its history."""

    @property
    def label(self) -> str:
        """Return its name in tables and figures, with its mark."""
        return _label(self.name, self.mark if self.metrics is not None else None)

    @property
    def training_label(self) -> str:
        """Return its name where its history is shown."""
        return _label(self.name, self.training_mark)

    def metric(self, name: str) -> float | None:
        """Return one number of `metrics.json`, None where it is missing or null."""
        return None if self.metrics is None else self.metrics.get(name)


def _label(name: str, mark: str | None) -> str:
    return name if mark is None else f"{name} ({mark})"


def read_folder(folder: Path) -> ReadText:
    """Return a function that reads files of a folder on disk."""

    def read_text(name: str) -> str | None:
        try:
            return (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise _damaged(name, f"byte {error.start}, which is not UTF-8", "text") from None

    return read_text


def read_results(
    curriculum: Mapping[str, Entry], read_text: ReadText, *, marks: Mapping[str, str] | None = None
) -> list[Result]:
    """Read what every entry left, in the curriculum's order; the untouched model first if it was scored.

    Args:
        marks: by pipeline stage, why its outputs are not of this run; see `provenance.judge`.

    Raises:
        ValueError: a file is there but damaged.
    """
    marks = marks or {}
    results = [_read_result(entry, read_text, marks) for entry in curriculum.values()]
    base_metrics = _read_metrics(BASE, read_text)
    if base_metrics is not None:
        base = Result(
            name=BASE,
            parent=None,
            method="untouched",
            latent_stage=0,
            max_latent_stage=0,
            metrics=base_metrics,
            history=[],
            predictions=_read_predictions(BASE, read_text),
            mark=marks.get(EVALUATE_BASE),
        )
        results.insert(0, base)
    return results


def read_facts(read_text: ReadText) -> dict[str, Any] | None:
    """Read what `preprocess` counted, as dotted keys; None where it left nothing.

    Raises:
        ValueError: the file is damaged.
    """
    text = read_text("preprocess.json")
    return None if text is None else flatten(_parse_json(text, "preprocess.json"))


def find_lineage(results: Sequence[Result], name: str) -> list[Result]:
    """List the entry and its ancestors, the oldest first."""
    by_name = {result.name: result for result in results}
    lineage: list[Result] = []
    ancestor: str | None = name
    while ancestor is not None and ancestor in by_name:
        lineage.insert(0, by_name[ancestor])
        ancestor = by_name[ancestor].parent
    return lineage


def count_updates_before(results: Sequence[Result], result: Result) -> float:
    """Count the updates of an entry's ancestors, which came before its own."""
    return sum(_num_updates(ancestor) for ancestor in find_lineage(results, result.name)[:-1])


def _num_updates(result: Result) -> float:
    return max((row.get("update") or 0 for row in result.history), default=0)


def find_last(results: Sequence[Result], method: str) -> Result | None:
    """Find the entry that trained `method` through most entries: the end of its curriculum.

    Of several such entries the first is taken, so that a variant listed later does not replace it. Entries without
    predictions count only where no other is left.
    """
    evaluated = [result for result in results if result.predictions]
    return find_end(results, method, among=evaluated) or find_end(results, method, among=results)


def find_end(results: Sequence[Result], method: str, *, among: Sequence[Result]) -> Result | None:
    """Find the entry among these that trained `method` through most entries of its lineage in `results`."""

    def depth(result: Result) -> int:
        return sum(ancestor.method == method for ancestor in find_lineage(results, result.name))

    return max((result for result in among if result.method == method), key=depth, default=None)


def _read_result(entry: Entry, read_text: ReadText, marks: Mapping[str, str]) -> Result:
    return Result(
        name=entry.name,
        parent=entry.parent,
        method=entry.method,
        latent_stage=entry.latent_stage,
        max_latent_stage=entry.latent.max_latent_stage,
        metrics=_read_metrics(entry.name, read_text),
        history=_read_history(entry.name, read_text),
        predictions=_read_predictions(entry.name, read_text),
        mark=marks.get(evaluate_stage(entry.name)),
        training_mark=marks.get(f"train@{entry.name}"),
    )


def evaluate_stage(entry: str) -> str:
    """Name the pipeline stage that scores an entry."""
    return EVALUATE_BASE if entry == BASE else f"evaluate@{entry}"


def _read_metrics(entry: str, read_text: ReadText) -> dict[str, float | None] | None:
    path = f"{entry}/metrics.json"
    text = read_text(path)
    if text is None:
        return None
    metrics = {key: _parse_number(value, f"{path}: {key}") for key, value in _parse_json(text, path).items()}
    low, accuracy, high = (metrics.get(key) for key in ("accuracy_low", "accuracy", "accuracy_high"))
    bounds = [0.0, *(value for value in (low, accuracy, high) if value is not None), 1.0]
    if sorted(bounds) != bounds:
        raise _damaged(path, f"accuracy {accuracy} in [{low}, {high}]", "a share inside its interval")
    return metrics


def _parse_number(value: Any, place: str) -> float | None:
    """Return a finite number; None for null and for what is not finite, as a diverged loss."""
    if value is None or (type(value) is float and not math.isfinite(value)):
        return None
    if type(value) not in (int, float):
        raise _damaged(place, reprlib.repr(value), "a number or null")
    if abs(value) > _LARGEST:
        raise _damaged(place, f"a number beyond {_LARGEST:g}", "a smaller one")
    return typing.cast(float, value)


def _read_history(entry: str, read_text: ReadText) -> list[dict[str, float | None]]:
    path = f"{entry}/history.csv"
    rows = csv.DictReader(io.StringIO(read_text(path) or "", newline=""))
    try:
        table = [{key: float(cell or "nan") for key, cell in row.items() if key != "entry"} for row in rows]
    except (TypeError, ValueError, csv.Error) as error:
        raise _damaged(f"{path}:{rows.line_num}", str(error), "as many numbers as the head names") from None
    return [{key: _parse_number(number, f"{path}: {key}") for key, number in row.items()} for row in table]


def _read_predictions(entry: str, read_text: ReadText) -> list[Prediction]:
    path = f"{entry}/predictions.jsonl"
    # Not splitlines(): a text may hold U+2028, which JSON leaves as it is.
    lines = (read_text(path) or "").split("\n")
    rows = [_parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]
    kinds = typing.get_type_hints(Prediction)
    for number, row in enumerate(rows, 1):
        wrong = [field for field, kind in kinds.items() if not isinstance(row.get(field, ...), kind)]
        if wrong:
            found = f"{wrong[0]}: {reprlib.repr(row[wrong[0]])}" if wrong[0] in row else f"no {wrong[0]}"
            wanted = f"an object with {', '.join(kinds)}"
            raise _damaged(f"{path}:{number}", found, wanted)
    return [Prediction(**{field: row[field] for field in kinds}) for row in rows]


def _parse_json(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(place, f"no valid JSON ({error})", "a JSON object") from None
    if not isinstance(value, dict):
        raise _damaged(place, type(value).__name__, "a JSON object")
    if _is_deep(value):
        raise _damaged(place, f"more than {_MAX_DEPTH} levels", "a JSON object as its stage writes it")
    return value


def _is_deep(value: Any) -> bool:
    """Tell whether values nest more deeply than any that a stage writes, too deeply for a recursion over them."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _damaged(place: str, found: str, wanted: str) -> ValueError:
    return ValueError(
        f"outputs/{place}: found {found}, wanted {wanted}; delete the file and run `dvc repro`, which makes it anew"
    )
