"""Reads the outputs of the pipeline: one `Result` for each entry of the curriculum."""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from coconut.config.methods import find_method
from coconut.config.schema import BASE, Entry
from coconut.methods import Method, Role
from coconut.report.reading import ReadText, damaged, parse_json, parse_number, read_lines, read_table
from coconut.report.thoughts import Thoughts, read_thoughts
from coconut.tracking import flatten

EVALUATE_BASE = "evaluate_base"
"""The pipeline stage that scores the untouched model."""
AT_ODDS = "answers at odds"
"""The mark of a result whose answers do not give its accuracy."""
UNTOUCHED = "untouched"
"""In place of the untouched model's method."""


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one test example."""

    index: int
    num_steps: int
    gold: str
    answer: str | None
    right: bool
    text: str
    group: str = ""


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
    further: Mapping[str, Sequence[Prediction]] = field(default_factory=dict)
    """Answers to the questions of every test set but the first, by its name."""
    updates: Sequence[Mapping[str, float | None]] = ()
    """One mapping for each point of `updates.csv`."""
    thoughts: Thoughts | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What `train.json` says."""
    mark: str | None = None
    """The reason why its metrics and predictions are not of this run (see `provenance`); None when they are."""
    training_mark: str | None = None
    """The same for its history."""
    is_chosen: bool = False
    """Whether `report.reference` names it."""

    @property
    def kind(self) -> type[Method]:
        """Return its method's class; a plain one, a control without controls, where the method is not here."""
        return _find_kind(self.method)

    @property
    def label(self) -> str:
        """Return its name in tables and figures, with its mark."""
        return _label(self.name, self.mark if self.metrics is not None else None)

    @property
    def training_label(self) -> str:
        """Return its name where its history is shown."""
        return _label(self.name, self.training_mark)

    def of_set(self, name: str) -> "Result":
        """Return what is known of the entry's answers to a further test set, as if it were the first."""
        start = f"{name}."
        own = {key.removeprefix(start): v for key, v in (self.metrics or {}).items() if key.startswith(start)}
        return replace(self, metrics=own or None, predictions=self.further.get(name, ()))

    def metric(self, name: str) -> float | None:
        """Return one number of `metrics.json` or `costs.json`, None where it is missing or null."""
        return None if self.metrics is None else self.metrics.get(name)


@cache
def _find_kind(method: str) -> type[Method]:
    try:
        return find_method(method)
    except ValueError:
        return Method


def _label(name: str, mark: str | None) -> str:
    return name if mark is None else f"{name} ({mark})"


def read_results(
    curriculum: Mapping[str, Entry],
    read_text: ReadText,
    *,
    marks: Mapping[str, str] | None = None,
    reference: str | None = None,
) -> list[Result]:
    """Read what every entry left, in the curriculum's order; the untouched model first if it was scored.

    Args:
        marks: by pipeline stage, why its outputs are not of this run; see `provenance.judge`.
        reference: the entry that the others are compared with; see `find_reference`.

    Raises:
        ValueError: a file is there but damaged.
    """
    marks = marks or {}
    results = [
        replace(_read_result(entry, read_text, marks), is_chosen=entry.name == reference)
        for entry in curriculum.values()
    ]
    base_metrics = _read_metrics(BASE, read_text)
    if base_metrics is not None:
        first, further = _read_predictions(BASE, base_metrics, read_text)
        base = Result(
            name=BASE,
            parent=None,
            method=UNTOUCHED,
            latent_stage=0,
            max_latent_stage=0,
            metrics=base_metrics,
            history=[],
            predictions=first,
            further=further,
            thoughts=None if "probe_base" in marks else read_thoughts(BASE, read_text),
            mark=marks.get(EVALUATE_BASE) or _contradiction(base_metrics, first, further),
        )
        results.insert(0, base)
    return results


def read_facts(read_text: ReadText) -> dict[str, Any] | None:
    """Read what `preprocess` counted, as dotted keys; None where it left nothing.

    Raises:
        ValueError: the file is damaged.
    """
    return flatten(_read_object("preprocess.json", read_text)) or None


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


def count_updates(results: Sequence[Result], result: Result) -> float:
    """Count the updates from the untouched model to the end of an entry."""
    return count_updates_before(results, result) + _num_updates(result)


def _num_updates(result: Result) -> float:
    return max((row.get("update") or 0 for row in result.history), default=0)


def find_reference(results: Sequence[Result]) -> Result | None:
    """Find the entry that the others are compared with: the chosen one, or else the last one of a main method."""
    return next((one for one in results if one.is_chosen), None) or find_last(results, "main")


def find_last(results: Sequence[Result], role: Role) -> Result | None:
    """Find the entry of a role at the end of the longest chain of one method.

    Of several such entries the first is taken, so that a variant listed later does not replace it. Entries without
    predictions count only where no other is left.
    """
    ends = find_ends(results, role)
    evaluated = [one for one in ends if one.predictions] or ends
    return max(evaluated, key=lambda one: _depth(results, one), default=None)


