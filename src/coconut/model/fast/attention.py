"""Attention over the key-value store of one layer, with gradients that pass from later passes to earlier ones.

Legend: B rows, T columns, S columns of one pass, C columns there is room for, H heads, K heads of keys and values,
G = H / K, A = B K, d width of a head.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coconut.model.fast.backward import Backward, once
from coconut.model.fast.thresholds import Thresholds

Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of the gradients that a pass gives to keys and values: its queries, the gradient of its scores, its probabilities,
the gradient of its output; A x GS x ..."""


@dataclass
class Pass:
    """The columns of one pass."""

    start: int
    stop: int
    num_attended: int
    """Columns of the store that attention reads: all up to the last, or more, which hold zeros and are hidden."""

    @property
    def columns(self) -> slice:
        """Select them among all columns."""
        return slice(self.start, self.stop)

    @property
    def num_columns(self) -> int:
        """Count them."""
        return self.stop - self.start


@dataclass
class Link:
    """An autograd edge between consecutive passes of a layer.

    The backward of pass n runs after that of pass n + 1, when all gradients of its keys and values are in.
    """

    end: Tensor | None = None


class LayerColumns:
    """Keys and values of one layer, and their gradients during one backward pass."""

    def __init__(self, key_BKSd: Tensor, value_BKSd: Tensor, *, num_columns: int, thresholds: Thresholds) -> None:
        num_rows, num_heads = key_BKSd.shape[:2]
        # Not filled: a column is written before it is read, or filled with zeros by `write`.
        self.keys_BKCd = key_BKSd.new_empty(num_rows, num_heads, num_columns, key_BKSd.shape[-1])
        self.values_BKCd = value_BKSd.new_empty(num_rows, num_heads, num_columns, value_BKSd.shape[-1])
        self.is_filled = False
        """Whether the columns that are not written yet hold zeros."""
        self.num_queries = 0
        """Per head of keys, over the passes that `attend` has computed."""
        self.min_vectorised_softmax = thresholds.min_vectorised_softmax
        self.gradients = _Gradients()

    def write(self, key_BKSd: Tensor, value_BKSd: Tensor, current: Pass) -> None:
        """Store a pass's keys and values."""
        self.keys_BKCd.narrow(2, current.start, current.num_columns).copy_(key_BKSd)
        self.values_BKCd.narrow(2, current.start, current.num_columns).copy_(value_BKSd)
        if current.num_attended > current.stop and not self.is_filled:
            self.keys_BKCd[:, :, current.stop :].zero_()
            self.values_BKCd[:, :, current.stop :].zero_()
            self.is_filled = True

    def read(self, current: Pass) -> tuple[Tensor, Tensor]:
        """Return keys and values of all columns that a pass reads."""
        return self.keys_BKCd.narrow(2, 0, current.num_attended), self.values_BKCd.narrow(2, 0, current.num_attended)

    def append(self, key_BKSd: Tensor, value_BKSd: Tensor, link: Link, current: Pass) -> tuple[Tensor, Tensor]:
        """Store a pass's keys and values and return all so far."""
        if current.start == 0 and current.stop == self.keys_BKCd.shape[2]:
            return key_BKSd, value_BKSd  # This one pass reads everything.
        if not torch.is_grad_enabled():
            self.write(key_BKSd, value_BKSd, current)
            return self.read(current)
        keys, values, link.end = _Append.apply(key_BKSd, value_BKSd, link.end, self, current)  # type: ignore[no-untyped-call]
        return keys, values

    def attend(
        self,
        query_BHSd: Tensor,
        key_BKSd: Tensor,
        value_BKSd: Tensor,
        link: Link,
        current: Pass,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """Store a pass's keys and values, and attend to all so far, B x S x H x d."""
        if torch.is_grad_enabled():
            out_BHSd, link.end = _Attend.apply(  # type: ignore[no-untyped-call]
                query_BHSd, key_BKSd, value_BKSd, link.end, self, current, mask, scaling, dropout
            )
        else:
            self.write(key_BKSd, value_BKSd, current)
            query, keys, values = self.operands(query_BHSd, current)
            probabilities = self.probabilities(query, keys, mask, scaling).to(values.dtype)
            out_BHSd = torch.bmm(probabilities, values).view(*query_BHSd.shape[:3], -1)
        # As transformers' own attention gives it: some models take views of it.
        out: Tensor = out_BHSd.transpose(1, 2).contiguous()
        return out

    def operands(self, query_BHSd: Tensor, current: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, A x GS x d, and all keys and values that a pass reads, A x T x d."""
        keys, values = (part.flatten(0, 1) for part in self.read(current))
        return query_BHSd.reshape(len(keys), -1, query_BHSd.shape[-1]), keys, values

    def probabilities(self, query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Compute what each column gives to each column, A x GS x T, in float32."""
        if query.dtype == torch.float32:
            beta, offset = (0, query.new_empty(())) if mask is None else (1, mask)
            scores = torch.baddbmm(offset, query, keys.transpose(1, 2), beta=beta, alpha=scaling)
        else:
            scores = torch.bmm(query, keys.transpose(1, 2)).float().mul_(scaling)
            scores = scores if mask is None else scores.add_(mask)
        if scores.shape[-1] >= self.min_vectorised_softmax:
            return torch.softmax(scores, dim=-1)
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
        return weights.div_(weights.sum(dim=-1, keepdim=True))

    def scores_gradient(self, gradient: Tensor, probabilities: Tensor) -> Tensor:
        """Compute the gradient of the scores from that of their softmax."""
        if probabilities.shape[-1] >= self.min_vectorised_softmax:
            return torch._softmax_backward_data(gradient, probabilities, -1, torch.float32)
        weighted = gradient * probabilities
        return weighted.sub_(probabilities * weighted.sum(dim=-1, keepdim=True))


def _alias(part: Tensor) -> Tensor:
    """Return the same memory with a version counter of its own.

    Autograd refuses a backward pass through a saved tensor that was written to since; passes only write columns
    behind those that earlier ones have saved.
    """
    return part.data


class _Gradients:
    """Gradients that the passes of a layer leave in a backward pass for earlier passes, whose columns they read."""

    def __init__(self) -> None:
        self.backward = Backward()
        self.clear()

    def clear(self) -> None:
        self.summed: tuple[Tensor, Tensor] | None = None
        """Of keys and values, B x K x T x d: the sum over the passes that torch's kernel computed. The last of them
        has read most columns, so that there is room for those of the others."""
        self.factors: Factors | None = None
        """Of all other passes, the last one first; allocated with room for those to come."""
        self.num_queries = 0

    def begin(self) -> None:
        """Forget what a backward pass has left that did not reach the first pass."""
        if self.backward.is_another():
            self.clear()

    def add(self, keys_BKTd: Tensor, values_BKTd: Tensor, current: Pass) -> None:
        """Add the gradients of all keys and values that a pass has read."""
        if self.summed is not None:
            for total, part in zip(self.summed, (keys_BKTd, values_BKTd), strict=True):
                total.narrow(2, 0, part.shape[2]).add_(part)
        elif current.start == 0:  # No other pass adds to them.
            self.summed = keys_BKTd, values_BKTd
        else:
            # One column of it is then one piece of memory, as the layers before read it.
            keys, values = (
                part.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
                for part in (keys_BKTd, values_BKTd)
            )
            self.summed = keys, values

    def add_factors(self, factors: Factors, *, num_left: int) -> None:
        """Add the factors of a pass; `num_left` queries are to come in all, with these."""
        num_queries = factors[0].shape[1]
        if num_left == num_queries and self.factors is None:
            self.factors = factors
        elif self.factors is None:
            query, scores, probabilities, out = (
                factor.new_empty(len(factor), num_left, factor.shape[2]) for factor in factors
            )
            self.factors = query, scores, probabilities, out
        if self.factors is not factors:
            for room, factor in zip(self.factors, factors, strict=True):
                room.narrow(1, self.num_queries, num_queries).narrow(2, 0, factor.shape[2]).copy_(factor)
        self.num_queries += num_queries

    def of_pass(self, current: Pass, num_rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Sum the gradients of a pass's keys and values, B x K x S x d, over all passes that have read them."""
        where = 2, current.start, current.num_columns
        keys, values = ([total.narrow(*where)] for total in self.summed) if self.summed else ([], [])
        if self.factors is not None:
            query, scores, probabilities, out = (factor.narrow(1, 0, self.num_queries) for factor in self.factors)
            for parts, seen, given in ((keys, scores, query), (values, probabilities, out)):
                product_ASd = torch.bmm(seen.narrow(*where).transpose(1, 2), given)
                parts.append(product_ASd.view(num_rows, -1, *product_ASd.shape[1:]))
        return reduce(torch.add, keys) if keys else None, reduce(torch.add, values) if values else None


class _Append(torch.autograd.Function):
    """Write the columns of a pass into the store, and return all columns so far."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, link: Tensor | None, layer: LayerColumns, current: Pass
    ) -> tuple[Tensor, Tensor, Tensor]:
        del link
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.current, ctx.num_rows = layer.gradients, current, len(key)
        layer.write(key, value, current)
        keys, values = layer.read(current)
        return _alias(keys), _alias(values), key.new_empty(())

    @staticmethod
    @once
    def backward(
        ctx: Any, keys_gradient: Tensor | None, values_gradient: Tensor | None, link: None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        del link
        gradients: _Gradients = ctx.gradients
        gradients.begin()
        if keys_gradient is not None and values_gradient is not None:
            gradients.add(keys_gradient, values_gradient, ctx.current)
        key, value = gradients.of_pass(ctx.current, ctx.num_rows)
        if ctx.current.start == 0:
            gradients.clear()
        return key, value, None, None, None


class _Attend(torch.autograd.Function):
    """Write the columns of a pass into the store, and attend from them to all columns so far."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHSd: Tensor,
        key: Tensor,
        value: Tensor,
        link: Tensor | None,
        layer: LayerColumns,
        current: Pass,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        del link
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.current, ctx.scaling, ctx.has_dropout = layer, current, scaling, dropout > 0
        layer.write(key, value, current)
        query, keys, values = layer.operands(query_BHSd, current)
        ctx.num_left = layer.num_queries = layer.num_queries + query.shape[1]
        probabilities = layer.probabilities(query, keys, mask, scaling)
        kept = probabilities
        if dropout > 0:
            by_row_BHST = probabilities.view(*query_BHSd.shape[:3], -1)
            kept = functional.dropout(by_row_BHST, dropout).view_as(probabilities)
        kept = kept.to(values.dtype)
        ctx.save_for_backward(query_BHSd, probabilities, kept)
        return torch.bmm(kept, values).view(*query_BHSd.shape[:3], -1), key.new_empty(())

    @staticmethod
    @once
    def backward(
        ctx: Any, gradient: Tensor | None, link: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None, None, None]:
        del link
        layer: LayerColumns = ctx.layer
        layer.gradients.begin()
        query_gradient = None
        if gradient is not None:
            query_BHSd, probabilities, kept = ctx.saved_tensors
            query, keys, values = layer.operands(query_BHSd, ctx.current)
            out_gradient = gradient.reshape(*query.shape[:2], -1)
            kept_gradient = torch.bmm(out_gradient, values.transpose(1, 2)).float()
            if ctx.has_dropout:
                # Where a probability was kept it was scaled, and `kept` holds it scaled.
                kept_gradient = torch.where(kept > 0, kept_gradient * (kept / probabilities), 0.0)
            scores_gradient = layer.scores_gradient(kept_gradient, probabilities).mul_(ctx.scaling).to(query.dtype)
            query_gradient = torch.bmm(scores_gradient, keys).view_as(query_BHSd)
            layer.gradients.add_factors((query, scores_gradient, kept, out_gradient), num_left=ctx.num_left)
        key, value = layer.gradients.of_pass(ctx.current, len(layer.keys_BKCd))
        if ctx.current.start == 0:
            layer.gradients.clear()
        return query_gradient, key, value, None, None, None, None, None, None
