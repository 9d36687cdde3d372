"""Keys and values of the columns read so far, and attention over them, for a batch read in passes.

Legend: B rows, T columns, S columns of one pass, C columns there is room for, N real columns of one
pass over all rows, H heads, K heads of keys and values, G = H / K, A = B K, d width of a head.

A model's attention layers are sent here through transformers' attention interface. What is different
from the library's own cache:

* Room for all columns is taken once; a pass writes its keys and values and copies no older ones. So
  every pass's backward finds them there, and nothing keeps a copy per pass.
* A pass of few columns does not form the gradient of all keys and values. It keeps four small factors
  of it; the pass that wrote a column sums over all later passes at once.
* Padding is left out: a pass is one packed row of N real columns everywhere but in here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from coconut.model.fast.backward import Backward

SCALAR_SOFTMAX = 16
"""Columns below which torch's softmax on a CPU goes one by one, and is five times slower than its parts."""
Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of the gradients that a pass gives to keys and values: its queries, the gradient of its scores, its
probabilities, the gradient of its output; A x GS x ..."""
INTERFACE = "coconut_columns"
MIN_WIDTH = 256
"""Of a model's hidden states; for smaller ones the library's cache costs fewer operations."""
MIN_PACKED_WORK = 1 << 18
"""Padded columns x width squared in a pass, from which on leaving them out saves more than it costs."""
MAX_SCORES = 1024
"""Columns of a pass x columns it sees, up to which attention is computed here; torch's kernel wins beyond."""


@dataclass
class _Pass:
    """The columns that the model is reading now."""

    start: int
    stop: int
    places_N: Tensor | None
    """Of the real columns among the B x S of this pass; None where B x S is kept, for (nearly) all are real."""
    masks: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def num_columns(self) -> int:
        return self.stop - self.start


@dataclass
class _Link:
    """Makes the pass that has read last wait, in backward, for the one that reads next."""

    end: Tensor | None = None
    num_read: int = 0

    def advance(self, end: Tensor, current: _Pass) -> None:
        """Take note of a pass that has read."""
        # A pass that is computed again for its activations must not become its own successor.
        if current.stop > self.num_read:
            self.end, self.num_read = end, current.stop


