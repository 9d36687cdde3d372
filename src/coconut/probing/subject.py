"""An entry and the questions that are put to it, in the ways that every measurement needs.

Legend: N questions, K slots, J = K + 1 moments (before each slot is fed, and after the last), T columns, D hidden,
V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from coconut.data.collator import Batch, collate
from coconut.data.encoding import EncodedExample
from coconut.data.examples import Example
from coconut.data.layouts import Layout
from coconut.data.views import IGNORED, View
from coconut.evaluation.evaluator import Edits, Evaluator
from coconut.evaluation.outcomes import Outcome, judge
from coconut.model.batch import latent_columns
from coconut.model.choice import open_passes
from coconut.model.head import output_logits
from coconut.model.latent import read_columns
from coconut.model.passes import PlainPasses
from coconut.model.thoughts import SlotFeedback


@dataclass(frozen=True)
class Trace:
    """What an untouched run went through, on the CPU in float32."""

    vectors_NKD: Tensor
    """What entered each slot."""
    states_NJD: Tensor
    """Hidden states after the final norm, before each slot was fed and after the last; the head reads them."""


@dataclass(frozen=True)
class Subject:
    """A model with its layout, and test questions."""

    evaluator: Evaluator
    examples: Sequence[Example]
    encoded: Sequence[EncodedExample]
    indices: Sequence[int]
    """Of the questions in the test split."""
    prompt: str = "plain"
    """The form in which the questions are encoded."""

    @property
    def num_slots(self) -> int:
        return self.evaluator.layout.num_latents

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """The untouched run: what `predictions.jsonl` holds for these questions."""
        return self.ask()

    @cached_property
    def rights(self) -> list[bool]:
        return [outcome.right for outcome in self.outcomes]

    @cached_property
    def log_p(self) -> list[float]:
        """Log probability of the gold text, in nats, of the untouched run."""
        return self.score()

    def ask(
        self, *, num_thoughts: int | None = None, edits: Edits | None = None, not_first: Collection[int] = ()
    ) -> list[Outcome]:
        """Answer every question greedily.

        Args:
            num_thoughts: slots before the answer; as many as in training if None.
            edits: what enters the slots instead of the thoughts.
            not_first: ids that no text may begin with.
        """
        rows = self.evaluator.decode(self._prompts(num_thoughts), edits=edits, not_first=not_first)
        texts = self.evaluator.tokenizer.batch_decode([row.ids for row in rows], skip_special_tokens=True)
        together = zip(self.indices, self.examples, rows, texts, strict=True)
        return [
            judge(index, example, row, text, self.evaluator.answer, self.evaluator.comparison)
            for index, example, row, text in together
        ]

    @torch.no_grad()
    def score(self, *, num_thoughts: int | None = None, edits: Edits | None = None) -> list[float]:
        """Return the log probability, in nats, of the gold text that stays visible, in training's own path."""
        evaluator, scores = self.evaluator, []
        views = [evaluator.writer.view(row, self._layout(num_thoughts)) for row in self.encoded]
        for places, batch, feedback in self._batches(views, edits):
            with self._reading(batch, feedback) as (passes, all_BTD):
                hidden_BTD = all_BTD[:, :-1]
                targets_BT = batch.labels_BT[:, 1:]
                is_gold_BT = targets_BT != IGNORED
                nll_N = functional.cross_entropy(
                    passes.logits(hidden_BTD[is_gold_BT]).float(), targets_BT[is_gold_BT], reduction="none"
                )
            row_N = is_gold_BT.nonzero()[:, 0]
            scores.append(torch.zeros(len(places)).index_add(0, row_N.cpu(), -nll_N.cpu()))
        return torch.cat(scores).tolist() if scores else []

    @cached_property
    @torch.no_grad()
    def trace(self) -> Trace:
        """Run the questions up to their answers, untouched."""
        vectors, states = [], []
        for _, batch, feedback in self._batches(self._prompts(None), None):
            with self._reading(batch, feedback) as (_, hidden_BTD):
                vectors.append(torch.stack(feedback.entered, dim=1).float().cpu())
                states.append(hidden_BTD[:, self._moments(batch)].float().cpu())
        return Trace(torch.cat(vectors), torch.cat(states))

    @torch.no_grad()
    def layer_states(self) -> Tensor:
        """Return every layer's states before each slot is fed, (L + 1) x N x K x D, on the CPU in float32.

        One plain pass over the question and the vectors of `trace` gives what the passes gave one after another.
        """
        parts = []
        for _, batch, embeds_BTD, moments in self.filled():
            output = self.evaluator.model.base_model(
                inputs_embeds=embeds_BTD,
                attention_mask=batch.attention_mask_BT,
                position_ids=batch.position_ids_BT,
                output_hidden_states=True,
                use_cache=False,
            )
            parts.append(torch.stack([layer_BTD[:, moments[:-1]].float().cpu() for layer_BTD in output.hidden_states]))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def filled(self) -> Iterator[tuple[list[int], Batch, Tensor, list[int]]]:
        """Yield batches of prompts whose slots hold the vectors of `trace`.

        Yields:
            (places, batch, embeds_BTD, moments): the columns before each slot, and the last slot's.
        """
        for places, batch, _ in self._batches(self._prompts(None), None):
            embeds_BTD = self.evaluator.model.get_input_embeddings()(batch.input_ids_BT).clone()
            first = self._first_slot(batch)
            embeds_BTD[:, first : first + self.num_slots] = self.trace.vectors_NKD[places].to(embeds_BTD)
            yield places, batch, embeds_BTD, self._moments(batch)

    @torch.no_grad()
    def decoded(self, states: Tensor) -> Tensor:
        """Return the head's probabilities for states after the final norm, ... x D -> ... x V, on the CPU."""
        model = self.evaluator.model
        return output_logits(model, states.to(model.device, model.dtype)).float().softmax(dim=-1).cpu()

    @contextmanager
    def _reading(self, batch: Batch, feedback: SlotFeedback) -> Iterator[tuple[PlainPasses, Tensor]]:
        """Read a batch as training does; give its passes and its hidden states, B x T x D."""
        evaluator = self.evaluator
        with (
            evaluator.autocast(),
            closing(open_passes(evaluator.model, batch, feedback, evaluator.options)) as passes,
        ):
            yield passes, read_columns(passes, feedback, batch)

    def _layout(self, num_thoughts: int | None) -> Layout:
        layout = self.evaluator.layout
        return layout if num_thoughts is None else replace(layout, num_latents=num_thoughts)

    def _prompts(self, num_thoughts: int | None) -> list[View]:
        layout = self._layout(num_thoughts)
        return [self.evaluator.writer.prompt(row.question_ids, layout) for row in self.encoded]

    def _batches(self, views: Sequence[View], edits: Edits | None) -> Iterator[tuple[list[int], Batch, SlotFeedback]]:
        """Yield the places of a batch's views, the batch, and the feedback that edits its slots."""
        evaluator = self.evaluator
        for start in range(0, len(views), evaluator.batch_size):
            places = list(range(start, min(start + evaluator.batch_size, len(views))))
            edit = None if edits is None else edits(places)
            opened, feedback = evaluator.open_slots([views[place] for place in places], edit)
            yield places, collate(opened, pad_id=evaluator.pad_id).to(evaluator.model.device), feedback

    @staticmethod
    def _first_slot(batch: Batch) -> int:
        return latent_columns(batch)[0]

    def _moments(self, batch: Batch) -> list[int]:
        """Columns before each slot, and the last slot's."""
        first = self._first_slot(batch)
        return list(range(first - 1, first + self.num_slots))
