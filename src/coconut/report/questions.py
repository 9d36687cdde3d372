"""The questions of the test set: one as the example of the task, and all to search through."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.config.schema import Params
from coconut.data.examples import Example, read_examples
from coconut.report.render import Questions, Section
from coconut.report.results import Result, find_reference
from coconut.report.tables import Table
from coconut.report.text import NOTHING, visible

_MOST_QUESTIONS = 2_000
_MOST_CHARACTERS = 2_000
"""Of a text. Together they keep a page of eight entries below some megabytes."""


def read_questions(examples_dir: Path) -> list[Example]:
    """Read the first test set; nothing where it is not there, or not as `preprocess` writes it."""
    try:
        return read_examples(examples_dir / "test.jsonl")[:_MOST_QUESTIONS]
    except (OSError, ValueError):
        return []


def browse_questions(results: Sequence[Result], questions: Sequence[Example]) -> Section | None:
    """Put every question beside the answers of all entries; None where nothing fits together.

    A question counts as that of an answer where both name the same gold answer.
    """
    answered = [one for one in results if one.predictions]
    by_index = [{prediction.index: prediction for prediction in one.predictions} for one in answered]
    reference = find_reference(results)
    probed = () if reference is None or reference.thoughts is None else reference.thoughts.questions
    thoughts = {one["index"]: _read_thoughts(one) for one in probed}
    rows = []
    for index, question in enumerate(questions):
        found = [answers.get(index) for answers in by_index]
        if any(found) and all(one is None or one.gold == question.answer for one in found):
            rows.append(
                {
                    "index": index,
                    "question": _shown(question.question),
                    "steps": _shown(" → ".join(question.steps)),
                    "gold": _shown(question.answer),
                    "thoughts": thoughts.get(index, ""),
                    "answers": [one and (_shown(one.answer or NOTHING), one.right) for one in found],
                }
            )
    if not rows:
        return None
    total = max(len(one.predictions) for one in answered)
    text = (
        f"The first {len(rows)} of {total} questions; the others stand in predictions.jsonl."
        if len(rows) < total
        else f"All {total} questions of the test set, with the answer of every entry."
    )
    links = [f"../{one.name}/predictions.jsonl" for one in answered]
    return Section("Questions", text, questions=Questions([one.label for one in answered], rows), links=links)


def show_task(params: Params, browser: Section) -> Section:
    """Show what is asked, by the first question of the test set."""
    assert browser.questions is not None
    first = browser.questions.rows[0]
    source = params.data.splits["test"]
    generator = params.data.generator_of(source) if source.format == "generated" else None
    kind = source.hub or source.file or source.format if generator is None else f"generated, {generator.task}"
    parts = {"question": first["question"], "steps": first["steps"] or NOTHING, "right answer": first["gold"]}
    table = Table(["", ""], list(map(list, parts.items())), 2, is_sortable=False)
    return Section("The task", f"Data: {visible(kind)}. The first question of the test set:", table)


def _read_thoughts(question: Mapping[str, Any]) -> str:
    """Return the two most probable tokens of each thought."""
    tokens = [[token for token, _ in thought["tokens"][:2]] for thought in question["thoughts"]]
    return visible(" | ".join(" or ".join(one) for one in tokens))


def _shown(text: str) -> str:
    return "\n".join(map(visible, text[:_MOST_CHARACTERS].split("\n")))
