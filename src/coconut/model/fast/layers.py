"""A model's layers as they run over the passes of one batch: the same numbers, less work.

Legend: R rows (every column of every row of the batch), I inputs, O outputs.

Passes of one column hold few rows. Forming a weight's gradient from each of them reads and writes
the whole gradient every time, and that memory traffic, not arithmetic, is what thoughts would cost.
Here a linear layer keeps the inputs and output gradients of its passes, and multiplies them once:

    forward    weight -> gate -> pass 1, pass 2, ..., pass n
    backward   pass n, ..., pass 2, pass 1 (each keeps its x and dy) -> gate: dW = cat(dy)^T cat(x) -> weight

The gate is an ordinary node of the autograd graph that runs when all passes have, so `backward`,
`autograd.grad`, hooks, tied and frozen weights, and accumulation work as ever.

Where the head is tied to the embeddings, one gradient of V x D stands for both from the start. Autograd
would make one of each and add them up: at V = 151,936 that is half a gigabyte for each 896 of D.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from coconut.model.fast.backward import Backward
from coconut.model.fast.products import linear, prefers_onednn

MAX_KEPT_OF_HEAD = 9 << 23
"""Elements of the factors of the head, whose output gradients are larger than all other activations: two chunks
of the loss."""
MIN_WEIGHT_ELEMENTS = 1 << 16
"""Smaller weights stay in the processor's cache: their gradients cost less than keeping factors of them."""


