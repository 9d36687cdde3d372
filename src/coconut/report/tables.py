"""The report's tables: accuracies of all entries, speed of training, facts about the data."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coconut.evaluation.statistics import mcnemar
from coconut.report.results import Result, find_last

NOT_THERE = "not there"
"""Stands where a file is missing, as after a failed pipeline stage."""
NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first `num_text_columns` are aligned to the left."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text_columns: int = 1

    def to_text(self) -> str:
        """Columns in a terminal.

        >>> print(Table(["entry", "n"], [["cot", "10"]]).to_text())
        entry   n
        cot    10
        """
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(self._aligned(line, widths)).rstrip() for line in lines)

    def to_markdown(self) -> str:
        r"""A pipe table, its source aligned too.

        >>> print(Table(["entry", "n"], [["a|b", "10"]]).to_markdown())
        | entry |  n |
        |:------|---:|
        | a\|b  | 10 |
        """
        lines = [[_escape_markdown(cell) for cell in line] for line in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rules = [
            ":" + "-" * (width + 1) if column < self.num_text_columns else "-" * (width + 1) + ":"
            for column, width in enumerate(widths)
        ]
        head, *body = [f"| {' | '.join(self._aligned(line, widths))} |" for line in lines]
        return "\n".join([head, f"|{'|'.join(rules)}|", *body])

    def to_html(self) -> str:
        r"""A table element, every cell escaped.

        >>> Table(["entry"], [["<b>"]]).to_html()
        '<table>\n<tr><th class="text">entry</th></tr>\n<tr><td class="text">&lt;b&gt;</td></tr>\n</table>'
        """
        lines = [self._html_line(self.header, "th"), *(self._html_line(row, "td") for row in self.rows)]
        return "\n".join(["<table>", *lines, "</table>"])

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.ljust(width) if column < self.num_text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]

    def _html_line(self, line: Sequence[str], tag: str) -> str:
        opened = [
            f'<{tag} class="text">' if column < self.num_text_columns else f"<{tag}>" for column in range(len(line))
        ]
        cells = (f"{start}{html.escape(cell)}</{tag}>" for start, cell in zip(opened, line, strict=True))
        return f"<tr>{''.join(cells)}</tr>"


def accuracy_table(results: Sequence[Result]) -> Table:
    """One row an entry: what it scores, what that costs, and the paired test against `coconut`."""
    reference = find_last(results, "coconut")
    header = ["entry", "method", "latent stage", "accuracy [95 %]", "generated tokens", "thoughts"]
    header += ["s/example", "train s", "updates"]
    if reference is not None:
        header.append(f"p against {reference.name}")
    rows = []
    for result in results:
        row = [result.name, result.method, str(result.latent_stage), format_accuracy(result)]
        row += [format_number(result.metric(name), 1) for name in ("generated_tokens", "thoughts")]
        row += [format_significant(result.metric("seconds_per_example"))]
        row += [format_number(result.metric(name), 0) for name in ("train_seconds", "train_updates")]
        if reference is not None:
            row.append("reference" if result is reference else format_p(paired_p(result, reference)))
        rows.append(row)
    return Table(header, rows, num_text_columns=2)


def paired_p(result: Result, other: Result) -> float | None:
    """McNemar's p over the examples that both were given; None where the test sets are not the same."""
    gold = {prediction.index: prediction.gold for prediction in other.predictions}
    right = {prediction.index: prediction.right for prediction in other.predictions}
    if not gold or {prediction.index: prediction.gold for prediction in result.predictions} != gold:
        return None
    return mcnemar(
        [prediction.right for prediction in result.predictions],
        [right[prediction.index] for prediction in result.predictions],
    )


