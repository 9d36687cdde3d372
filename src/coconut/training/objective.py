"""The gradient of one update: what its method minimises, over all its micro-batches and processes.

An update is read once for each of the method's readings, one after another; a reading is cut into micro-batches, and
what one of them keeps of all rows can be read by those that follow.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut.config.methods import blaming_method
from coconut.data.collator import Batch, collate
from coconut.data.views import View
from coconut.devices import is_out_of_memory
from coconut.methods import Part
from coconut.model.batch import latent_columns
from coconut.model.choice import open_passes
from coconut.model.dropout import draw_keys, has_dropout
from coconut.model.feedback import Feedback
from coconut.model.latent import read_columns
from coconut.model.passes import PassOptions, cut
from coconut.model.thoughts import SlotFeedback
from coconut.ranks import BatchTooLargeError, Ranks
from coconut.training.losses import Sums, mean_loss
from coconut.training.reading import Draws, Keeper, Reading, UpdateFacts
from coconut.training.rows import TrainingRow

if TYPE_CHECKING:
    from coconut.methods import Method
    from coconut.training.sharding import Shards


@dataclass
class Cost:
    """The parts of an update's loss. Sums and counts are over all processes."""

    parts: Sums
    num_columns: int
    """Columns computed, padding included."""
    num_padding: int
    num_latents: int
    stops: bool = False
    """Whether any process was asked to stop before the update."""
    saves: bool = False
    """Whether it is time to save for any of them."""
    grad_norm: float = 0.0
    """What `finish` returned."""

    @property
    def loss(self) -> float:
        """What the update minimised."""
        return mean_loss(self.parts)


