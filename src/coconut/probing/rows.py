"""The rows of `thoughts.csv`: one measured number each, with its interval and the questions it rests on."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from statistics import fmean, stdev
from typing import Any

from coconut.evaluation.statistics import mcnemar, wilson_interval

_Z = 1.959964


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement. Empty cells stand for what does not apply."""

    measure: str
    condition: str = ""
    """Which variant or control."""
    thought: int | None = None
    """Counted from 1; None for all together. For numbers of thoughts: how many."""
    layer: int | None = None
    """Of the hidden states, 0 for the embedding."""
    group: str = ""
    """A part of the measure, or, where `value` is empty, why it could not be taken."""
    value: float | None = None
    low: float | None = None
    """95 % interval over the questions."""
    high: float | None = None
    p: float | None = None
    """Of the exact paired test against the untouched run."""
    num: int = 0
    """Questions."""


def share_row(rights: Sequence[bool], against: Sequence[bool] | None = None, **names: Any) -> Row:
    """Return a share of questions with Wilson's interval, and McNemar's test against another run of the same ones."""
    num_right, num = sum(rights), len(rights)
    low, high = wilson_interval(num_right, num)
    p = None if against is None else mcnemar(list(rights), list(against))
    value = num_right / num if num else None
    return Row(value=value, low=low, high=high, p=p, num=num, **names)


def mean_row(values: Sequence[float], **names: Any) -> Row:
    """Return a mean over questions with its normal 95 % interval."""
    if not values:
        return Row(**names)
    mean = fmean(values)
    half = _Z * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Row(value=mean, low=mean - half, high=mean + half, num=len(values), **names)


def missing(measure: str, reason: str) -> Row:
    """Return a row that says why a measure could not be taken."""
    return Row(measure=measure, group=reason)


def find_row(rows: Iterable[Row], measure: str, **names: Any) -> Row | None:
    """Return the first row of a measure with these cells, if there is one with a value."""
    for row in rows:
        is_meant = row.measure == measure and all(getattr(row, name) == value for name, value in names.items())
        if is_meant and row.value is not None:
            return row
    return None


def value_of(rows: Iterable[Row], measure: str, **names: Any) -> float | None:
    """Return the value of the row that `find_row` finds."""
    row = find_row(rows, measure, **names)
    return None if row is None else row.value


def write_rows(rows: Iterable[Row]) -> str:
    """Write rows as CSV, numbers with six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    for row in rows:
        writer.writerow(
            "" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else cell for cell in astuple(row)
        )
    return text.getvalue()
