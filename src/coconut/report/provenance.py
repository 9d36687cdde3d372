"""Decides which results are of this run: of the present params, code and data, as `dvc.lock` records them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coconut.files import explain
from coconut.layout import OUTPUTS_DIR
from coconut.pipeline.record import damage_of, is_as_recorded, read_records
from coconut.pipeline.status import Row, stage_rows
from coconut.report.origin import describe_origin, read_parameters
from coconut.report.results import AT_ODDS
from coconut.report.tables import Table
from coconut.report.text import visible

ANOTHER_RUN = "of another run"
SHIPPED = "shipped"

_MEANINGS = {
    ANOTHER_RUN: "its stage is not up to date, so the numbers are of other params, code or data, or were changed",
    AT_ODDS: "the right answers in its predictions do not give the accuracy in its metrics.json",
    SHIPPED: "the numbers came with the repository and were not made here",
}


@dataclass(frozen=True)
class Provenance:
    """The state of every stage, seen from the results: which of them belong to this run."""

    marks: Mapping[str, str] = field(default_factory=dict)
    """For each pipeline stage that is not up to date: why its outputs are not of this run."""
    unfinished: Sequence[Row] = ()
    """The stages that are not up to date."""
    problem: str | None = None
    """The reason why nothing is known; None otherwise."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """Commit, date, machine and versions."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys and values of params.yaml."""

    def explain(self, labels: Sequence[str]) -> str:
        """Say what the marks in `labels` mean; nothing where there are none."""
        used = [mark for mark in _MEANINGS if any(label.endswith(f"({mark})") for label in labels)]
        sentences = [f"({mark}): {_MEANINGS[mark]}." for mark in used]
        if used:
            sentences.append("`dvc repro` makes them anew.")
        if self.problem is not None:
            sentences.append(f"Whether these numbers are of the present params.yaml is not known: {self.problem}.")
        return " ".join(sentences)

    def table(self) -> Table:
        """Build a table with one row for each stage that is not up to date."""
        rows = [[row.stage, row.state, row.detail] for row in self.unfinished]
        return Table(["stage", "state", "why"], rows, num_text_columns=3)


def judge(root: Path, *, ignore: Sequence[str] = ()) -> Provenance:
    """Judge every stage of the pipeline.

    Args:
        ignore: stages that do not count, as the one that asks.
    """
    try:
        # The first row of a stage is that of this work tree; experiments in others come after.
        first = {row.stage: row for row in reversed(stage_rows(root))}
    except (ValueError, OSError) as error:
        return Provenance(problem=visible(explain(error)))
    rows = [row for row in reversed(first.values()) if row.state != "done" and row.stage not in ignore]
    return Provenance({row.stage: _mark(row.stage, root) for row in rows}, rows, damage_of(root) or None)


def with_origin(provenance: Provenance, root: Path) -> Provenance:
    """Add commit, date, machine and parameters."""
    return replace(provenance, origin=describe_origin(root), params=read_parameters(root / "params.yaml"))


def _mark(stage: str, root: Path) -> str:
    """Choose the mark: numbers without their predictions came from git, others from a run in this work tree."""
    entry = "base" if stage == "evaluate_base" else stage.partition("@")[2]
    folder = root / OUTPUTS_DIR / entry
    if not stage.startswith("evaluate") or (folder / "predictions.jsonl").exists():
        return ANOTHER_RUN
    record, metrics = read_records(root).get(stage), OUTPUTS_DIR / entry / "metrics.json"
    is_shipped = record is None or is_as_recorded(root / metrics, record, metrics.as_posix())
    return SHIPPED if is_shipped else ANOTHER_RUN
