"""Linear layers over the passes of one batch: each weight's gradient is formed once.

Passes of one column hold few rows. Forming a weight's gradient from each of them reads and writes the whole gradient
every time, and that memory traffic, not arithmetic, is what thoughts would cost. Here a linear layer keeps the inputs
and output gradients of its passes, and multiplies them once:

    forward    weight -> gate -> pass 1, pass 2, ..., pass n
    backward   pass n, ..., pass 2, pass 1 (each keeps its x and dy) -> gate: dW = cat(dy)^T cat(x) -> weight

The gate is an ordinary node of the autograd graph that runs after all passes, so `backward`, `autograd.grad`, hooks,
tied and frozen weights, and accumulation work as usual.

Legend: R rows (every column of every row of the batch), I inputs, O outputs.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coconut.model.fast.backward import Backward, once
from coconut.model.fast.products import linear, prefers_onednn
from coconut.model.fast.thresholds import Thresholds


class GatedLinear:
    """Stands in for the `forward` of one `nn.Linear` or `Conv1D` during one batch.

    Args:
        max_kept: elements of inputs and output gradients that may be kept; None: no bound.
        conversion: of inputs, which the layers of a model share; one of its own if None.
    """

    def __init__(
        self, module: Any, max_kept: int | None, thresholds: Thresholds, conversion: "Conversion | None" = None
    ) -> None:
        self.module, self.conversion = module, conversion or Conversion()
        self.weight: Tensor = module.weight
        self.bias: nn.Parameter | None = module.bias
        self.factors = Factors(
            is_conv1d=type(module) is Conv1D,
            has_gate=self.weight.numel() >= thresholds.min_weight_elements,
            max_kept=max_kept,
            min_multiplications=thresholds.min_multiplications,
        )
        self.gated: dict[torch.dtype, tuple[Tensor, Tensor | None, Gated]] = {}
        self.converted: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, input: Tensor) -> Tensor:
        """Multiply, leaving the weight's gradient to the gate where there is one."""
        factors, input = self.factors, self.conversion.of(input)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            weight, bias = self._read_only(input.dtype)
            return factors.linear(input, factors.oriented(weight), bias)
        if not factors.has_gate:
            num_outputs = self.weight.numel() // input.shape[-1]
            if not prefers_onednn(input, num_outputs, factors.min_multiplications):
                return cast(Tensor, type(self.module).forward(self.module, input))
            return cast(Tensor, _Product.apply(input, self.weight, self.bias, Gated(self.weight, factors)))  # type: ignore[no-untyped-call]
        output: Tensor = _Product.apply(input, *self.gate(input.dtype))  # type: ignore[no-untyped-call]
        return output

    def _read_only(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias as passes without gradients see them, converted once for all passes of the batch.

        Autocast converts once too, but not what it sees as a view, such as the weight of a Conv1D in our orientation.
        """
        if self.weight.dtype == dtype:
            return self.weight, self.bias
        if dtype not in self.converted:
            self.converted[dtype] = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        return self.converted[dtype]

    def gate(self, dtype: torch.dtype) -> "tuple[Tensor, Tensor | None, Gated]":
        """Return weight and bias as passes in this precision see them, and what they share."""
        if dtype not in self.gated:
            weight, bias = _Gate.apply(self.weight, self.bias, self.factors, dtype)  # type: ignore[no-untyped-call]
            self.gated[dtype] = weight, bias, Gated(weight, self.factors)
        return self.gated[dtype]


class Conversion:
    """Converts what layers read to the precision of their products.

    Query, key and value read one input, and so do gate and up: it is converted once for all of them, and their
    gradients are converted back once.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Let go of the last input, and of the graph that leads to it."""
        self._state: tuple[Any, ...] = ()
        self._input: Tensor | None = None
        self._converted: Tensor | None = None

    def of(self, input: Tensor) -> Tensor:
        """Return the input in the precision of a product with it."""
        dtype = autocast_dtype(input)
        if input.dtype == dtype:
            return input
        # What was written to since, or was converted without a graph, is not the same input.
        state = (dtype, torch.is_grad_enabled(), None if input.is_inference() else input._version)
        if self._converted is None or self._input is not input or self._state != state:
            self._state, self._input, self._converted = state, input, input.to(dtype)
        return self._converted


def autocast_dtype(input: Tensor) -> torch.dtype:
    """Return the precision in which a product with this input is computed."""
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype


@dataclass
class Factors:
    """The inputs and output gradients that the passes of one layer leave for the gate during one backward pass."""

    is_conv1d: bool
    """Whether the weight is I x O, as in GPT-2, and not O x I."""
    has_gate: bool
    max_kept: int | None
    """Elements of inputs and output gradients that may be kept; None: no bound."""
    min_multiplications: int
    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    formed: tuple[Tensor, Tensor] | None = None
    """Gradients of weight and bias from passes whose factors were too large to keep."""
    backward: Backward = field(default_factory=Backward)

    def oriented(self, weight: Tensor) -> Tensor:
        """Return the weight as O x I."""
        return weight.t() if self.is_conv1d else weight

    def linear(self, input: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Multiply through the fastest library; see `products.linear`."""
        return linear(input, weight_OI, bias_O, min_multiplications=self.min_multiplications)

    def add(self, input_RI: Tensor, gradient_RO: Tensor) -> None:
        """Take a pass's share of the gradient, as its two factors, without the graph that leads to them."""
        # A backward pass that reached the passes but not the gate has left its factors behind.
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
        self.inputs.append(input_RI)
        self.gradients.append(gradient_RO)

    def form(self) -> None:
        """Multiply what is kept."""
        if not self.inputs:
            return
        input_RI = _joined(self.inputs, is_first=self.is_conv1d)
        gradient_RO = _joined(self.gradients, is_first=not self.is_conv1d)
        # They are released first: there may be no room for them and for their product.
        self.inputs, self.gradients = [], []
        self.formed = self.multiplied(input_RI, gradient_RO, self.formed)

    def multiplied(
        self, input_RI: Tensor, gradient_RO: Tensor, others: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of weight and bias, added in place to `others`."""
        first, second = (input_RI, gradient_RO) if self.is_conv1d else (gradient_RO, input_RI)
        bias = gradient_RO.sum(dim=0)
        if others is None:
            return self.linear(first.t(), second.t()), bias
        # The gradient of a head is too large to allocate a second one.
        return others[0].addmm_(first.t(), second), others[1].add_(bias)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Return the gradients of weight and bias over all passes of this backward pass, and forget them."""
        self.form()
        formed, self.formed = self.formed, None
        return formed


def _joined(parts: list[Tensor], *, is_first: bool) -> Tensor:
    """Put the rows of passes below each other.

    Args:
        is_first: whether it becomes the product's first factor, which is read transposed: it is written so at once.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.t() for part in parts], dim=1).t() if is_first else torch.cat(parts)


class Gated:
    """What the passes of one layer share: its weight in both orientations, without a graph, and its factors."""

    def __init__(self, weight: Tensor, factors: Factors) -> None:
        self.factors = factors
        self.weight_OI = factors.oriented(weight.detach())
        self.weight_IO = self.weight_OI.t()


class _Gate(torch.autograd.Function):
    """Weight and bias as the passes see them; backward turns the kept factors into their gradients."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, factors: Factors, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.factors, ctx.dtype = factors, weight.dtype
        # A tensor of its own: an input that is returned as it is would bypass this node.
        return _converted(weight, dtype), None if bias is None else _converted(bias, dtype)

    @staticmethod
    @once
    def backward(
        ctx: Any, weight_gradient: None, bias_gradient: None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        del weight_gradient, bias_gradient  # The passes have left theirs in the factors.
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
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, gated: Gated) -> Tensor:
        ctx.gated = gated
        ctx.save_for_backward(input, weight)  # The weight, so that a change of it is noticed.
        # All dimensions at once: torch folds them in a fraction of the time that it takes from here. And not a view:
        # some models write into the output of a linear layer, which autograd forbids for views.
        return gated.factors.linear(input, gated.weight_OI, bias).data

    @staticmethod
    @once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input, _ = ctx.saved_tensors
        factors: Factors = ctx.gated.factors
        input_gradient = factors.linear(gradient, ctx.gated.weight_IO) if ctx.needs_input_grad[0] else None
        input_RI, gradient_RO = (part.reshape(-1, part.shape[-1]) for part in (input.detach(), gradient))
        if factors.has_gate:
            factors.add(input_RI, gradient_RO)
            return input_gradient, None, None, None
        weight_gradient, bias_gradient = factors.multiplied(input_RI, gradient_RO)
        return input_gradient, weight_gradient, bias_gradient if ctx.needs_input_grad[2] else None, None
