"""One example at one latent stage, as ids and labels.

    [question | <start> | latent x n | <end> | remaining steps | answer <eos>]

Without markers there is no `<start>` and no `<end>`, and the first thought is fed from the last
question token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from coconut.data.curriculum import ViewPlan
from coconut.data.encoding import EncodedExample
from coconut.data.examples import MARKERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a column without loss."""


class MarkerIds(NamedTuple):
    """Ids of `<|start-latent|>`, `<|end-latent|>` and `<|latent|>`."""

    start: int
    end: int
    latent: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "MarkerIds":
        """Look the markers up in a vocabulary that holds them."""
        return cls(*tokenizer.convert_tokens_to_ids(list(MARKERS)))


@dataclass(frozen=True)
class View:
    """A row before padding. The columns from `prefix_length` to `prefix_length + num_slots` are the slots."""

    input_ids: list[int]
    labels: list[int]
    prefix_length: int
    """Number of columns before the first slot."""
    num_slots: int
    num_thoughts: int
    """Number of slots that are fed back: all of them, or none if the slots are pause tokens."""

    @property
    def num_supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


def build_view(
    question_ids: Sequence[int],
    steps_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[int],
    *,
    plan: ViewPlan,
    markers: MarkerIds,
) -> View:
    """Lay out a training view. The labels are `IGNORED` up to the first remaining step.

    >>> plan = ViewPlan(num_dropped_steps=1, num_latents=2, markers=True)
    >>> view = build_view([1, 2], [[3, 4], [5]], [6, 7], plan=plan, markers=MarkerIds(90, 91, 92))
    >>> view.input_ids
    [1, 2, 90, 92, 92, 91, 5, 6, 7]
    >>> view.labels
    [-100, -100, -100, -100, -100, -100, 5, 6, 7]
    """
    prompt = build_prompt(question_ids, plan=plan, markers=markers)
    reasoning = list(chain.from_iterable(steps_ids[plan.num_dropped_steps :]))
    target = reasoning[plan.num_dropped_tokens :] + list(answer_ids)
    return View(
        input_ids=prompt.input_ids + target,
        labels=[IGNORED] * len(prompt.input_ids) + target,
        prefix_length=prompt.prefix_length,
        num_slots=prompt.num_slots,
        num_thoughts=prompt.num_thoughts,
    )


def build_prompt(question_ids: Sequence[int], *, plan: ViewPlan, markers: MarkerIds) -> View:
    """Lay out the question, the slots and the markers around them, from which generation starts."""
    prefix = list(question_ids) + [markers.start] * plan.markers
    ids = prefix + [markers.latent] * plan.num_latents + [markers.end] * plan.markers
    return View(
        input_ids=ids,
        labels=[IGNORED] * len(ids),
        prefix_length=len(prefix),
        num_slots=plan.num_latents,
        num_thoughts=plan.num_latents if plan.slot == "thought" else 0,
    )


def prompt_length(question_ids: Sequence[int], plan: ViewPlan) -> int:
    """Return the number of columns that `build_prompt` would lay out."""
    return len(question_ids) + plan.num_latents + 2 * plan.markers


def longest_view(example: EncodedExample, plans: Iterable[ViewPlan]) -> int:
    """Return the number of columns of the longest of the views that `build_view` makes by these plans.

    Tokens that `icot` removes are counted, because every row is shown whole before the first removal.
    """
    question_ids, steps_ids, answer_ids = example
    num_columns = (
        plan.num_latents + 2 * plan.markers + sum(map(len, steps_ids[plan.num_dropped_steps :])) for plan in plans
    )
    return len(question_ids) + max(num_columns) + len(answer_ids)


def longest_prompt(example: EncodedExample, plans: Iterable[ViewPlan]) -> int:
    """Return the number of columns of the longest prompt by these plans, with room for the gold answer."""
    slots = max(plan.num_latents + 2 * plan.markers for plan in plans)
    return len(example.question_ids) + slots + len(example.answer_ids)
