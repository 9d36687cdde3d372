"""The gradient of one update: the mean loss over every supervised token of all its micro-batches and processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut.data.collator import collate
from coconut.data.views import View
from coconut.model.feedback import Feedback
from coconut.model.latent import latent_nll


@dataclass
class Cost:
    """What an update was made of. Counts are over all processes."""

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
    num_oom_retries: int = 0
    checkpoint_activations: bool = False

    def accumulate(self, views: Sequence[View], parameters: Mapping[str, nn.Parameter]) -> Cost:
        """Set `.grad` to the gradient of the mean loss over the views, and say what they cost.

        Every process is given all views and takes its share of them. On out-of-memory the
        micro-batch is halved and the same update is done again, so the result differs by rounding only.
        """
        num_tokens = sum(view.num_supervised for view in views)
        own = views[self.accelerator.process_index :: self.accelerator.num_processes]
        while True:
            try:
                sums = self._accumulate_own(own, num_tokens)
                break
            except RuntimeError as error:
                if self.micro_batch == 1 or not should_reduce_batch_size(error):
                    raise
            # Outside the except block: there, the traceback would keep the failed pass's tensors alive.
            self._halve(min(self.micro_batch, len(own)))
        self._sum_over_processes(parameters, sums)
        nll, num_columns, num_padding, num_latents = sums.tolist()
        return Cost(nll, num_tokens, int(num_columns), int(num_padding), int(num_latents))

    def _accumulate_own(self, views: Sequence[View], num_tokens: int) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        self.feedback.zero_grad(set_to_none=True)
        device = self.accelerator.device
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        # Rows of similar length share a micro-batch, so that little is padded; the update is the same.
        ordered = sorted(views, key=lambda view: len(view.input_ids))
        for start in range(0, len(ordered), self.micro_batch):
            batch = collate(ordered[start : start + self.micro_batch], pad_id=self.pad_id)
            counts = (batch.num_columns, int((batch.attention_mask_BT == 0).sum()), int(batch.is_latent_BT.sum()))
            with self.accelerator.autocast():
                nll, _ = latent_nll(
                    self.model,
                    self.feedback,
                    **batch.to(device)._asdict(),
                    checkpoint_activations=self.checkpoint_activations,
                )
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
        """Add up what the processes hold; in one process there is nothing to add."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in parameters.values():
            # A process whose rows do not reach a parameter still takes part in the sum.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
        sums.copy_(self.accelerator.reduce(sums, reduction="sum"))


def check_finite(
    cost: Cost, grad_norm: float, *, entry_name: str, epoch: int, update: int, rows: Sequence[int]
) -> None:
    """Stop before an update that would spoil the weights.

    Raises:
        ValueError: naming epoch, update and rows, and saying what to try.
    """
    if torch.isfinite(torch.tensor([cost.nll, grad_norm])).all():
        return
    shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
    raise ValueError(
        f"curriculum.{entry_name}: loss {cost.loss:g}, gradient norm {grad_norm:g} in epoch {epoch + 1}, update"
        f" {update + 1}, rows {shown}; wanted finite numbers. Nothing was updated, the last good state is kept;"
        " try a lower lr, more train.warmup_updates, a train.max_grad_norm, or precision fp32"
    )
