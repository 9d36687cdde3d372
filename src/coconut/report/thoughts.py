"""What the probes of an entry left: measurements, and some questions in full."""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from coconut.probing.rows import Row
from coconut.report.reading import ReadText, check_fields, read_lines, read_table


class Thought(TypedDict):
    """A thought read by the output head."""

    tokens: list[tuple[str, float]]
    """The most probable tokens with their probabilities."""
    entropy: float
    norm: float
    nodes: dict[str, float] | None
    """Of a graph: the probability of every node among the nodes."""


class After(TypedDict):
    """The answer after some thoughts."""

    num_thoughts: int
    answer: str | None
    right: bool
    log_p_gold: float


class Graph(TypedDict):
    """The graph of a question."""

    edges: list[tuple[str, str]]
    root: str
    candidates: list[str]


class Question(TypedDict):
    """A test question, as `probing.shown` writes it."""

    index: int
    question: str
    steps: list[str]
    gold: str
    answer: str | None
    right: bool
    text: str
    thoughts: list[dict[str, Any]]
    after: list[dict[str, Any]]
    graph: dict[str, Any] | None


@dataclass(frozen=True)
class Thoughts:
    """The probes of one entry."""

    rows: Sequence[Row]
    questions: Sequence[Mapping[str, Any]]
    """Of the form of `Question`, every part checked."""


def read_thoughts(entry: str, read_text: ReadText) -> Thoughts | None:
    """Read the probes of an entry; None where there are none.

    Raises:
        ValueError: a file is damaged.
    """
    path = f"{entry}/thoughts.jsonl"
    questions = read_lines(path, read_text, typing.get_type_hints(Question))
    for number, question in enumerate(questions, 1):
        for part, kind in (("thoughts", Thought), ("after", After)):
            for one in question[part]:
                check_fields(one, typing.get_type_hints(kind), f"{path}:{number}: {part}")
        if question["graph"] is not None:
            check_fields(question["graph"], typing.get_type_hints(Graph), f"{path}:{number}: graph")
    table = read_table(f"{entry}/thoughts.csv", read_text, texts=("measure", "condition", "group"))
    rows = [_row(cells) for cells in table]
    return Thoughts(rows, questions) if rows or questions else None


def _row(cells: Mapping[str, Any]) -> Row:
    def whole(name: str) -> int | None:
        value = cells.get(name)
        return None if value is None else int(value)

    return Row(
        measure=cells.get("measure") or "",
        condition=cells.get("condition") or "",
        thought=whole("thought"),
        layer=whole("layer"),
        group=cells.get("group") or "",
        num=whole("num") or 0,
        **{name: cells.get(name) for name in ("value", "low", "high", "p")},
    )