class ColumnStore(Cache):  # type: ignore[misc]  # transformers is not typed for us
    """The key-value cache of a batch that is read in passes; see the module.

    Args:
        is_real_BC: False on padding, one column for each that there shall be room for.
        width: of the model's hidden states.
    """

    def __init__(self, is_real_BC: Tensor, *, width: int) -> None:
        super().__init__(layers=[])
        self.width = width
        self.is_real_BC = is_real_BC
        # Looked at once, so that a GPU is waited for once, and not in every pass.
        self.is_real_on_cpu_BC = is_real_BC.cpu()
        self.is_padded = not bool(self.is_real_on_cpu_BC.all())
        self.layers_read: dict[int, _LayerColumns] = {}
        self.links: dict[int, _Link] = {}
        """Of each layer. A layer must not hold its own: the graph that it ends in holds the layer."""
        self.is_sealed = False
        self.num_read = 0
        self.current: _Pass | None = None
        self.announced: int | None = None

    # --- what the passes need -----------------------------------------------------------------

    def begin(self, start: int, stop: int) -> _Pass:
        """Say which columns the model reads next."""
        places_N = None
        if self.is_padded:
            is_real_R = self.is_real_on_cpu_BC[:, start:stop].flatten()
            num_padding = len(is_real_R) - int(is_real_R.sum())
            if num_padding * self.width**2 >= MIN_PACKED_WORK:
                places_N = is_real_R.nonzero().flatten().to(self.is_real_BC.device, non_blocking=True)
        return _Pass(start, stop, places_N)

    def seal(self) -> None:
        """No further pass will be read with gradients; only the same ones again, for their activations."""
        self.is_sealed = True
        self.links.clear()  # Checkpoints hold the store, and must not hold their own graph through it.

    def pack(self, tensor: Tensor, current: _Pass) -> Tensor:
        """Leave out the padding of (B, S, ...): (1, N, ...)."""
        if current.places_N is None:
            return tensor
        return tensor.flatten(0, 1).index_select(0, current.places_N)[None]

    def unpack(self, tensor: Tensor, current: _Pass) -> Tensor:
        """Put (1, N, ...) back in place, (B, S, ...); padding is 0."""
        if current.places_N is None:
            return tensor
        num_rows, num_columns = len(self.is_real_BC), current.num_columns
        blank = tensor.new_zeros(num_rows * num_columns, *tensor.shape[2:])
        return blank.index_copy_(0, current.places_N, tensor[0]).view(num_rows, num_columns, *tensor.shape[2:])

    # --- what the model's layers call -----------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        del layer_idx
        return self.num_read

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take note that the layer will attend; `attend` stores its keys and values."""
        del args, kwargs
        self.announced = layer_idx
        return key_states, value_states

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float
    ) -> Tensor:
        """Attend from the current pass's columns to all so far; (B, S, H, d), or packed (1, N, H, d)."""
        layer_idx, current = cast(int, module.layer_idx), self.current
        assert self.announced == layer_idx, "the model dropped the key-value cache"
        assert current is not None
        self.announced = None
        if current.places_N is not None:
            query, key, value = (
                self.unpack(tensor.transpose(1, 2), current).transpose(1, 2) for tensor in (query, key, value)
            )
        if torch.is_autocast_enabled(query.device.type):
            # As autocast does for torch's kernel. Rotated queries and keys come in float32, values do not.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        layer = self.layers_read.get(layer_idx)
        if layer is None:
            layer = self.layers_read[layer_idx] = _LayerColumns(key, value, num_columns=self.is_real_BC.shape[1])
        link = _Link() if self.is_sealed else self.links.setdefault(layer_idx, _Link())
        if current.num_columns * current.stop <= MAX_SCORES:
            out_BSHd = layer.attend(query, key, value, link, current, self._mask(query, layer), scaling, dropout)
        else:
            keys, values = layer.append(key, value, link, current)
            mask = None if current.start == 0 and not self.is_padded else self._mask(query)
            out_BSHd, _ = sdpa_attention_forward(module, query, keys, values, mask, dropout=dropout, scaling=scaling)
        return self.pack(out_BSHd, current)

    def _mask(self, query_BHSd: Tensor, layer: "_LayerColumns | None" = None) -> Tensor | None:
        """What is added to the scores: 0 or a very low number, B x 1 x S x T or 1 x 1 x S x T; None if all 0.

        For a layer's own attention it is in float32 and in that attention's shape, A x GS x T or 1 x GS x T.
        """
        assert self.current is not None
        current = self.current
        if not self.is_padded and current.num_columns == 1:
            return None
        dtype = torch.float32 if layer else query_BHSd.dtype
        num_heads = layer.keys_BKCd.shape[1] if layer else 0
        if (dtype, num_heads) not in current.masks:
            columns_T = torch.arange(current.stop, device=self.is_real_BC.device)
            is_hidden = (columns_T[None, :] > columns_T[current.start :, None])[None, None]
            if self.is_padded:
                is_hidden = is_hidden | ~self.is_real_BC[:, None, None, : current.stop]
            # Finite: a padded column that sees nothing must not become NaN.
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=is_hidden.device)
            mask = mask.masked_fill_(is_hidden, torch.finfo(dtype).min)
            if layer is not None:
                num_groups = query_BHSd.shape[1] // num_heads
                mask = mask[:, :, None].expand(-1, num_heads if self.is_padded else 1, num_groups, -1, -1)
                mask = mask.reshape(-1, num_groups * current.num_columns, current.stop)
            current.masks[dtype, num_heads] = mask
        return current.masks[dtype, num_heads]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self.is_real_BC = self.is_real_BC[indices]
        self.is_real_on_cpu_BC = self.is_real_BC.cpu()
        for layer in self.layers_read.values():
            layer.keys_BKCd, layer.values_BKCd = layer.keys_BKCd[indices], layer.values_BKCd[indices]


