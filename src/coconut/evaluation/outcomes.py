"""What a model made of one question: the answer in its text, compared with the gold one."""

import dataclasses
import json
from dataclasses import dataclass

from coconut.checkpoints.meta import AnswerRule
from coconut.data.examples import ANSWER_MARK, Example
from coconut.data.layouts import Layout
from coconut.evaluation.answers import Comparison, extract_answer, extract_last_number, same_answer
from coconut.model.generation import Decoded


@dataclass(frozen=True)
class Outcome:
    """One example and what the model made of it; a line of `predictions.jsonl`."""

    index: int
    num_steps: int
    """Of the gold solution."""
    gold: str
    answer: str | None
    """Extracted from the text; None where it holds none."""
    right: bool
    truncated: bool
    num_generated_tokens: int
    text: str
    group: str = ""
    """A kind of question by which a set is scored apart; empty where the set names none."""

    def to_json(self) -> str:
        """Write the line, without a group where there is none."""
        fields = dataclasses.asdict(self)
        return json.dumps({k: v for k, v in fields.items() if k != "group" or v}, ensure_ascii=False) + "\n"


def read_answer(text: str, rule: AnswerRule) -> str | None:
    """Find the answer where a model's rule says that it stands; None when there is none.

    >>> read_answer("so 4 more. The answer is: 18", "after The answer is:")
    '18'
    """
    if rule.startswith("after "):
        _, found, answer = text.rpartition(rule.removeprefix("after "))
        return extract_answer(f"{ANSWER_MARK}{answer}") if found else None
    return extract_answer(text) if rule == "marked" else extract_last_number(text)


def judge(
    index: int, example: Example, row: Decoded, text: str, rule: AnswerRule = "marked", comparison: Comparison = None
) -> Outcome:
    """Compare what one row generated with the gold answer."""
    answer = read_answer(text, rule)
    return Outcome(
        index=index,
        num_steps=len(example.steps),
        gold=example.answer,
        answer=answer,
        right=same_answer(answer, example.answer, comparison),
        truncated=row.truncated,
        num_generated_tokens=row.num_tokens,
        text=text,
        group=example.group,
    )


def chain_matches(outcome: Outcome, example: Example, layout: Layout) -> bool:
    """Say whether the generated chain of thought is the gold one, white space folded."""
    found = outcome.text.rpartition(layout.wording)[0]
    return found.split() == " ".join(example.steps[layout.num_dropped_steps :]).split()
