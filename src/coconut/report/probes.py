"""The report's part on thoughts: what enters the slots and what then happens, what a thought says, some questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from coconut.probing.rows import Row, find_row
from coconut.report.graph import MOST_NODES, Layout, draw_graph
from coconut.report.results import UNTOUCHED, Result, find_reference
from coconut.report.svg import Chart, Point, Series, share_bar
from coconut.report.tables import Cell, Table
from coconut.report.text import NOTHING, format_interval, format_number, format_p, shorten, visible

MOST_QUESTIONS = {True: 8, False: 2}
"""Questions that are drawn of the entry that the page is about, and of every other one."""

_REPLACED = {
    "zero": "zeros",
    "mean": "the mean over the questions",
    "noise": "noise of the same length",
    "other_question": "the thoughts of another question",
    "reordered": "its own thoughts in reverse order",
}
_SWAPPED = {
    "frontier_mean": "the mean of the nodes at {hops}",
    "true_node": "the node on the way to the answer",
    "wrong_child": "another node at {hops}",
    "outside_node": "a node that cannot be reached",
}


def find_thinkers(results: Sequence[Result]) -> tuple[Result | None, Result | None]:
    """Find the entry whose thoughts the page shows first, and the control: an arm whose slots hold no thought.

    Returns:
        (entry, control), each None where there is none.
    """
    probed = [result for result in results if result.thoughts is not None and has_slots(result)]
    reference = find_reference(results)
    entry = reference if reference in probed else next((one for one in probed if one.kind.role == "main"), None)
    controls = (*(() if entry is None else entry.kind.controls), UNTOUCHED)
    others = [one for method in controls for one in probed if one.method == method]
    same = [one for one in others if entry is not None and one.latent_stage == entry.latent_stage]
    return entry, next(iter(same or others), None)


def has_slots(result: Result) -> bool:
    """Tell whether anything was replaced in its slots."""
    return result.thoughts is not None and any(row.measure == "replaced" for row in result.thoughts.rows)


def edits_table(entry: Result, control: Result | None) -> Table:
    """Build a table with one row per kind of vector that was put into the slots."""
    shown = [one for one in (entry, control) if one is not None]
    header = ["what enters the slots"]
    for one in shown:
        header += [f"{one.label}: accuracy [95 %]", "answers changed", "p"]
    rows = []
    for label, names in _edits(entry):
        cells: list[str] = [label]
        for one in shown:
            found = _find(one, **names)
            changed = _find(one, **names | {"measure": "replaced_changed"}) if names["measure"] == "replaced" else None
            share = NOTHING if changed is None or changed.value is None else f"{changed.value:.1%}"
            cells += [share_cell(found), share, NOTHING if found is None else format_p(found.p)]
        rows.append(cells)
    return Table(header, rows)


def _edits(entry: Result) -> list[tuple[str, dict[str, Any]]]:
    rows = () if entry.thoughts is None else entry.thoughts.rows
    last = max((row.thought or 0 for row in rows if row.measure == "accuracy_after"), default=0)
    edits: list[tuple[str, dict[str, Any]]] = [
        ("its own thoughts", {"measure": "accuracy_after", "thought": last}),
        ("no slots at all", {"measure": "accuracy_after", "thought": 0}),
    ]
    for condition, label in _REPLACED.items():
        edits.append((label, {"measure": "replaced", "condition": condition, "group": "all"}))
    for thought in sorted({row.thought for row in rows if row.measure == "swapped" and row.thought}):
        hops = f"{thought} hop{'s' if thought > 1 else ''}"
        for condition, label in _SWAPPED.items():
            names: dict[str, Any] = {"measure": "swapped", "condition": condition, "thought": thought}
            if find_row(rows, **names) is not None:
                edits.append((f"thought {thought}: {label.format(hops=hops)}", names))
    return [(label, names) for label, names in edits if find_row(rows, **names) is not None]


def _find(result: Result, **names: Any) -> Row | None:
    return None if result.thoughts is None else find_row(result.thoughts.rows, **names)


def share_cell(row: Row | None) -> str:
    """Write a share with its interval, and a bar beside it on the page."""
    if row is None or row.value is None:
        return NOTHING
    return Cell(format_interval(row.value, row.low, row.high), share_bar(row.value, row.low, row.high))


def contents_table(entry: Result) -> Table:
    """Build a table with one row per thought: what the output head and a linear probe read in it."""
    thoughts = entry.thoughts
    rows = [] if thoughts is None else list(thoughts.rows)
    numbers = sorted({row.thought for row in rows if row.measure == "entropy" and row.thought})
    columns = {
        "its step is the first token": {"measure": "decoded", "condition": "own_top1"},
        "of other questions": {"measure": "decoded", "condition": "own_top1_shuffled"},
        "mass on the frontier": {"measure": "mass", "group": "frontier"},
        "share of nodes there": {"measure": "share_of_nodes", "group": "frontier"},
        "attention to the edges there": {"measure": "attention", "group": "frontier"},
        "share of edges": {"measure": "share_of_edges", "group": "frontier"},
    }
    whole = {name: names for name, names in columns.items() if _find_in(rows, numbers, names)}
    header = ["thought", *whole, "linear probe: its step", "permuted labels", "entropy, nats", "length / embedding's"]
    lines = []
    for number in numbers:
        cells = [str(number), *(share_cell(_near(rows, number, names)) for names in whole.values())]
        cells += [_best_probe(rows, number, condition) for condition in ("own_step", "permuted_labels")]
        cells += [
            format_number(getattr(find_row(rows, measure, thought=number), "value", None), 2)
            for measure in ("entropy", "norm_ratio")
        ]
        lines.append(cells)
    return Table(header, lines)


def _near(rows: Sequence[Row], number: int, names: Mapping[str, Any]) -> Row | None:
    """Find a row of a thought; a group may have a note behind a comma."""
    group = names.get("group")
    wanted = {key: value for key, value in names.items() if key not in ("group", "measure")}
    for row in rows:
        is_meant = row.measure == names["measure"] and row.thought == number and row.value is not None
        is_meant = is_meant and all(getattr(row, key) == value for key, value in wanted.items())
        if is_meant and group in (None, row.group.split(",")[0]):
            return row
    return None


def _find_in(rows: Sequence[Row], numbers: Sequence[int], names: Mapping[str, Any]) -> bool:
    return any(_near(rows, number, names) is not None for number in numbers)


def _best_probe(rows: Sequence[Row], number: int, condition: str) -> str:
    values = [
        row.value
        for row in rows
        if (row.measure, row.condition, row.thought) == ("probe", condition, number) and row.value is not None
    ]
    return format_number(max(values, default=None), 3)


def numbers_chart(entry: Result, control: Result | None, colours: Mapping[str, str]) -> Chart | None:
    """Draw accuracy by the number of thoughts at test time; None where it was not measured."""
    series = []
    for result, group, dashes in ((entry, "answer", ""), (entry, "words", "5 3"), (control, "answer", "")):
        if result is None or result.thoughts is None:
            continue
        rows = [r for r in result.thoughts.rows if r.measure == "accuracy_with" and r.group == group]
        points = [
            Point(row.thought, row.value, row.low, row.high)
            for row in rows
            if row.thought is not None and row.value is not None
        ]
        label = result.label if group == "answer" else f"{result.label}, the rest in words"
        series.append(Series(label, colours[result.name], points, dashes))
    ticks = sorted({point.x for one in series for point in one.points})
    chart = Chart(
        "Accuracy by number of thoughts",
        "thoughts at test time",
        "test accuracy",
        series,
        limits=(0.0, 1.0),
        x_ticks=ticks,
    )
    return chart if chart.shown else None


def not_measured(entry: Result) -> list[str]:
    """List what could not be measured, and why."""
    rows = [] if entry.thoughts is None else entry.thoughts.rows
    lines = [f"{row.measure}: {row.group}" for row in rows if row.value is None and row.group and row.thought is None]
    notes = {
        f"{row.measure}: of the {row.group}"
        for row in rows
        if row.measure == "decoded" and row.group.startswith("first token") and row.value is not None
    }
    return [visible(line) for line in dict.fromkeys([*lines, *sorted(notes)])]


@dataclass(frozen=True)
class Column:
    """One thought of a question, as the page shows it."""

    number: int
    tokens: Sequence[tuple[str, float]]
    entropy: str
    graph: Markup | None


@dataclass(frozen=True)
class Card:
    """One question, as the page shows it."""

    index: int
    question: str
    steps: str
    gold: str
    answer: str
    text: str
    is_right: bool
    columns: Sequence[Column]
    after: Sequence[tuple[int, str, bool, str]]
    """Number of thoughts, answer, whether it is right, log probability of the gold text."""
    note: str = ""


def cards(result: Result, count: int) -> list[Card]:
    """Prepare some questions of an entry: wrong answers up to half of them, then right ones, in their order."""
    questions = [] if result.thoughts is None else list(result.thoughts.questions)
    wrong = [question for question in questions if not question["right"]][: max(1, count // 2)]
    right = [question for question in questions if question["right"]][: count - len(wrong)]
    return [_card(question) for question in sorted([*wrong, *right], key=lambda one: int(one["index"]))]


def _card(question: Mapping[str, Any]) -> Card:
    graph = question["graph"]
    layout: Layout | None = None
    note = ""
    if graph is not None and question["thoughts"]:
        edges = [(str(parent), str(child)) for parent, child in graph["edges"]]
        layout = Layout.of(edges, graph["root"], graph["candidates"])
        if len(layout.places) > MOST_NODES:
            note = f"The graph has {len(layout.places)} nodes and is not drawn."
            layout = None
    columns = [
        Column(
            number,
            [(_show_token(token), p) for token, p in thought["tokens"]],
            f"{thought['entropy']:.2f}",
            None if layout is None else draw_graph(layout, thought["nodes"] or {}, number),
        )
        for number, thought in enumerate(question["thoughts"], 1)
    ]
    after = [
        (one["num_thoughts"], visible(one["answer"] or "none"), one["right"], f"{one['log_p_gold']:.2f}")
        for one in question["after"]
    ]
    return Card(
        index=question["index"],
        question=visible(question["question"]),
        steps=visible(" → ".join(question["steps"])),
        gold=visible(question["gold"]),
        answer=visible(question["answer"] or "none"),
        text=shorten(question["text"]),
        is_right=question["right"],
        columns=columns,
        after=after,
        note=note,
    )


def _show_token(token: str) -> str:
    return visible(token.replace(" ", "␣")) or "(empty)"


def questions_table(card: Card) -> Table:
    """Lay one question out as a table, for a page without drawings."""
    header = ["thoughts", "tokens that the head reads in the last one", "answer then", "log p(gold)"]
    tokens = {
        column.number: ", ".join(f"{token} {p:.2f}" for token, p in column.tokens if p >= 0.01)
        for column in card.columns
    }
    rows = [
        [str(number), tokens.get(number, NOTHING), answer + ("" if is_right else " (wrong)"), log_p]
        for number, answer, is_right, log_p in card.after
    ]
    return Table(header, rows, num_text_columns=3)