@dataclass
class Objective:
    """Computes gradients of updates; remembers the micro-batch that fits into memory."""

    model: PreTrainedModel
    feedback: Feedback
    accelerator: Accelerator
    pad_id: int
    micro_batch: int
    method: "Method"
    modules: nn.Module | None = None
    """What the method trains beside the model."""
    options: PassOptions = field(default_factory=PassOptions)
    ranks: Ranks = field(default_factory=Ranks)
    shards: "Shards | None" = None
    """The weights, where no process holds all of them."""
    num_oom_retries: int = 0
    """Of all processes."""

    def __post_init__(self) -> None:
        self._has_dropout = has_dropout(self.model)
        self._prepared: tuple[Sequence[TrainingRow], list[int], Batch] | None = None

    def prepare(self, rows: Sequence[TrainingRow]) -> None:
        """Lay out the first micro-batch of an update that is to come, while an accelerator works on this one."""
        views = _views(rows, self.method.readings[0])
        places, _, num_passes = next(self._micro_batches(views))
        self._prepared = rows, places, self._collate(views, places, num_passes)

    def accumulate(
        self,
        rows: Sequence[TrainingRow],
        parameters: Mapping[str, nn.Parameter],
        *,
        stops: bool = False,
        saves: bool = False,
        finish: Callable[[], Tensor] | None = None,
    ) -> Cost:
        """Set `.grad` to the gradient of the loss over the rows, and say what they cost.

        Every process is given all rows and takes its share of them. On out-of-memory the
        micro-batch is halved and the same update is done again, so the result differs by rounding only.
        Dropout's masks belong to the row's place in the update, and come from torch's generator on the CPU,
        which must be in the same state in every process.

        Args:
            stops: whether this process was asked to stop; the answer says whether any was.
            saves: likewise, whether it is time to save.
            finish: called with the gradient in place; returns its norm. That and the loss are asked for together: to
                ask an accelerator is to wait until it has done all its work.

        Raises:
            RankLostError: another process has ended.
            BatchTooLargeError: memory ran out, and this process cannot do the update again by itself: with shards, and
                where several processes read rows in several layouts.
            MethodError: the method has failed in its own file.
        """
        readings = self.method.readings
        num_tokens = {name: sum(view.num_supervised for view in _views(rows, name)) for name in readings}
        keys = {name: draw_keys(len(rows)) for name in readings} if self._has_dropout else {}
        num_retries = 0
        while True:
            try:
                sums, counts = self._accumulate_own(rows, keys, UpdateFacts(len(rows), num_tokens))
                break
            except RuntimeError as error:
                num_rows = min(self.micro_batch, len(self.ranks.own(len(rows))))
                if num_rows <= 1 or not is_out_of_memory(error):
                    raise
                # Between two readings processes tell each other what they kept, so that none can begin again alone.
                if self.shards or (self.ranks.count > 1 and len(readings) > 1):
                    raise BatchTooLargeError("micro_batch", num_rows) from error
            # Callbacks the except block: there, the traceback would keep the failed pass's tensors alive.
            num_retries += 1
            self._halve(num_rows)
        told = [*counts, int(stops), int(saves), num_retries]
        if self.ranks.count > 1:
            if len(rows) < self.ranks.count:
                sums = self._agree_on_parts(sums)
            told = self._sum_over_processes(parameters, [part.total for part in sums.values()], told)
        num_columns, num_padding, num_latents, num_stops, num_saves, num_retries = told
        if self.shards:
            self.shards.settle(has_thoughts=num_latents > 0)
        if num_retries:
            # One process wrote down what all of them have learned, and each goes on with what fits everywhere.
            self.num_oom_retries += num_retries
            self.micro_batch = min(self.ranks.gather(self.micro_batch))
        device = self.accelerator.device
        grad_norm = torch.zeros((), dtype=torch.float64, device=device) if finish is None else finish()
        *totals, norm = torch.stack([*(part.total for part in sums.values()), grad_norm.to(torch.float64)]).tolist()
        parts = {
            name: (total, part.count, part.weight) for (name, part), total in zip(sums.items(), totals, strict=True)
        }
        return Cost(parts, num_columns, num_padding, num_latents, num_stops > 0, num_saves > 0, norm)

    def _accumulate_own(
        self, rows: Sequence[TrainingRow], keys: Mapping[str, Tensor], facts: UpdateFacts
    ) -> tuple[dict[str, Part], tuple[int, int, int]]:
        """Return the loss of this process's rows, not yet asked for; and its columns, padding and latents."""
        for module in filter(None, (self.model, self.feedback, self.modules)):
            module.zero_grad(set_to_none=True)
        sums: dict[str, Part] = {}
        num_columns = num_padding = num_latents = 0
        prepared, self._prepared = self._prepared, None
        for name in self.method.readings:
            views, keeper = _views(rows, name), Keeper()
            for places, is_own, num_passes in self._micro_batches(views):
                if prepared is not None and prepared[0] is rows and prepared[1] == places and not num_columns:
                    batch = prepared[2]
                else:
                    batch = self._collate(views, places, num_passes)
                keys_B = keys[name][places] if keys else None
                kept = keeper if is_own else Keeper()
                with self.accelerator.autocast():
                    loss, parts = self._read(name, rows, places, batch, keys_B, num_passes, facts, kept)
                # Without a row of its own, a process only joins the others in what they send.
                self.accelerator.backward(loss if is_own else 0.0 * loss)
                if is_own:
                    _add_parts(sums, parts)
                    num_columns += batch.num_columns
                    num_padding += int((batch.attention_mask_BT == 0).sum())
                    num_latents += int(batch.is_latent_BT.sum())
            if len(self.method.readings) > 1:
                keeper.join(facts, self.ranks)
        return sums, (num_columns, num_padding, num_latents)

    def _read(
        self,
        name: str,
        rows: Sequence[TrainingRow],
        places: Sequence[int],
        batch: Batch,
        keys_B: Tensor | None,
        num_passes: int,
        facts: UpdateFacts,
        keeper: Keeper,
    ) -> tuple[Tensor, Mapping[str, Part]]:
        """Read a micro-batch in one of the method's layouts; return its share of the update's loss, and the parts."""
        on_device, method = batch.to(self.accelerator.device), self.method
        found: dict[str, Part] = {}

        def read(options: PassOptions) -> Tensor:
            passes = open_passes(
                self.model,
                on_device,
                self.feedback,
                options,
                keys_B=keys_B,
                keeps_layers=name in method.reads_layers,
            )
            draws = Draws([rows[place].seed for place in places], on_device.input_ids_BT.device)
            with blaming_method(self.method_name, "edit its thoughts"):
                edit = method.edit_thoughts(name, draws)
            is_watched = edit is not None or name in method.reads_thoughts
            feedback = SlotFeedback(self.feedback, edit) if is_watched else self.feedback
            with closing(passes):
                reading = Reading(
                    name=name,
                    places=places,
                    views=[rows[place].views[name] for place in places],
                    examples=[rows[place].example for place in places],
                    batch=on_device,
                    hidden_BTD=read_columns(passes, feedback, on_device),
                    layers=passes.states(),
                    fed=_fed(feedback, on_device, options) if isinstance(feedback, SlotFeedback) else (),
                    passes=passes,
                    modules=self.modules,
                    facts=facts,
                    keeper=keeper,
                    draws=draws,
                )
                with blaming_method(self.method_name, "compute its loss"):
                    found.update(method.loss(reading))
            return torch.stack([_share(part) for part in found.values()]).sum()

        if self.shards:
            return self.shards.run(read, self.options, num_passes=num_passes), found
        return read(self.options), found

    @property
    def method_name(self) -> str:
        return type(self.method).__module__.rpartition(".")[2]

    def _collate(self, views: Sequence[View], places: Sequence[int], num_passes: int) -> Batch:
        return collate([views[place] for place in places], pad_id=self.pad_id, min_columns=num_passes)

    def _agree_on_parts(self, sums: dict[str, Part]) -> dict[str, Part]:
        """Give every process the same parts in the same order, where some have no row and so found no part."""
        described = self.ranks.gather({name: [part.count, part.weight] for name, part in sums.items()})
        names = {name: values for found in described for name, values in found.items()}
        zero = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        return {name: sums.get(name) or Part(zero.clone(), *names[name]) for name in names}

    def _micro_batches(self, views: Sequence[View]) -> Iterator[tuple[list[int], bool, int]]:
        """Go through the micro-batches of this process.

        With shards all processes have as many, of as many passes.

        Yields:
            (rows, is_own, num_passes): another process's row, which counts nothing here, where this one has none left;
            the passes that the micro-batch must be cut into at least.
        """
        if not self.shards:
            yield from ((rows, True, 0) for rows in self._pieces(views, self.ranks.rank))
            return
        for pieces in zip_longest(*(self._pieces(views, rank) for rank in range(self.ranks.count)), fillvalue=[]):
            own, rows = pieces[self.ranks.rank], [row for piece in pieces for row in piece]
            yield own or rows[:1], bool(own), 1 + max(views[row].num_thoughts for row in rows)

    def _pieces(self, views: Sequence[View], rank: int) -> list[list[int]]:
        """Cut the rows of a process into micro-batches."""
        # Rows of similar length share a micro-batch, so that little is padded; the update is the same.
        own = self.ranks.part_of(rank, len(views))
        ordered = sorted(own, key=lambda row: len(views[row].input_ids))
        return [ordered[start : start + self.micro_batch] for start in range(0, len(ordered), self.micro_batch)]

    def _halve(self, num_rows: int) -> None:
        self.micro_batch = max(1, num_rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory with {} rows; redoing the update with {} at a time", num_rows, self.micro_batch)

    def _sum_over_processes(
        self, parameters: Mapping[str, nn.Parameter], totals: Sequence[Tensor], told: Sequence[int]
    ) -> list[int]:
        """Add up the gradients and the loss in place, and return the sums of what else the processes tell.

        A parameter that no process's rows reach keeps no gradient, as in one process: AdamW would decay it
        for a gradient of zeros.
        """
        summed = [] if self.shards else list(parameters.values())  # Gradients of shards are summed already.
        reached = [int(parameter.grad is not None) for parameter in summed]
        sums = [int(number) for number in self.ranks.sum_on_host([*told, *reached])]
        gradients = []
        for parameter, num_reached in zip(summed, sums[len(told) :], strict=True):
            if num_reached:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self.ranks.sum_([*totals, *gradients])
        return sums[: len(told)]


def _views(rows: Sequence[TrainingRow], reading: str) -> list[View]:
    return [row.views[reading] for row in rows]


def _fed(feedback: SlotFeedback, batch: Batch, options: PassOptions) -> list[Tensor]:
    """Return what entered the slots. Cuts that are no slots, by which processes read in step, feed nothing."""
    thinking = latent_columns(batch)
    if feedback.parallel_iterations:
        return feedback.entered
    cuts = cut(thinking, batch.input_ids_BT.shape[1], options.num_passes)
    return [vector_BD for column, vector_BD in zip(cuts, feedback.entered, strict=True) if column in thinking]


def _share(part: Part) -> Tensor:
    """Return what a part of a micro-batch adds to the loss of the update."""
    mean = part.total.float() / max(1, part.count)
    return mean if part.weight == 1 else part.weight * mean


def _add_parts(sums: dict[str, Part], parts: Mapping[str, Part]) -> None:
    for name, part in parts.items():
        total = part.total.detach().to(torch.float64)
        sums[name] = replace(part, total=total + sums[name].total if name in sums else total)


def check_finite(cost: Cost, *, place: str) -> None:
    """Stop before an update that would spoil the weights.

    Args:
        place: entry, epoch, update and rows, for the message.

    Raises:
        ValueError: naming the place, and saying what to try.
    """
    if not math.isfinite(cost.loss) or not math.isfinite(cost.grad_norm):
        raise ValueError(
            f"{place}: loss {cost.loss:g}, gradient norm {cost.grad_norm:g}, wanted finite numbers; nothing was updated"
            " and the last good state is kept. Try a lower lr, more train.warmup_updates, a train.max_grad_norm, or"
            " precision fp32"
        )