def find_ends(results: Sequence[Result], role: Role) -> list[Result]:
    """Find for each method of a role the entry at the end of its longest chain, evaluated ones first."""
    methods = dict.fromkeys(one.method for one in results if one.kind.role == role)
    evaluated = [one for one in results if one.predictions]
    ends = (find_end(results, name, among=evaluated) or find_end(results, name, among=results) for name in methods)
    return [end for end in ends if end is not None]


def find_end(results: Sequence[Result], method: str, *, among: Sequence[Result]) -> Result | None:
    """Find the entry among these that trained `method` through most entries of its lineage in `results`."""
    chosen = [result for result in among if result.method == method]
    return max(chosen, key=lambda one: _depth(results, one), default=None)


def _depth(results: Sequence[Result], result: Result) -> int:
    """Count the entries of a result's own method in its lineage, itself included."""
    return sum(ancestor.method == result.method for ancestor in find_lineage(results, result.name))


def _read_result(entry: Entry, read_text: ReadText, marks: Mapping[str, str]) -> Result:
    metrics = _read_metrics(entry.name, read_text)
    first, further = _read_predictions(entry.name, metrics, read_text)
    return Result(
        name=entry.name,
        parent=entry.parent,
        method=entry.method,
        latent_stage=entry.latent_stage,
        max_latent_stage=entry.latent.max_latent_stage,
        metrics=metrics,
        history=[
            {key: number for key, number in row.items() if key != "entry"}
            for row in read_table(f"{entry.name}/history.csv", read_text, texts=("entry",))
        ],
        updates=read_table(f"{entry.name}/updates.csv", read_text),
        predictions=first,
        further=further,
        # Pages have no place for a mark beside thoughts, so that those of another run are left out.
        thoughts=None if f"probe@{entry.name}" in marks else read_thoughts(entry.name, read_text),
        facts=_read_object(f"{entry.name}/train.json", read_text),
        mark=marks.get(evaluate_stage(entry.name)) or _contradiction(metrics, first, further),
        training_mark=marks.get(f"train@{entry.name}"),
    )


def _contradiction(
    metrics: Mapping[str, float | None] | None,
    first: Sequence[Prediction],
    further: Mapping[str, Sequence[Prediction]],
) -> str | None:
    """Return the mark of metrics which say another accuracy than the answers; None where both agree, or one lacks."""
    for key, answers in {"accuracy": first, **{name + _ACCURACY: one for name, one in further.items()}}.items():
        accuracy = (metrics or {}).get(key)
        if answers and accuracy is not None and round(accuracy * len(answers), 6) != sum(one.right for one in answers):
            return AT_ODDS
    return None


def evaluate_stage(entry: str) -> str:
    """Name the pipeline stage that scores an entry."""
    return EVALUATE_BASE if entry == BASE else f"evaluate@{entry}"


def _read_metrics(entry: str, read_text: ReadText) -> dict[str, float | None] | None:
    path = f"{entry}/metrics.json"
    text = read_text(path)
    if text is None:
        return None
    costs = _read_object(f"{entry}/costs.json", read_text)
    metrics = {key: parse_number(value, f"{path}: {key}") for key, value in (costs | parse_json(text, path)).items()}
    low, accuracy, high = (metrics.get(key) for key in ("accuracy_low", "accuracy", "accuracy_high"))
    bounds = [0.0, *(value for value in (low, accuracy, high) if value is not None), 1.0]
    if sorted(bounds) != bounds:
        raise damaged(path, f"accuracy {accuracy} in [{low}, {high}]", "a share inside its interval")
    return metrics


def _read_object(path: str, read_text: ReadText) -> dict[str, Any]:
    text = read_text(path)
    return {} if text is None else parse_json(text, path)


def find_sets(results: Sequence[Result]) -> list[str]:
    """Name the test sets other than the first that any entry was scored on, in the order of its metrics."""
    keys = [key for result in results for key in result.metrics or {}]
    return list(dict.fromkeys(name for name, dot, metric in (key.partition(".") for key in keys) if dot and metric))


def find_sizes(result: Result) -> list[int]:
    """List the k for which an entry has a pass@k."""
    keys = [key.removeprefix("pass_at_") for key in result.metrics or {} if key.startswith("pass_at_")]
    return sorted(int(key) for key in keys if key.isdigit())


def _read_predictions(
    entry: str, metrics: Mapping[str, float | None] | None, read_text: ReadText
) -> tuple[list[Prediction], dict[str, list[Prediction]]]:
    """Read the answers to the first test set, and those to every other one by its name."""
    names = [key.removesuffix(_ACCURACY) for key in metrics or {} if key.endswith(_ACCURACY)]

    def read(file: str) -> list[Prediction]:
        rows = read_lines(f"{entry}/{file}", read_text, typing.get_type_hints(Prediction), optional=["group"])
        return [Prediction(**row) for row in rows]

    return read("predictions.jsonl"), {name: read(f"predictions/{name}.jsonl") for name in names}


_ACCURACY = ".accuracy"