class _LayerColumns:
    """Keys and values of one layer, and their gradients during one backward."""

    def __init__(self, key_BKSd: Tensor, value_BKSd: Tensor, *, num_columns: int) -> None:
        num_rows, num_heads = key_BKSd.shape[:2]
        # Not filled: a column is always written before it is read.
        self.keys_BKCd = key_BKSd.new_empty(num_rows, num_heads, num_columns, key_BKSd.shape[-1])
        self.values_BKCd = value_BKSd.new_empty(num_rows, num_heads, num_columns, value_BKSd.shape[-1])
        self.num_queries = 0
        """Per head of keys, over the passes that `attend` has seen."""
        self.gradients = _Gradients()

    def write(self, key_BKSd: Tensor, value_BKSd: Tensor, current: _Pass) -> None:
        """Store a pass's keys and values."""
        self.keys_BKCd.narrow(2, current.start, current.num_columns).copy_(key_BKSd)
        self.values_BKCd.narrow(2, current.start, current.num_columns).copy_(value_BKSd)

    def read(self, current: _Pass) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns up to a pass's last."""
        return self.keys_BKCd.narrow(2, 0, current.stop), self.values_BKCd.narrow(2, 0, current.stop)

    def append(self, key_BKSd: Tensor, value_BKSd: Tensor, link: _Link, current: _Pass) -> tuple[Tensor, Tensor]:
        """Store a pass's keys and values and give all so far."""
        if current.start == 0 and current.stop == self.keys_BKCd.shape[2]:
            return key_BKSd, value_BKSd  # Nothing was before, and nothing will look.
        if not torch.is_grad_enabled():
            self.write(key_BKSd, value_BKSd, current)
            return self.read(current)
        keys, values, end = _Append.apply(  # type: ignore[no-untyped-call]
            key_BKSd, value_BKSd, link.end, self, current
        )
        link.advance(end, current)
        return keys, values

    def attend(
        self,
        query_BHSd: Tensor,
        key_BKSd: Tensor,
        value_BKSd: Tensor,
        link: _Link,
        current: _Pass,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """Store a pass's keys and values, and attend to all so far, B x S x H x d."""
        if torch.is_grad_enabled():
            out_BHSd, end = _Attend.apply(  # type: ignore[no-untyped-call]
                query_BHSd, key_BKSd, value_BKSd, link.end, self, current, mask, scaling, dropout
            )
            link.advance(end, current)
        else:
            self.write(key_BKSd, value_BKSd, current)
            query, keys, values = self.operands(query_BHSd, current)
            probabilities = _probabilities(query, keys, mask, scaling).to(values.dtype)
            out_BHSd = torch.bmm(probabilities, values).view(*query_BHSd.shape[:3], -1)
        out: Tensor = out_BHSd.transpose(1, 2)
        return out

    def operands(self, query_BHSd: Tensor, current: _Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, A x GS x d, and all keys and values up to a pass's last, A x T x d."""
        keys, values = (part.flatten(0, 1) for part in self.read(current))
        return query_BHSd.reshape(len(keys), -1, query_BHSd.shape[-1]), keys, values


def _probabilities(query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """What each column gives to each column, A x GS x T, in float32."""
    if query.dtype == torch.float32:
        beta, offset = (0, query.new_empty(())) if mask is None else (1, mask)
        scores = torch.baddbmm(offset, query, keys.transpose(1, 2), beta=beta, alpha=scaling)
    else:
        scores = torch.bmm(query, keys.transpose(1, 2)).float().mul_(scaling)
        scores = scores if mask is None else scores.add_(mask)
    if scores.shape[-1] >= SCALAR_SOFTMAX:
        return torch.softmax(scores, dim=-1)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def _scores_gradient(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """The gradient of scores whose softmax has this gradient."""
    if probabilities.shape[-1] >= SCALAR_SOFTMAX:
        return torch._softmax_backward_data(gradient, probabilities, -1, torch.float32)
    weighted = gradient * probabilities
    return weighted.sub_(probabilities * weighted.sum(dim=-1, keepdim=True))


def _alias(part: Tensor) -> Tensor:
    """The same memory, but with a count of writes of its own.

    Autograd refuses a backward through a saved tensor that was written to since; passes only write
    columns behind those that earlier ones have saved.
    """
    return part.new_empty(0).set_(part.untyped_storage(), part.storage_offset(), part.shape, part.stride())


class _Gradients:
    """What the passes of a layer leave, in one backward, for the earlier passes whose columns they have read."""

    def __init__(self) -> None:
        self.backward = Backward()
        self.clear()

    def clear(self) -> None:
        self.wide: list[tuple[Tensor, Tensor]] = []
        """Gradients of all keys and values so far, one pair from each pass that torch's kernel computed."""
        self.factors: Factors | None = None
        """Of all other passes, the last one first; there is room for those to come."""
        self.num_queries = 0

    def begin(self) -> None:
        """Forget what a backward has left that did not reach the first pass."""
        if self.backward.is_another():
            self.clear()

    def add(self, factors: Factors, *, num_left: int) -> None:
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

    def of_columns(self, columns: slice, num_rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the keys and values of these columns, B x K x S x d, by all passes that have read them."""
        keys, values = ([pair[i][:, :, columns] for pair in self.wide] for i in (0, 1))
        if self.factors is not None:
            query, scores, probabilities, out = (factor[:, : self.num_queries] for factor in self.factors)
            for parts, seen, given in ((keys, scores, query), (values, probabilities, out)):
                product_ASd = torch.bmm(seen[:, :, columns].transpose(1, 2), given)
                parts.append(product_ASd.view(num_rows, -1, *product_ASd.shape[1:]))
        return reduce(torch.add, keys) if keys else None, reduce(torch.add, values) if values else None


class _Append(torch.autograd.Function):
    """Write the columns of a pass into the store, and give all columns so far."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, link: Tensor | None, layer: _LayerColumns, current: _Pass
    ) -> tuple[Tensor, Tensor, Tensor]:
        del link
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.current, ctx.num_rows = layer.gradients, current, len(key)
        layer.write(key, value, current)
        keys, values = layer.read(current)
        return _alias(keys), _alias(values), key.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, keys_gradient: Tensor | None, values_gradient: Tensor | None, link: None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        del link
        gradients: _Gradients = ctx.gradients
        gradients.begin()
        if keys_gradient is not None and values_gradient is not None:
            gradients.wide.append((keys_gradient, values_gradient))
        key, value = gradients.of_columns(ctx.current.columns, ctx.num_rows)
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
        layer: _LayerColumns,
        current: _Pass,
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
        probabilities = _probabilities(query, keys, mask, scaling)
        kept = functional.dropout(probabilities, dropout) if dropout > 0 else probabilities
        kept = kept.to(values.dtype)
        ctx.save_for_backward(query_BHSd, probabilities, kept)
        return torch.bmm(kept, values).view(*query_BHSd.shape[:3], -1), key.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None, link: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None, None, None]:
        del link
        layer: _LayerColumns = ctx.layer
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
            scores_gradient = _scores_gradient(kept_gradient, probabilities).mul_(ctx.scaling).to(query.dtype)
            query_gradient = torch.bmm(scores_gradient, keys).view_as(query_BHSd)
            layer.gradients.add((query, scores_gradient, kept, out_gradient), num_left=ctx.num_left)
        key, value = layer.gradients.of_columns(ctx.current.columns, len(layer.keys_BKCd))
        if ctx.current.start == 0:
            layer.gradients.clear()
        return query_gradient, key, value, None, None, None, None, None, None


@contextmanager
def attention_through(store: ColumnStore, model: PreTrainedModel, current: _Pass) -> Iterator[None]:
    """Let the model's attention layers read and write the store while it reads these columns."""
    AttentionInterface.register(INTERFACE, _attend)
    config = model.base_model.config
    before = config._attn_implementation
    config._attn_implementation, store.current = INTERFACE, current
    try:
        yield
    finally:
        config._attn_implementation, store.current = before, None
    store.num_read = max(store.num_read, current.stop)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    column_store: ColumnStore,
    scaling: float,
    dropout: float = 0.0,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for every attention layer; the store has masks of its own."""
    del attention_mask
    return column_store.attend(module, query, key, value, scaling=scaling, dropout=dropout), None


def can_store(model: PreTrainedModel, num_columns: int) -> bool:
    """Whether every attention layer of this model is one that the store computes, and it is large enough to gain."""
    config = model.base_model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return (
        config._attn_implementation == "sdpa"
        and model.get_input_embeddings().weight.shape[1] >= MIN_WIDTH
        and kinds <= {"full_attention", "sliding_attention"}
        and (window is None or num_columns < window)
        and getattr(config, "attention_chunk_size", None) is None
    )
