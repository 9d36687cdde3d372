"""Score a model on a split: loss, and accuracy by batched greedy generation."""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut.checkpoints.meta import AnswerRule
from coconut.data.collator import collate
from coconut.data.encoded import EncodedSet
from coconut.data.examples import Example
from coconut.data.layouts import Layout
from coconut.data.views import MarkerIds, View, ViewWriter
from coconut.devices import explain_failure, is_out_of_memory
from coconut.evaluation.answers import Comparison
from coconut.evaluation.outcomes import Outcome, judge
from coconut.model.feedback import Feedback
from coconut.model.generation import Decoded, generate
from coconut.model.head import num_positions
from coconut.model.latent import latent_nll
from coconut.model.passes import PassOptions
from coconut.model.sampling import Sampling, sample
from coconut.model.thoughts import Edit, SlotFeedback, pause_feedback
from coconut.pipeline.signals import Interrupted
from coconut.ranks import BatchTooLargeError, Ranks

Work = Callable[[Sequence[int]], list[Any]]
"""From the places of a batch to what is found in it, as JSON can hold it."""
Edits = Callable[[Sequence[int]], Edit]
"""From the places of the prompts of a batch to what edits their slots."""


@dataclass
class Evaluator:
    """A model, ready to be scored in one layout.

    The largest batch that fits is found by halving on out-of-memory; results do not depend on it.
    """

    model: PreTrainedModel
    feedback: Feedback
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    max_new_tokens: int
    batch_size: int
    autocast: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    options: PassOptions = field(default_factory=PassOptions)
    answer: AnswerRule = "marked"
    """Where the model says its answer."""
    comparison: Comparison = None
    """What a number may differ by from the gold one."""
    ranks: Ranks = field(default_factory=Ranks)
    """Each of them does its part of the rows, and all of them return the whole."""
    in_step: bool = False
    """Whether other processes read the same rows at the same time, so that none can begin a batch again by itself."""
    poll: Callable[[], None] = field(default=lambda: None)
    """Called before each batch; raises `Interrupted` to give up, here and in all other processes."""
    num_oom_retries: int = 0
    """In this process."""

    @cached_property
    def writer(self) -> ViewWriter:
        return ViewWriter.of(self.tokenizer)

    @property
    def markers(self) -> MarkerIds:
        return self.writer.markers

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def eos_ids(self) -> list[int]:
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        many = configured if isinstance(configured, list) else [configured]
        return sorted({int(i) for i in [*many, self.tokenizer.eos_token_id] if i is not None})

    def decode(
        self,
        prompts: Sequence[View],
        *,
        edits: Edits | None = None,
        not_first: Collection[int] = (),
        on_rows: Callable[[int], object] = lambda _count: None,
    ) -> list[Decoded]:
        """Generate after each prompt; results in the given order.

        Args:
            edits: what enters the slots instead of the thoughts.
            not_first: ids that no answer may begin with.
        """

        def decode_batch(places: Sequence[int]) -> list[Any]:
            edit = None if edits is None else edits(places)
            rows = self._decode_batch([prompts[place] for place in places], edit, not_first)
            on_rows(len(places) * self.ranks.count)
            return [dataclasses.asdict(row) for row in rows]

        return [Decoded(**row) for row in self._by_place(prompts, decode_batch)]

    def prompts(self, questions_ids: Sequence[Sequence[int]]) -> list[View]:
        """Lay out the prompts of encoded questions."""
        return [self.writer.prompt(ids, self.layout) for ids in questions_ids]

    def sample(
        self,
        prompts: Sequence[View],
        sampling: Sampling,
        seed: int,
        *,
        on_rows: Callable[[int], object] = lambda _count: None,
    ) -> list[list[Decoded]]:
        """Generate several times after each prompt; a sample depends on the seed, its question and its number only.

        Raises:
            ValueError: thoughts are to be drawn in a way that the model does not have, or the model fails.
        """

        def sample_batch(places: Sequence[int]) -> list[Any]:
            chosen = [prompts[place] for place in places]
            keys_BN = torch.tensor(
                [
                    [sample_key(prompt.input_ids, number, seed) for number in range(sampling.num_samples)]
                    for prompt in chosen
                ]
            )
            batch = collate(chosen, pad_id=self.pad_id).to(self.model.device)
            with self.autocast():
                rows = sample(
                    self.model,
                    self.feedback,
                    batch,
                    keys_BN,
                    sampling,
                    eos_ids=self.eos_ids,
                    max_new_tokens=self._limits(chosen),
                    options=self.options,
                )
            on_rows(len(places) * self.ranks.count)
            return [[dataclasses.asdict(one) for one in row] for row in rows]

        found = self._by_place(prompts, sample_batch, rows_each=sampling.num_samples)
        return [[Decoded(**one) for one in row] for row in found]

    def _limits(self, prompts: Sequence[View]) -> list[int]:
        """Return how many tokens each prompt may get: a position that the model does not have cannot be read."""
        room = num_positions(self.model)
        return [max(0, min(self.max_new_tokens, room - len(prompt.input_ids))) for prompt in prompts]

    def open_slots(self, views: Sequence[View], edit: Edit | None = None) -> tuple[list[View], SlotFeedback]:
        """Return views in which every slot is fed, pause slots too, and the feedback of one batch of them."""
        feeds_thoughts = self.layout.slot == "thought"
        inner = self.feedback if feeds_thoughts else pause_feedback(self.model, self.markers.latent)
        return [replace(view, num_thoughts=view.num_slots) for view in views], SlotFeedback(inner, edit)

    def _decode_batch(self, prompts: Sequence[View], edit: Edit | None, not_first: Collection[int]) -> list[Decoded]:
        feedback: Feedback = self.feedback
        if edit is not None:
            prompts, feedback = self.open_slots(prompts, edit)
        batch = collate(prompts, pad_id=self.pad_id).to(self.model.device)
        with self.autocast():
            return generate(
                self.model,
                feedback,
                batch,
                eos_ids=self.eos_ids,
                max_new_tokens=self._limits(prompts),
                options=self.options,
                not_first=not_first,
            )

    @torch.no_grad()
    def loss(self, dataset: EncodedSet) -> float:
        """Return the mean loss in nats per supervised token of the rows whose gold view fits, in this layout."""
        views = [self.writer.view(example, self.layout) for example in dataset.examples()]
        # The encode stage keeps rows for evaluation that fit without the gold chain of thought.
        views = [view for view in views if len(view.input_ids) <= num_positions(self.model)]

        def score_batch(places: Sequence[int]) -> list[tuple[float, int]]:
            batch = collate([views[place] for place in places], pad_id=self.pad_id).to(self.model.device)
            with self.autocast():
                nll, num_tokens = latent_nll(self.model, self.feedback, batch, self.options)
            return [(float(nll), num_tokens)]

        sums = [found for part in self._parts(self._orders(views), score_batch) for found in part]
        nll, num_tokens = (sum(parts) for parts in zip(*sums, strict=True)) if sums else (0.0, 0)
        return float(nll) / max(1, num_tokens)

    def outcomes(
        self,
        dataset: EncodedSet,
        examples: Sequence[Example],
        *,
        on_rows: Callable[[int], object] = lambda _count: None,
    ) -> list[Outcome]:
        """Generate for each row of the encoded set; `examples` is the split that its `index` refers to."""
        columns = dataset[range(len(dataset))]
        decoded = self.decode(self.prompts(columns["question_ids"]), on_rows=on_rows)
        texts = self.tokenizer.batch_decode([row.ids for row in decoded], skip_special_tokens=True)
        rows = zip(columns["index"], decoded, texts, strict=True)
        return [judge(index, examples[index], row, text, self.answer, self.comparison) for index, row, text in rows]

    def _by_place(self, views: Sequence[View], work: Work, *, rows_each: int = 1) -> list[Any]:
        """Return what the work finds for each view, in their order."""
        orders = self._orders(views)
        parts = self._parts(orders, work, rows_each=rows_each)
        found = {
            place: row
            for order, part in zip(orders, parts, strict=True)
            for place, row in zip(order, part, strict=True)
        }
        return [found[place] for place in range(len(views))]

    def _orders(self, views: Sequence[View]) -> list[list[int]]:
        """Return the places of the views that each process works on, the longest first, so that little is padded."""
        order = sorted(range(len(views)), key=lambda place: -len(views[place].input_ids))
        ranks = self.ranks
        return [[order[number] for number in ranks.part_of(rank, len(order))] for rank in range(ranks.count)]

    def _parts(self, orders: Sequence[Sequence[int]], work: Work, *, rows_each: int = 1) -> list[list[Any]]:
        """Return what the work finds in the part of each process, given the places of each; see `_in_batches`."""
        own = orders[self.ranks.rank]
        return self.ranks.collect(lambda: self._in_batches(own, work, rows_each=rows_each), Interrupted)

    def _in_batches(self, order: Sequence[int], work: Work, *, rows_each: int) -> list[Any]:
        """Do the work batch by batch; out of memory halves the batch, for all that follow too.

        Args:
            rows_each: of the batch, for each place.

        Raises:
            Interrupted: if `poll` says so.
            ValueError: if the model fails on a batch, naming its rows.
            BatchTooLargeError: memory ran out `in_step` with other processes.
        """
        found: list[Any] = []
        done = 0
        while done < len(order):
            self.poll()
            places = order[done : done + max(1, self.batch_size // rows_each)]
            try:
                found += work(places)
            except (RuntimeError, IndexError) as error:
                if len(places) == 1 or not is_out_of_memory(error):
                    shown = ", ".join(map(str, places[:16])) + (", ..." if len(places) > 16 else "")
                    raise ValueError(f"rows {shown}: the model failed: {explain_failure(error)}") from error
                if self.in_step:
                    raise BatchTooLargeError("eval_batch", len(places) * rows_each) from error
                self.batch_size = len(places) // 2 * rows_each
                self.num_oom_retries += 1
                logger.warning("out of memory with {} rows; going on with {}", len(places) * rows_each, self.batch_size)
                continue
            done += len(places)
        return found


def sample_key(prompt_ids: Sequence[int], number: int, seed: int) -> int:
    """Return the key of a question's sample: 64 bits, signed."""
    content = f"{seed} {number} {' '.join(map(str, prompt_ids))}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