def speed_table(results: Sequence[Result]) -> Table:
    """One row an entry with a history: what an update costs, and what it holds."""
    header = [
        "entry",
        "latents",
        "tokens/update",
        "padding share",
        "tokens/s",
        "ms/update",
        "in first epoch",
        "in last epoch",
    ]
    rows = []
    for result in results:
        if not result.history:
            continue
        speed = epoch_means(result)
        per_epoch = [row.get("ms_per_update") for row in (result.history[0], result.history[-1])]
        row = [result.name, format_number(speed["num_latents"], 1), format_number(speed["tokens_per_update"], 0)]
        row += [format_number(speed["padding_share"], 3), format_number(speed["tokens_per_s"], 0)]
        row += [format_significant(ms) for ms in (speed["ms_per_update"], *per_epoch)]
        rows.append(row)
    return Table(header, rows)


def epoch_means(result: Result) -> dict[str, float | None]:
    """Means over an entry's epochs of what decides the speed."""
    means = {
        column: _mean([row.get(column) for row in result.history])
        for column in ("num_latents", "padding_share", "tokens_per_s", "ms_per_update")
    }
    rate, ms = means["tokens_per_s"], means["ms_per_update"]
    # Not from the column `tokens`: so defined, the two factors of `explain_speed` multiply exactly.
    means["tokens_per_update"] = None if rate is None or ms is None else rate * ms / 1000
    return means


def explain_speed(results: Sequence[Result]) -> str:
    """Say how much longer the slowest entry's updates take than the fastest one's, and from what."""
    speeds = {result.name: epoch_means(result) for result in results if result.history}
    timed = {name: speed for name, speed in speeds.items() if speed["ms_per_update"] and speed["tokens_per_s"]}
    if len(timed) < 2:
        return ""
    fast = min(timed, key=lambda name: timed[name]["ms_per_update"] or 0)
    slow = max(timed, key=lambda name: timed[name]["ms_per_update"] or 0)

    def ratio(column: str) -> float:
        return (timed[slow][column] or math.nan) / (timed[fast][column] or math.nan)

    def pair(column: str, digits: int) -> str:
        found = (format_number(timed[name][column], digits) for name in (slow, fast))
        return " against ".join(found)

    return (
        f"An update of {slow} takes {ratio('ms_per_update'):.2f} times as long as one of {fast}:"
        f" it holds {ratio('tokens_per_update'):.2f} times the tokens, and a token takes"
        f" {1 / ratio('tokens_per_s'):.2f} times as long"
        f" (latents {pair('num_latents', 1)}, padding share {pair('padding_share', 3)})."
    )


def facts_table(facts: Mapping[str, Any]) -> Table:
    """A nested mapping as lines of dotted key and value."""
    return Table(["fact", "value"], [[key, _format_fact(value)] for key, value in flatten(facts).items()])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots.

    >>> flatten({"train": {"rows": 5, "dropped": {"empty": 1}}, "seed": 0})
    {'train.rows': 5, 'train.dropped.empty': 1, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def format_accuracy(result: Result) -> str:
    """`0.981 [0.970, 0.988]`, or that it is not there."""
    accuracy, low, high = (result.metric(name) for name in ("accuracy", "accuracy_low", "accuracy_high"))
    if accuracy is None:
        return NOT_THERE
    return f"{accuracy:.3f}" if low is None or high is None else f"{accuracy:.3f} [{low:.3f}, {high:.3f}]"


def format_number(value: float | None, digits: int) -> str:
    """A number with a fixed count of decimals."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def format_significant(value: float | None) -> str:
    """A number with three significant digits, never in exponent form.

    >>> [format_significant(value) for value in (0.0020371, 12.345, 12345.6, 0.0)]
    ['0.00204', '12.3', '12346', '0']
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def format_p(p: float | None) -> str:
    """A probability as papers print it.

    >>> [format_p(p) for p in (None, 1.0, 0.0421, 0.00004)]
    ['-', '1.000', '0.042', '<0.001']
    """
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _format_fact(value: Any) -> str:
    if isinstance(value, float):
        return format_significant(value)
    if value is None:
        return NOTHING
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value == {} else str(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _escape_markdown(cell: str) -> str:
    cell = re.sub(r"[\\|*`]", r"\\\g<0>", cell).replace("](", "]\\(")
    # `<0.001` is no tag, and reads better as it is.
    return " ".join(re.sub("<(?=[A-Za-z/!?])", "&lt;", cell).split())
