"""A model's layers as they run over the passes of one batch: the same numbers, less work.

Legend: R rows (every column of every row of the batch), I inputs, O outputs.

Passes of one column hold few rows. Forming a weight's gradient from each of them reads and writes
the whole gradient every time, and that memory traffic, not arithmetic, is what thoughts would cost.
Here a linear layer keeps the inputs and output gradients of its passes, and multiplies them once:

    forward    weight -> gate -> pass 1, pass 2, ..., pass n
    backward   pass n, ..., pass 2, pass 1 (each keeps its x and dy) -> gate: dW = cat(dy)^T cat(x) -> weight

The gate is an ordinary node of the autograd graph that runs when all passes have, so `backward`,
`autograd.grad`, hooks, tied and frozen weights, and accumulation work as ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from coconut.model.products import linear, prefers_onednn

MIN_WEIGHT_ELEMENTS = 1 << 16
"""Smaller weights stay in the processor's cache: their gradients cost less than keeping factors of them."""


class BatchLayers:
    """The layers of one model during one batch: `with layers.active():` around each pass.

    Args:
        max_kept_rows: passes with more rows form their share of a weight's gradient at once, which
            keeps less in memory. None: no pass does.
    """

    def __init__(self, model: PreTrainedModel, *, max_kept_rows: int | None = None) -> None:
        head = model.get_output_embeddings()
        self.forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        for module in model.modules():
            if "forward" in module.__dict__:
                continue  # Somebody else has replaced it already, and means it.
            if type(module) is NewGELUActivation:
                self.forwards.append((module, fused_gelu))
            elif type(module) in (nn.Linear, Conv1D):
                limit = 0 if module is head else max_kept_rows
                self.forwards.append((module, _Linear(module, limit)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the model's layers this way until the block ends."""
        try:
            for module, forward in self.forwards:
                module.forward = forward
            yield
        finally:
            for module, _ in self.forwards:
                module.__dict__.pop("forward", None)


def fused_gelu(input: Tensor) -> Tensor:
    """GPT-2's activation as one operation instead of eight; it keeps one tensor instead of five."""
    return functional.gelu(input, approximate="tanh")


class _Linear:
    """One linear layer during one batch."""

    def __init__(self, module: Any, max_kept_rows: int | None) -> None:
        self.module = module
        self.weight: nn.Parameter = module.weight
        self.bias: nn.Parameter | None = module.bias
        self.factors = _Factors(
            is_conv1d=type(module) is Conv1D,
            max_rows=max_kept_rows,
            has_gate=self.weight.numel() >= MIN_WEIGHT_ELEMENTS,
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
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        if input.dtype not in self.gated:
            self.gated[input.dtype] = _Gate.apply(self.weight, self.bias, self.factors, input.dtype)  # type: ignore[no-untyped-call]
        output: Tensor = _Product.apply(input, *self.gated[input.dtype], self.factors)  # type: ignore[no-untyped-call]
        return output


@dataclass
class _Factors:
    """What the passes of one layer leave for the gate during one backward."""

    is_conv1d: bool
    """Whether the weight is I x O, as in GPT-2, and not O x I."""
    max_rows: int | None
    has_gate: bool
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    backward_id: int = -1

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight as O x I."""
        return weight.t() if self.is_conv1d else weight

    def keep(self, input_RI: Tensor, gradient_RO: Tensor) -> bool:
        """Keep a pass's share of the gradient as its two factors; False if it has too many rows."""
        if not self.has_gate or (self.max_rows is not None and len(input_RI) > self.max_rows):
            return False
        # A backward that reached the passes but not the gate has left its factors behind.
        backward_id = torch._C._current_graph_task_id()
        if backward_id != self.backward_id:
            self.inputs, self.gradients, self.backward_id = [], [], backward_id
        # Detached: what is kept must not keep the graph that leads to it.
        self.inputs.append(input_RI.detach())
        self.gradients.append(gradient_RO.detach())
        return True

    def multiplied(self, input_RI: Tensor, gradient_RO: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias."""
        first, second = (input_RI, gradient_RO) if self.is_conv1d else (gradient_RO, input_RI)
        return linear(first.t(), second.t()), gradient_RO.sum(dim=0)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Gradients of weight and bias from all that was kept, which is forgotten."""
        if not self.inputs:
            return None
        inputs, gradients = self.inputs, self.gradients
        self.inputs, self.gradients = [], []
        if len(inputs) == 1:
            return self.multiplied(inputs[0], gradients[0])
        input_RI = torch.cat(inputs)
        inputs.clear()
        return self.multiplied(input_RI, torch.cat(gradients))


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
        ctx: Any, weight_gradient: Tensor | None, bias_gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        kept = ctx.factors.take()
        gradients = [weight_gradient, bias_gradient]
        if kept is not None:
            gradients = [b if a is None else a + b for a, b in zip(gradients, kept, strict=True)]
        weight, bias = (
            gradient.to(ctx.dtype) if gradient is not None and is_needed else None
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
        if ctx.factors.keep(input_RI, gradient_RO):
            return input_gradient, None, None, None
        weight_gradient, bias_gradient = ctx.factors.multiplied(input_RI, gradient_RO)
        return input_gradient, weight_gradient, bias_gradient if ctx.needs_input_grad[2] else None, None
