"""Embeddings that share their weight with the output head: one gradient of V x D stands for both.

Autograd would make one gradient for each use and a sum: at V = 151,936 that is half a gigabyte for each 896 of D.
Here the looked-up rows wait, and are added in place to the gradient that the head's gate has formed.

Legend: N looked-up ids, U distinct ids, V vocabulary, D hidden.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from coconut.model.batch import Batch
from coconut.model.fast.backward import Backward, once
from coconut.model.fast.gates import GatedLinear, autocast_dtype


def is_tied(embeddings: nn.Module, head: GatedLinear) -> bool:
    """Say whether these are a head and plain embeddings that share one weight which is large enough for a gate."""
    return (
        type(embeddings) is nn.Embedding
        and "forward" not in embeddings.__dict__
        and embeddings.weight is head.weight
        and head.factors.has_gate
        and not head.factors.is_conv1d
        and embeddings.max_norm is None
        and not embeddings.scale_grad_by_freq
        and not embeddings.sparse
    )


class TiedEmbeddings:
    """Stands in for the `forward` of the embeddings during one batch."""

    def __init__(self, module: nn.Embedding, head: GatedLinear, batch: Batch | None) -> None:
        self.module, self.head, self.batch = module, head, batch
        self.rows = Rows(module.padding_idx)
        self.shared: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Look the ids up, leaving the weight's gradient to the gate."""
        if not (torch.is_grad_enabled() and self.module.weight.requires_grad):
            return nn.Embedding.forward(self.module, ids)
        if self.shared is None:
            self.shared = _TiedGate.apply(self.module.weight, self.rows)  # type: ignore[no-untyped-call]
            # The head's gate is made now, before the passes: autograd runs older nodes later, and until then the
            # head's factors take less room than its gradient.
            self.head.weight = self.shared
            self.head.gate(autocast_dtype(self.shared))
        # Repeated ids are found on the CPU where the batch has them there, so that no accelerator is waited for.
        batch = self.batch
        host_ids = batch.host.input_ids_BT if batch is not None and ids is batch.input_ids_BT else ids
        looked_up: Tensor = _Lookup.apply(ids, self.shared, self.rows, host_ids)  # type: ignore[no-untyped-call]
        return looked_up


@dataclass
class Rows:
    """Gradients of the embeddings that were looked up, kept for the gate during one backward pass."""

    padding_idx: int | None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    backward: Backward = field(default_factory=Backward)

    def add(self, ids: Tensor, host_ids: Tensor, gradient: Tensor) -> None:
        """Keep the gradients of these embeddings, ... x D.

        Args:
            host_ids: the same ids, on the CPU where that costs no waiting.
        """
        # A backward pass that failed between the lookup and the gate has left its rows behind.
        if self.backward.is_another():
            self.kept = []
        if self.padding_idx is not None:
            gradient = gradient.masked_fill((ids == self.padding_idx)[..., None], 0)
        self.kept.append((host_ids.flatten(), gradient.flatten(0, -2).detach()))

    def add_to(self, gradient_VD: Tensor) -> None:
        """Add what was kept to the gradient of all embeddings, and forget it."""
        kept, self.kept = self.kept, []
        for ids_N, rows_ND in kept:
            # Repeated ids are first summed into one row each, by the operation that torch's own embeddings use:
            # `index_add_` on several threads would sum them in an order that changes from run to run.
            ids_U, places_N = (part.to(rows_ND.device, non_blocking=True) for part in ids_N.unique(return_inverse=True))
            wide = torch.promote_types(rows_ND.dtype, torch.float32)
            rows_UD = torch.ops.aten.embedding_dense_backward(rows_ND.to(wide), places_N, len(ids_U), -1, False)
            gradient_VD.index_add_(0, ids_U, rows_UD.to(gradient_VD.dtype))


class _TiedGate(torch.autograd.Function):
    """The weight as embeddings and head see it; backward adds the embeddings' rows to the head's gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return weight.view_as(weight)

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # In place: nobody else holds the gradient, which the head's gate has just formed.
        ctx.rows.add_to(gradient)
        return gradient, None


class _Lookup(torch.autograd.Function):
    """Embeddings whose backward leaves the weight's gradient to the gate."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, rows: Rows, host_ids: Tensor) -> Tensor:
        ctx.rows, ctx.host_ids = rows, host_ids
        ctx.save_for_backward(ids)
        return functional.embedding(ids, weight)

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.rows.add(ids, ctx.host_ids, gradient)
        return None, None, None, None
