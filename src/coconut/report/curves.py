"""Writes the curves of all entries as one CSV, which `dvc plots show|diff` and editors draw (`plots:` in dvc.yaml)."""

import csv
import io
from collections.abc import Sequence

from coconut.report.results import Result, count_updates_before

CURVES_FILE = "curves.csv"
_COLUMNS = ("train_loss", "valid_loss", "valid_accuracy")


def write_curves(results: Sequence[Result]) -> str:
    """Write one row per entry and epoch; `updates` counts from the untouched model on.

    A number that is missing or not finite leaves its cell empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["entry", "epoch", "updates", *_COLUMNS])
    for result in results:
        before = count_updates_before(results, result)
        for row in result.history:
            updates = before + (row.get("update") or 0)
            numbers = [row.get("epoch"), updates, *(row.get(column) for column in _COLUMNS)]
            writer.writerow([result.name, *("" if number is None else f"{number:.10g}" for number in numbers)])
    return text.getvalue()
