"""One example at one latent stage, as ids and labels.

    [question | <start> | latent x n | <end> | remaining steps | answer <eos>]

Without markers there is no `<start>` and no `<end>`, and the first thought is fed from the last
question token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from coconut.data.encoding import EncodedExample, count_opening, reword_answer, tokenize_texts
from coconut.data.examples import ANSWER_MARK, MARKERS
from coconut.data.layouts import Layout

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
    columns: Mapping[str, int] = field(default_factory=dict)
    """Columns by name, for a loss that reads their hidden states; see `ViewWriter.view`."""
    layout: Layout = field(default_factory=Layout)
    """By which the row was laid out."""

    @property
    def num_supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


def build_view(
    question_ids: Sequence[int],
    steps_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[int],
    *,
    layout: Layout,
    markers: MarkerIds,
) -> View:
    """Lay out a training view. The labels are `IGNORED` up to the first remaining step.

    >>> layout = Layout(num_dropped_steps=1, num_latents=2, markers=True)
    >>> view = build_view([1, 2], [[3, 4], [5]], [6, 7], layout=layout, markers=MarkerIds(90, 91, 92))
    >>> view.input_ids
    [1, 2, 90, 92, 92, 91, 5, 6, 7]
    >>> view.labels
    [-100, -100, -100, -100, -100, -100, 5, 6, 7]
    """
    prompt = build_prompt(question_ids, layout=layout, markers=markers)
    target = reasoning_ids(steps_ids, layout) + list(answer_ids)
    return View(
        input_ids=prompt.input_ids + target,
        labels=[IGNORED] * len(prompt.input_ids) + target,
        prefix_length=prompt.prefix_length,
        num_slots=prompt.num_slots,
        num_thoughts=prompt.num_thoughts,
        layout=layout,
    )


def reasoning_ids(steps_ids: Sequence[Sequence[int]], layout: Layout) -> list[int]:
    """Return the ids of the reasoning that a layout leaves as text.

    >>> reasoning_ids([[3, 4], [5], [6]], Layout(num_dropped_last=1, num_dropped_tokens=1))
    [4, 5]
    """
    kept = steps_ids[layout.num_dropped_steps : max(0, len(steps_ids) - layout.num_dropped_last)]
    return list(chain.from_iterable(kept))[layout.num_dropped_tokens :]


def build_prompt(question_ids: Sequence[int], *, layout: Layout, markers: MarkerIds) -> View:
    """Lay out the question, the slots and the markers around them, from which generation starts."""
    prefix = list(question_ids) + [markers.start] * layout.markers
    ids = prefix + [markers.latent] * layout.num_latents + [markers.end] * layout.markers
    return View(
        input_ids=ids,
        labels=[IGNORED] * len(ids),
        prefix_length=len(prefix),
        num_slots=layout.num_latents,
        num_thoughts=layout.num_latents if layout.slot == "thought" else 0,
        layout=layout,
    )


@dataclass(frozen=True)
class ViewWriter:
    """Lays out encoded examples for one model."""

    tokenizer: "PreTrainedTokenizerBase"
    markers: MarkerIds

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "ViewWriter":
        return cls(tokenizer, MarkerIds.of(tokenizer))

    def view(self, example: EncodedExample, layout: Layout) -> View:
        """Lay out a training view; see `build_view`."""
        answer_ids = self.answer_ids(example, layout)
        return build_view(example.question_ids, example.steps_ids, answer_ids, layout=layout, markers=self.markers)

    def prompt(self, question_ids: Sequence[int], layout: Layout) -> View:
        """Lay out what stands before generation; see `build_prompt`."""
        return build_prompt(question_ids, layout=layout, markers=self.markers)

    def answer_ids(self, example: EncodedExample, layout: Layout) -> list[int]:
        """Return the ids of an example's answer, worded as the layout says."""
        if layout.wording == ANSWER_MARK:
            return example.answer_ids
        return reword_answer(self.tokenizer, tuple(example.answer_ids), layout.wording)

    def column_before_answer(self, view: View, example: EncodedExample, layout: Layout) -> int:
        """Return the column whose output predicts the first token of the answer's own text, after its wording."""
        answer_ids = self.answer_ids(example, layout)
        return (
            len(view.input_ids) - len(answer_ids) + count_opening(self.tokenizer, tuple(answer_ids), layout.wording) - 1
        )

    def longest(self, example: EncodedExample, layouts: Iterable[Layout], *, is_prompt: bool = False) -> int:
        """Return an upper bound of the columns that an example takes: of its views, or of its prompts."""
        layouts = list(layouts)
        measure = longest_prompt if is_prompt else longest_view
        others = {layout.wording for layout in layouts} - {ANSWER_MARK}
        return measure(example, layouts) + max(
            (len(tokenize_texts(self.tokenizer, [wording])[0]) for wording in others), default=0
        )


def prompt_length(question_ids: Sequence[int], layout: Layout) -> int:
    """Return the number of columns that `build_prompt` would lay out."""
    return len(question_ids) + layout.num_latents + 2 * layout.markers


def longest_view(example: EncodedExample, layouts: Iterable[Layout]) -> int:
    """Return the number of columns of the longest of the views that `build_view` makes by these layouts.

    Tokens that are removed from the left of the reasoning are counted, because every row is shown whole before the
    first removal.
    """
    question_ids, steps_ids, answer_ids = example
    num_columns = (
        layout.num_latents
        + 2 * layout.markers
        + sum(map(len, steps_ids[layout.num_dropped_steps : max(0, len(steps_ids) - layout.num_dropped_last)]))
        for layout in layouts
    )
    return len(question_ids) + max(num_columns) + len(answer_ids)


def longest_prompt(example: EncodedExample, layouts: Iterable[Layout]) -> int:
    """Return the number of columns of the longest prompt by these layouts, with room for the gold answer."""
    slots = max(layout.num_latents + 2 * layout.markers for layout in layouts)
    return len(example.question_ids) + slots + len(example.answer_ids)