class BatchLayers:
    """The layers of one model during one batch: `with layers.active():` around each pass.

    Args:
        saves_memory: keep no more of a weight's gradient, as inputs and output gradients, than the gradient
            itself would take. Without checkpoints these are there anyway, as activations.
    """

    def __init__(self, model: PreTrainedModel, *, saves_memory: bool = False) -> None:
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        self.is_active = False
        self.blocks = [
            module
            for module in model.modules()
            if isinstance(module, GradientCheckpointingLayer) and "forward" not in module.__dict__
        ]
        self.forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        for module in model.modules():
            if "forward" in module.__dict__:
                continue  # Somebody else has replaced it already, and means it.
            if type(module) is NewGELUActivation:
                self.forwards.append((module, fused_gelu))
            elif type(module) in (nn.Linear, Conv1D):
                max_kept = module.weight.numel() if saves_memory else None
                if module is head:
                    max_kept = min(module.weight.numel(), MAX_KEPT_OF_HEAD)
                linear_layer = _Linear(module, max_kept)
                self.forwards.append((module, linear_layer))
                if module is head and _is_tied(embeddings, linear_layer):
                    self.forwards.append((embeddings, _TiedEmbeddings(embeddings, linear_layer)))

    @contextmanager
    def active(self, recompute_in: Callable[[], AbstractContextManager[None]] | None = None) -> Iterator[None]:
        """Run the model's layers this way until the block ends.

        Args:
            recompute_in: keep only what enters each of the decoder's layers, and run the layer again in the
                backward pass, in the context that this makes.
        """
        forwards = list(self.forwards)
        if recompute_in is not None:
            forwards += [(block, self._checkpointed(block, recompute_in)) for block in self.blocks]
        self.is_active = True
        try:
            with _replaced(forwards):
                yield
        finally:
            self.is_active = False

    def _checkpointed(
        self, block: nn.Module, recompute_in: Callable[[], AbstractContextManager[None]]
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                if not self.is_active:  # In the backward pass.
                    inside = set(block.modules())
                    stack.enter_context(_replaced([pair for pair in self.forwards if pair[0] in inside]))
                    stack.enter_context(recompute_in())
                # The class's own: the block's is the one that is made here.
                return type(block).forward(block, *args, **kwargs)

        return partial(checkpoint, run, use_reentrant=False)


@contextmanager
def _replaced(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, _ in forwards:
            module.__dict__.pop("forward", None)


def fused_gelu(input: Tensor) -> Tensor:
    """GPT-2's activation as one operation instead of eight; it keeps one tensor instead of five."""
    return functional.gelu(input, approximate="tanh")


class _Linear:
    """One linear layer during one batch."""

    def __init__(self, module: Any, max_kept: int | None) -> None:
        self.module = module
        self.weight: Tensor = module.weight
        self.bias: nn.Parameter | None = module.bias
        self.factors = _Factors(
            is_conv1d=type(module) is Conv1D,
            has_gate=self.weight.numel() >= MIN_WEIGHT_ELEMENTS,
            max_kept=max_kept,
        )
        self.gated: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, input: Tensor) -> Tensor:
        """Stand in for the module's `forward`."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return linear(input, self.factors.oriented(self.weight), self.bias)
        if not self.factors.has_gate:
            if not prefers_onednn(input, self.weight.numel() // input.shape[-1]):
                return cast(Tensor, type(self.module).forward(self.module, input))
            return cast(Tensor, _Product.apply(input, self.weight, self.bias, self.factors))  # type: ignore[no-untyped-call]
        input = input.to(_autocast_dtype(input))
        output: Tensor = _Product.apply(input, *self.gate(input.dtype), self.factors)  # type: ignore[no-untyped-call]
        return output

    def gate(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, as passes in this precision see them."""
        if dtype not in self.gated:
            self.gated[dtype] = _Gate.apply(self.weight, self.bias, self.factors, dtype)  # type: ignore[no-untyped-call]
        return self.gated[dtype]


def _autocast_dtype(input: Tensor) -> torch.dtype:
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


def _is_tied(embeddings: nn.Module, head: _Linear) -> bool:
    """Whether these are a head and plain embeddings that share one weight, large enough to care."""
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


class _TiedEmbeddings:
    """Embeddings during one batch, whose gradient is added to that of the head, which has the same weight."""

    def __init__(self, module: nn.Embedding, head: _Linear) -> None:
        self.module, self.head = module, head
        self.rows = _Rows(module.padding_idx)
        self.shared: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Stand in for the module's `forward`."""
        if not (torch.is_grad_enabled() and self.module.weight.requires_grad):
            return nn.Embedding.forward(self.module, ids)
        if self.shared is None:
            self.shared = _TiedGate.apply(self.module.weight, self.rows)  # type: ignore[no-untyped-call]
            # Now, before the passes: autograd runs what is older later, and until then the head's factors
            # take less room than its gradient.
            self.head.weight = self.shared
            self.head.gate(_autocast_dtype(self.shared))
        looked_up: Tensor = _Lookup.apply(ids, self.shared, self.rows)  # type: ignore[no-untyped-call]
        return looked_up


@dataclass
class _Factors:
    """What the passes of one layer leave for the gate during one backward."""

    is_conv1d: bool
    """Whether the weight is I x O, as in GPT-2, and not O x I."""
    has_gate: bool
    max_kept: int | None
    """Elements of inputs and output gradients to be kept at most; None: no bound."""
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    formed: tuple[Tensor, Tensor] | None = None
    """Gradients of weight and bias by passes whose factors were too much to keep."""
    backward: Backward = field(default_factory=Backward)

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight as O x I."""
        return weight.t() if self.is_conv1d else weight

    def add(self, input_RI: Tensor, gradient_RO: Tensor) -> None:
        """Take a pass's share of the gradient, as its two factors."""
        # A backward that reached the passes but not the gate has left its factors behind.
        if self.backward.is_another():
            self.inputs, self.gradients, self.formed = [], [], None
        if self.max_kept is not None:
            num_new, num_kept = (
                sum(map(torch.numel, parts)) for parts in ((input_RI, gradient_RO), (*self.inputs, *self.gradients))
            )
            if num_new + num_kept > self.max_kept:
                self.form()
            if num_new > self.max_kept:
                self.formed = self.multiplied(input_RI, gradient_RO, self.formed)
                return
        # Detached: what is kept must not keep the graph that leads to it.
        self.inputs.append(input_RI.detach())
        self.gradients.append(gradient_RO.detach())

    def form(self) -> None:
        """Multiply what is kept."""
        if not self.inputs:
            return
        input_RI, gradient_RO = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (self.inputs, self.gradients)
        )
        # They go first: beside what they become there may be no room for them.
        self.inputs, self.gradients = [], []
        self.formed = self.multiplied(input_RI, gradient_RO, self.formed)

    def multiplied(
        self, input_RI: Tensor, gradient_RO: Tensor, others: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias, added in place to those of others."""
        first, second = (input_RI, gradient_RO) if self.is_conv1d else (gradient_RO, input_RI)
        bias = gradient_RO.sum(dim=0)
        if others is None:
            return linear(first.t(), second.t()), bias
        # A head's gradient is too large to have a second one beside it.
        return others[0].addmm_(first.t(), second), others[1].add_(bias)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Gradients of weight and bias by all passes of this backward, which are forgotten."""
        self.form()
        formed, self.formed = self.formed, None
        return formed


@dataclass
class _Rows:
    """Gradients of the embeddings that were looked up, for the gate during one backward."""

    padding_idx: int | None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    backward: Backward = field(default_factory=Backward)

    def add(self, ids: Tensor, gradient: Tensor) -> None:
        """Keep the gradients of these embeddings, ... x D."""
        # A backward that failed between the lookup and the gate has left its rows behind.
        if self.backward.is_another():
            self.kept = []
        if self.padding_idx is not None:
            gradient = gradient.masked_fill((ids == self.padding_idx)[..., None], 0)
        self.kept.append((ids.flatten(), gradient.flatten(0, -2).detach()))

    def add_to(self, gradient_VD: Tensor) -> None:
        """Add what was kept to the gradient of all embeddings, and forget it."""
        kept, self.kept = self.kept, []
        for ids_N, rows_ND in kept:
            # Repeated ids first become one row each, by the operation that torch's own embeddings have: adding
            # them one by one on several threads would give another last digit every time.
            ids_U, places_N = ids_N.unique(return_inverse=True)
            wide = torch.promote_types(rows_ND.dtype, torch.float32)
            rows_UD = torch.ops.aten.embedding_dense_backward(rows_ND.to(wide), places_N, len(ids_U), -1, False)
            gradient_VD.index_add_(0, ids_U, rows_UD.to(gradient_VD.dtype))


class _TiedGate(torch.autograd.Function):
    """The weight, as embeddings and head see it; backward adds the rows of the one to the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # In place: nobody else holds the gradient, which the head's gate has just formed.
        ctx.rows.add_to(gradient)
        return gradient, None


class _Lookup(torch.autograd.Function):
    """Embeddings whose backward leaves the weight's gradient to the gate."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(ids)
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.rows.add(ids, gradient)
        return None, None, None


class _Gate(torch.autograd.Function):
    """Weight and bias, as the passes see them; backward turns what they have kept into the gradients."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, factors: _Factors, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.factors, ctx.dtype = factors, weight.dtype
        # A tensor of its own: an input that is returned as it is would bypass this node.
        return _converted(weight, dtype), None if bias is None else _converted(bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, weight_gradient: None, bias_gradient: None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        del weight_gradient, bias_gradient  # The passes have left theirs elsewhere.
        gradients = ctx.factors.take()
        if gradients is None:
            return None, None, None, None
        weight, bias = (
            gradient.to(ctx.dtype) if is_needed else None
            for gradient, is_needed in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return weight, bias, None, None


def _converted(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parameter.view_as(parameter) if parameter.dtype == dtype else parameter.to(dtype)


class _Product(torch.autograd.Function):
    """A linear layer whose backward leaves the weight's gradient to the gate."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, factors: _Factors) -> Tensor:
        ctx.factors, ctx.shape = factors, input.shape
        input_RI = input.reshape(-1, input.shape[-1])
        ctx.save_for_backward(input_RI, weight)
        return linear(input_RI, factors.oriented(weight), bias).view(*input.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input_RI, weight = ctx.saved_tensors
        gradient_RO = gradient.reshape(-1, gradient.shape[-1])
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = linear(gradient_RO, ctx.factors.oriented(weight).t()).view(ctx.shape)
        if ctx.factors.has_gate:
            ctx.factors.add(input_RI, gradient_RO)
            return input_gradient, None, None, None
        weight_gradient, bias_gradient = ctx.factors.multiplied(input_RI, gradient_RO)
        return input_gradient, weight_gradient, bias_gradient if ctx.needs_input_grad[2] else None, None
