"""The gradient of one update: the mean loss over every supervised token of all its micro-batches and processes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut.data.collator import Batch, collate
from coconut.data.views import View
from coconut.devices import is_out_of_memory
from coconut.model.dropout import draw_keys, has_dropout
from coconut.model.feedback import Feedback
from coconut.model.latent import latent_nll
from coconut.model.passes import PassOptions
from coconut.peers import NoRoomError, Peers

if TYPE_CHECKING:
    from coconut.training.sharding import Shards


@dataclass
class Cost:
    """The parts of an update's loss. Counts are over all processes."""

    nll: float
    """Summed over the supervised tokens."""
    num_tokens: int
    """Supervised tokens."""
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
        """Mean in nats per supervised token."""
        return self.nll / max(1, self.num_tokens)


@dataclass
class Objective:
    """Computes gradients of updates; remembers the micro-batch that fits into memory."""

    model: PreTrainedModel
    feedback: Feedback
    accelerator: Accelerator
    pad_id: int
    micro_batch: int
    options: PassOptions = field(default_factory=PassOptions)
    peers: Peers = field(default_factory=Peers)
    shards: "Shards | None" = None
    """The weights, where no process holds all of them."""
    num_oom_retries: int = 0
    """Of all processes."""

    def __post_init__(self) -> None:
        self._has_dropout = has_dropout(self.model)
        self._prepared: tuple[Sequence[View], list[int], Batch] | None = None

    def prepare(self, views: Sequence[View]) -> None:
        """Lay out the first micro-batch of an update that is to come, while an accelerator works on this one."""
        rows, _, num_passes = next(self._micro_batches(views))
        self._prepared = views, rows, self._collate(views, rows, num_passes)

    def accumulate(
        self,
        views: Sequence[View],
        parameters: Mapping[str, nn.Parameter],
        *,
        stops: bool = False,
        saves: bool = False,
        finish: Callable[[], Tensor] | None = None,
    ) -> Cost:
        """Set `.grad` to the gradient of the mean loss over the views, and say what they cost.

        Every process is given all views and takes its share of them. On out-of-memory the
        micro-batch is halved and the same update is done again, so the result differs by rounding only.
        Dropout's masks belong to the row's place in the update, and come from torch's generator on the CPU,
        which must be in the same state in every process.

        Args:
            stops: whether this process was asked to stop; the answer says whether any was.
            saves: likewise, whether it is time to save.
            finish: called with the gradient in place; returns its norm. That and the loss are asked for together: to
                ask an accelerator is to wait until it has done all its work.

        Raises:
            PeerLostError: another process has ended.
            NoRoomError: memory ran out, and with shards this process cannot do the update again by itself.
        """
        num_tokens = sum(view.num_supervised for view in views)
        keys = draw_keys(len(views)) if self._has_dropout else None
        num_retries = 0
        while True:
            try:
                nll, counts = self._accumulate_own(views, keys, num_tokens)
                break
            except RuntimeError as error:
                num_rows = min(self.micro_batch, len(self.peers.own(len(views))))
                if num_rows <= 1 or not is_out_of_memory(error):
                    raise
                if self.shards:
                    raise NoRoomError("micro_batch", num_rows) from error
            # Outside the except block: there, the traceback would keep the failed pass's tensors alive.
            num_retries += 1
            self._halve(num_rows)
        told = [*counts, int(stops), int(saves), num_retries]
        if self.peers.count > 1:
            told = self._sum_over_processes(parameters, nll, told)
        num_columns, num_padding, num_latents, num_stops, num_saves, num_retries = told
        if self.shards:
            self.shards.settle(has_thoughts=num_latents > 0)
        if num_retries:
            # One process wrote down what all of them have learned, and each goes on with what fits everywhere.
            self.num_oom_retries += num_retries
            self.micro_batch = min(self.peers.gather(self.micro_batch))
        grad_norm = nll.new_zeros(()) if finish is None else finish()
        loss, norm = torch.stack([nll, grad_norm.to(nll)]).tolist()
        return Cost(loss, num_tokens, num_columns, num_padding, num_latents, num_stops > 0, num_saves > 0, norm)

    def _accumulate_own(
        self, views: Sequence[View], keys: Tensor | None, num_tokens: int
    ) -> tuple[Tensor, tuple[int, int, int]]:
        """Return the loss of this process's rows in nats, not yet asked for; and its columns, padding and latents."""
        self.model.zero_grad(set_to_none=True)
        self.feedback.zero_grad(set_to_none=True)
        device = self.accelerator.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        num_columns = num_padding = num_latents = 0
        prepared, self._prepared = self._prepared, None
        for rows, is_own, num_passes in self._micro_batches(views):
            if prepared is not None and prepared[0] is views and prepared[1] == rows:
                batch = prepared[2]
            else:
                batch = self._collate(views, rows, num_passes)
            with self.accelerator.autocast():
                nll = self._nll(batch.to(device), None if keys is None else keys[rows], num_passes)
            # Without a row of its own, a process only joins the others in what they send.
            self.accelerator.backward((nll if is_own else 0.0 * nll) / max(1, num_tokens))
            if is_own:
                total += nll.detach()
                num_columns += batch.num_columns
                num_padding += int((batch.attention_mask_BT == 0).sum())
                num_latents += int(batch.is_latent_BT.sum())
        return total, (num_columns, num_padding, num_latents)

    def _collate(self, views: Sequence[View], rows: Sequence[int], num_passes: int) -> Batch:
        return collate([views[row] for row in rows], pad_id=self.pad_id, min_columns=num_passes)

    def _nll(self, batch: Batch, keys_B: Tensor | None, num_passes: int) -> Tensor:
        if self.shards:
            return self.shards.nll(batch, self.options, keys_B, num_passes=num_passes)
        return latent_nll(self.model, self.feedback, batch, self.options, keys_B=keys_B)[0]

    def _micro_batches(self, views: Sequence[View]) -> Iterator[tuple[list[int], bool, int]]:
        """Go through the micro-batches of this process.

        With shards all processes have as many, of as many passes.

        Yields:
            (rows, is_own, num_passes): another process's row, which counts nothing here, where this one has none left;
            the passes that the micro-batch must be cut into at least.
        """
        if not self.shards:
            yield from ((rows, True, 0) for rows in self._pieces(views, self.peers.rank))
            return
        for pieces in zip_longest(*(self._pieces(views, rank) for rank in range(self.peers.count)), fillvalue=[]):
            own, rows = pieces[self.peers.rank], [row for piece in pieces for row in piece]
            yield own or rows[:1], bool(own), 1 + max(views[row].num_thoughts for row in rows)

    def _pieces(self, views: Sequence[View], rank: int) -> list[list[int]]:
        """Cut the rows of a process into micro-batches."""
        # Rows of similar length share a micro-batch, so that little is padded; the update is the same.
        own = self.peers.part_of(rank, len(views))
        ordered = sorted(own, key=lambda row: len(views[row].input_ids))
        return [ordered[start : start + self.micro_batch] for start in range(0, len(ordered), self.micro_batch)]

    def _halve(self, num_rows: int) -> None:
        self.micro_batch = max(1, num_rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory with {} rows; redoing the update with {} at a time", num_rows, self.micro_batch)

    def _sum_over_processes(
        self, parameters: Mapping[str, nn.Parameter], nll: Tensor, told: Sequence[int]
    ) -> list[int]:
        """Add up the gradients and the loss in place, and return the sums of what else the processes tell.

        A parameter that no process's rows reach keeps no gradient, as in one process: AdamW would decay it
        for a gradient of zeros.
        """
        summed = [] if self.shards else list(parameters.values())  # Gradients of shards are summed already.
        reached = [int(parameter.grad is not None) for parameter in summed]
        sums = [int(number) for number in self.peers.sum_on_host([*told, *reached])]
        gradients = []
        for parameter, num_reached in zip(summed, sums[len(told) :], strict=True):
            if num_reached:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self.peers.sum_([nll, *gradients])
        return sums[: len(told)]


def check_finite(cost: Cost, *, place: str) -> None:
    """Stop before an update that would spoil the weights.

    Args:
        place: entry, epoch, update and rows, for the message.

    Raises:
        ValueError: naming the place, and saying what to try.
    """
    if not math.isfinite(cost.nll) or not math.isfinite(cost.grad_norm):
        raise ValueError(
            f"{place}: loss {cost.loss:g}, gradient norm {cost.grad_norm:g}, wanted finite numbers; nothing was updated"
            " and the last good state is kept. Try a lower lr, more train.warmup_updates, a train.max_grad_norm, or"
            " precision fp32"
        )
