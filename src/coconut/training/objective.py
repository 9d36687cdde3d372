"""The gradient of one update: the mean loss over every supervised token of all its micro-batches and processes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut.data.collator import collate
from coconut.data.views import View
from coconut.devices import is_out_of_memory
from coconut.model.dropout import draw_keys, has_dropout
from coconut.model.feedback import Feedback
from coconut.model.latent import latent_nll
from coconut.model.passes import PassOptions


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
    num_oom_retries: int = 0

    def __post_init__(self) -> None:
        self._has_dropout = has_dropout(self.model)

    def accumulate(self, views: Sequence[View], parameters: Mapping[str, nn.Parameter]) -> Cost:
        """Set `.grad` to the gradient of the mean loss over the views, and say what they cost.

        Every process is given all views and takes its share of them. On out-of-memory the
        micro-batch is halved and the same update is done again, so the result differs by rounding only.
        Dropout's masks belong to the row's place in the update, and come from torch's generator on the CPU,
        which must be in the same state in every process.
        """
        num_tokens = sum(view.num_supervised for view in views)
        keys = draw_keys(len(views)) if self._has_dropout else None
        own = range(len(views))[self.accelerator.process_index :: self.accelerator.num_processes]
        while True:
            try:
                sums = self._accumulate_own(views, own, keys, num_tokens)
                break
            except RuntimeError as error:
                if self.micro_batch == 1 or not is_out_of_memory(error):
                    raise
            # Outside the except block: there, the traceback would keep the failed pass's tensors alive.
            self._halve(min(self.micro_batch, len(own)))
        self._sum_over_processes(parameters, sums)
        nll, num_columns, num_padding, num_latents = sums.tolist()
        return Cost(nll, num_tokens, int(num_columns), int(num_padding), int(num_latents))

    def _accumulate_own(
        self, views: Sequence[View], rows: Sequence[int], keys: Tensor | None, num_tokens: int
    ) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        self.feedback.zero_grad(set_to_none=True)
        device = self.accelerator.device
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        # Rows of similar length share a micro-batch, so that little is padded; the update is the same.
        ordered = sorted(rows, key=lambda row: len(views[row].input_ids))
        for start in range(0, len(ordered), self.micro_batch):
            taken = ordered[start : start + self.micro_batch]
            batch = collate([views[row] for row in taken], pad_id=self.pad_id)
            counts = (batch.num_columns, int((batch.attention_mask_BT == 0).sum()), int(batch.is_latent_BT.sum()))
            with self.accelerator.autocast():
                keys_B = None if keys is None else keys[taken]
                nll, _ = latent_nll(self.model, self.feedback, batch.to(device), self.options, keys_B=keys_B)
            self.accelerator.backward(nll / max(1, num_tokens))
            sums += torch.tensor([0.0, *counts], dtype=torch.float64, device=device)
            sums[0] += nll.detach()
        return sums

    def _halve(self, num_rows: int) -> None:
        self.micro_batch = max(1, num_rows // 2)
        self.num_oom_retries += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory with {} rows; redoing the update with {} at a time", num_rows, self.micro_batch)

    def _sum_over_processes(self, parameters: Mapping[str, nn.Parameter], sums: Tensor) -> None:
        """Add up what the processes hold; in one process there is nothing to add.

        A parameter that no process's rows reach keeps no gradient, as in one process: AdamW would decay it
        for a gradient of zeros.
        """
        if self.accelerator.num_processes == 1:
            return
        reached = [float(parameter.grad is not None) for parameter in parameters.values()]
        totals = self.accelerator.reduce(torch.cat([sums, sums.new_tensor(reached)]), reduction="sum")
        sums.copy_(totals[: len(sums)])
        for parameter, num_reached in zip(parameters.values(), totals[len(sums) :].tolist(), strict=True):
            if num_reached:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="sum")


def check_finite(cost: Cost, grad_norm: float, *, place: str) -> None:
    """Stop before an update that would spoil the weights.

    Args:
        place: entry, epoch, update and rows, for the message.

    Raises:
        ValueError: naming the place, and saying what to try.
    """
    if not math.isfinite(cost.nll) or not math.isfinite(grad_norm):
        raise ValueError(
            f"{place}: loss {cost.loss:g}, gradient norm {grad_norm:g}, wanted finite numbers; nothing was updated and"
            " the last good state is kept. Try a lower lr, more train.warmup_updates, a train.max_grad_norm, or"
            " precision fp32"
        )
