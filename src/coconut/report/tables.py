"""The report's tables: accuracies of all entries, and facts about the data."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from coconut.config.schema import BASE
from coconut.evaluation.statistics import format_ratio, mcnemar, wilson_interval
from coconut.report.results import Result, find_ends, find_reference, find_sets, find_sizes
from coconut.report.svg import share_bar
from coconut.report.text import (
    NOT_THERE,
    NOTHING,
    format_interval,
    format_number,
    format_p,
    format_share,
    format_significant,
    visible,
)


class Cell(str):
    """Text with a drawing beside it on a page."""

    drawing: Markup

    def __new__(cls, text: str, drawing: Markup) -> "Cell":
        """Put a drawing beside a text."""
        cell = super().__new__(cls, text)
        cell.drawing = drawing
        return cell


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first `num_text_columns` are aligned to the left."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text_columns: int = 1
    is_sortable: bool = True
    """Whether a page lets its readers sort the rows."""

    def to_text(self) -> str:
        """Lay the table out for a terminal.

        >>> print(Table(["entry", "n"], [["cot", "10"]]).to_text())
        entry   n
        cot    10
        """
        lines = self._visible_lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(self._aligned(line, widths)).rstrip() for line in lines)

    def to_markdown(self) -> str:
        r"""Write a pipe table, its source aligned too.

        >>> print(Table(["entry", "n"], [["a|b", "10"]]).to_markdown())
        | entry |  n |
        |:------|---:|
        | a\|b  | 10 |
        """
        lines = [[_escape_markdown(cell) for cell in line] for line in self._visible_lines()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rules = [
            ":" + "-" * (width + 1) if column < self.num_text_columns else "-" * (width + 1) + ":"
            for column, width in enumerate(widths)
        ]
        head, *body = [f"| {' | '.join(self._aligned(line, widths))} |" for line in lines]
        return "\n".join([head, f"|{'|'.join(rules)}|", *body])

    def to_html(self) -> Markup:
        r"""Write a table element, every cell escaped.

        >>> print(Table(["entry"], [["<b>"]]).to_html())
        <table>
        <thead><tr><th scope="col" class="text">entry</th></tr></thead>
        <tbody>
        <tr><td class="text">&lt;b&gt;</td></tr>
        </tbody>
        </table>
        """
        head, *body = [
            Markup("<tr>{}</tr>").format(Markup("").join(self._html_cells(line, tag)))
            for line, tag in ((self.header, "th"), *((row, "td") for row in self.rows))
        ]
        kind = Markup(' class="sortable"') if self.is_sortable and len(self.rows) > 1 else ""
        return Markup("<table{}>\n<thead>{}</thead>\n<tbody>\n{}\n</tbody>\n</table>").format(
            kind, head, Markup("\n").join(body)
        )

    def _visible_lines(self) -> list[list[str]]:
        return [[visible(cell) for cell in line] for line in (self.header, *self.rows)]

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.ljust(width) if column < self.num_text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]

    def _html_cells(self, line: Sequence[str], tag: str) -> Iterator[Markup]:
        for column, cell in enumerate(line):
            # On a narrow screen a row is a block, in which every cell says what it is.
            scope = Markup(' scope="col"') if tag == "th" else ""
            if tag == "td" and column and self.header[column]:
                scope = Markup(' data-label="{}"').format(visible(self.header[column]))
            kind = Markup(' class="text"') if column < self.num_text_columns else ""
            drawing = cell.drawing if isinstance(cell, Cell) else ""
            yield Markup("<{}{}{}>{}{}</{}>").format(tag, scope, kind, visible(cell), drawing, tag)


def accuracy_table(results: Sequence[Result]) -> Table:
    """Build a table with one row per entry: its accuracy, its cost, and the paired test against `coconut`."""
    reference = find_reference(results)
    header = ["entry", "method", "latent stage", "accuracy [95 %]", "no answer", "generated tokens", "thoughts"]
    header += ["s/example", "train s", "updates"]
    if reference is not None:
        header.append(f"p against {reference.name}")
    rows = []
    for result in results:
        row = [result.label, result.method, str(result.latent_stage), format_accuracy(result)]
        row += [format_share(result.metric("no_answer_share"))]
        row += [format_number(result.metric(name), 1) for name in ("generated_tokens", "thoughts")]
        row += [format_significant(result.metric("seconds_per_example"))]
        row += [format_number(result.metric(name), 0) for name in ("train_seconds", "train_updates")]
        if reference is not None:
            row.append("reference" if result is reference else format_p(paired_p(result, reference)))
        rows.append(row)
    return Table(header, rows, num_text_columns=2)


def methods_table(results: Sequence[Result]) -> Table | None:
    """Build a table of the ends of all main methods, each tested against each other; None where there is one."""
    ends = find_ends(results, "main")
    if len(ends) < 2:
        return None
    rows = []
    for end in ends:
        tests = [NOTHING if other is end else format_p(paired_p(end, other)) for other in ends]
        rows.append([end.label, end.method, format_accuracy(end), *tests])
    header = ["entry", "method", "accuracy [95 %]", *(f"p against {end.name}" for end in ends)]
    return Table(header, rows, num_text_columns=2)


def sets_table(results: Sequence[Result], sets: Sequence[str]) -> Table:
    """Build a table of accuracies, one column for each test set but the first, with paired tests against `coconut`."""
    reference = find_reference(results)
    rows = []
    for result in results:
        row = [result.label]
        for name in sets:
            one = result.of_set(name)
            p = None if reference is None or reference is result else paired_p(one, reference.of_set(name))
            row.append(format_accuracy(one) + (f", p {format_p(p)}" if p is not None else ""))
        rows.append(row)
    return Table(["entry", *(f"{name} [95 %]" for name in sets)], rows)


def groups_table(results: Sequence[Result]) -> Table | None:
    """Build a table of accuracies by the kind of the questions of the first set; None where it names no kinds."""
    scored = [result for result in results if result.predictions]
    counts = Counter(prediction.group for result in scored[:1] for prediction in result.predictions)
    if set(counts) <= {""}:
        return None
    rows = []
    for result in scored:
        row = [result.label]
        for group in counts:
            right = [prediction.right for prediction in result.predictions if prediction.group == group]
            low, high = wilson_interval(sum(right), len(right))
            row.append(format_interval(sum(right) / len(right), low, high) if right else NOT_THERE)
        rows.append(row)
    return Table(["entry", *(f"{group or 'no kind'} ({number})" for group, number in counts.items())], rows)


def samples_table(results: Sequence[Result]) -> Table | None:
    """Build a table of what samples give: one of k is right, and the majority; None where no entry was sampled."""
    sampled = [result for result in results if result.metric("num_samples")]
    sizes = sorted({size for result in sampled for size in find_sizes(result)})
    if not sampled:
        return None
    rows = [
        [
            result.label,
            f"{result.metric('num_samples'):.0f}",
            *(format_accuracy(result, f"pass_at_{size}") for size in sizes),
            format_accuracy(result, "majority"),
        ]
        for result in sampled
    ]
    return Table(["entry", "samples", *(f"pass@{size} [95 %]" for size in sizes), "majority [95 %]"], rows)


def expected_table(results: Sequence[Result]) -> Table | None:
    """Compare the untouched model's accuracies with those that others report for it; None where none was given."""
    base = next((result for result in results if result.name == BASE), None)
    if base is None or base.metrics is None:
        return None
    sets = {"test": base} | {name: base.of_set(name) for name in find_sets([base])}
    rows = []
    for name, one in sets.items():
        expected, low, high = (one.metric(key) for key in ("expected", "accuracy_low", "accuracy_high"))
        if expected is not None and low is not None and high is not None:
            verdict = "inside" if low <= expected <= high else "outside"
            rows.append([name, format_ratio(expected), format_accuracy(one), verdict])
    return Table(["test set", "expected", "found [95 %]", "expected is"], rows) if rows else None


_INDENT = 3 * "\N{NO-BREAK SPACE}"


def tree_table(results: Sequence[Result], colours: Mapping[str, str]) -> Table:
    """Build a table in which every entry stands below its parent, with its accuracy as a bar."""
    rows = []
    for depth, result in _in_tree(results):
        low, high, value = (result.metric(name) for name in ("accuracy_low", "accuracy_high", "accuracy"))
        name = f"{_INDENT * (depth - 1)}└ {result.label}" if depth else result.label
        text = format_accuracy(result)
        bar = share_bar(value, low, high, colour=colours[result.name])
        rows.append([name, result.method, Cell(text, bar)])
    return Table(["entry, below its parent", "method", "test accuracy [95 %]"], rows, 2, is_sortable=False)


def _in_tree(results: Sequence[Result]) -> Iterator[tuple[int, Result]]:
    """Walk through the entries, every one after its parent, with its depth."""
    names = {result.name for result in results}
    roots = [result for result in results if result.parent is None or result.parent not in names]

    def below(result: Result, depth: int) -> Iterator[tuple[int, Result]]:
        yield depth, result
        for child in results:
            if child.parent == result.name:
                yield from below(child, depth + 1)

    for root in roots:
        yield from below(root, 0)


def pair_examples(result: Result, other: Result) -> list[tuple[bool, bool]] | None:
    """Pair by example whether each of two entries was right; None where their test sets are not the same."""
    gold = {prediction.index: prediction.gold for prediction in other.predictions}
    right = {prediction.index: prediction.right for prediction in other.predictions}
    if not gold or {prediction.index: prediction.gold for prediction in result.predictions} != gold:
        return None
    return [(prediction.right, right[prediction.index]) for prediction in result.predictions]


def paired_p(result: Result, other: Result) -> float | None:
    """Compute McNemar's p over the examples that both were given; None where the test sets differ."""
    pairs = pair_examples(result, other)
    return None if pairs is None else mcnemar(*map(list, zip(*pairs, strict=True)))


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Build a table with one row per fact, as `read_facts` gives them."""
    return Table(["fact", "value"], [[key, _format_fact(value)] for key, value in facts.items()])


def format_accuracy(result: Result, key: str = "accuracy") -> str:
    """Write `0.981 [0.970, 0.988]`, or that it is not there."""
    accuracy, low, high = (result.metric(name) for name in (key, f"{key}_low", f"{key}_high"))
    return NOT_THERE if accuracy is None else format_interval(accuracy, low, high)


def _format_fact(value: Any) -> str:
    if isinstance(value, float):
        return format_significant(value)
    if value is None:
        return NOTHING
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value == {} else str(value)


def _escape_markdown(cell: str) -> str:
    cell = re.sub(r"[\\|*`]", r"\\\g<0>", cell).replace("](", "]\\(")
    # `<0.001` is no tag, and reads better as it is.
    cell = re.sub("<(?=[A-Za-z/!?])", "&lt;", cell)
    # No-break spaces stay: they set an entry in below its parent.
    return re.sub(r"[^\S\N{NO-BREAK SPACE}]+", " ", cell).strip(" ")
