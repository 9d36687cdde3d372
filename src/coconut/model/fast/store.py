"""The key-value store: keys and values of the columns read so far, for a batch that is read in passes.

A model's attention layers are sent here through transformers' attention interface. It differs from the library's
cache in three ways:

* Room for all columns is allocated once; a pass writes its keys and values and copies no older ones. So every pass's
  backward finds them there, and nothing keeps a copy per pass.
* A pass of few columns does not form the gradient of all keys and values. It keeps four small factors of it, and the
  pass that wrote a column sums over all later passes at once (`attention.py`).
* Padding is left out: a pass is one packed row of N real columns everywhere but in here.

Legend: B rows, T columns, S columns of one pass, C columns there is room for, N real columns of one pass over all
rows, H heads, K heads of keys and values, G = H / K, A = B K, d width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from coconut.model.fast.attention import LayerColumns, Link, Pass
from coconut.model.fast.thresholds import Thresholds

INTERFACE = "coconut_store"
_ALIGNED_COLUMNS = 8
"""Of numbers of 2 bytes in 16 bytes."""


@dataclass
class CurrentPass(Pass):
    """The columns that the model is reading now, and what belongs to them alone."""

    places_N: Tensor | None = None
    """Of the real columns among the B x S of this pass; None where all B x S are computed."""
    masks: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)


class ColumnStore(Cache):  # type: ignore[misc]  # transformers is not typed for us
    """The key-value store of one batch; see the module.

    Args:
        is_real_BC: False on padding, one column for each that there shall be room for.
        width: of the model's hidden states.
        is_real_on_cpu_BC: the same on the CPU; if it is not given, the device is waited for.
    """

    def __init__(
        self, is_real_BC: Tensor, *, width: int, thresholds: Thresholds, is_real_on_cpu_BC: Tensor | None = None
    ) -> None:
        super().__init__(layers=[])
        self.width, self.thresholds = width, thresholds
        self.is_real_BC = is_real_BC
        self.is_real_on_cpu_BC = is_real_BC.cpu() if is_real_on_cpu_BC is None else is_real_on_cpu_BC
        self.is_padded = not bool(self.is_real_on_cpu_BC.all())
        self.padding: dict[torch.dtype, Tensor] = {}
        """What hides padding, B x C, where it is added to the scores; see `_padding`."""
        self.layers_read: dict[int, LayerColumns] = {}
        self.links: dict[int, Link] = {}
        """Of each layer. A layer must not hold its own: the graph that it ends in holds the layer."""
        self.is_sealed = False
        self.num_read = 0
        self.current: CurrentPass | None = None
        self.announced: int | None = None

    # --- what the passes need -----------------------------------------------------------------

    def begin(self, start: int, stop: int) -> CurrentPass:
        """Say which columns the model reads next."""
        places_N = None
        if self.is_padded:
            is_real_R = self.is_real_on_cpu_BC[:, start:stop].flatten()
            num_padding = len(is_real_R) - int(is_real_R.sum())
            if num_padding * self.width**2 >= self.thresholds.min_packed_work:
                places_N = is_real_R.nonzero().flatten().to(self.is_real_BC.device, non_blocking=True)
        return CurrentPass(start, stop, self._num_attended(start, stop), places_N)

    def _num_attended(self, start: int, stop: int) -> int:
        """Count the columns that attention reads, from one column in decoding all that there is room for.

        Columns that are read up to the last have gaps between one head and the next, at each of which the processor
        begins to fetch anew.
        """
        num_columns = self.is_real_BC.shape[1]
        is_full = stop >= self.thresholds.min_full * num_columns and num_columns <= self.thresholds.max_scores
        return num_columns if stop - start == 1 and is_full and not torch.is_grad_enabled() else stop

    @contextmanager
    def attended_by(self, model: PreTrainedModel, current: CurrentPass) -> Iterator[None]:
        """Let the model's attention layers read and write the store while they read these columns."""
        AttentionInterface.register(INTERFACE, _attend)
        config = model.base_model.config
        before = config._attn_implementation
        config._attn_implementation, self.current = INTERFACE, current
        try:
            yield
        finally:
            config._attn_implementation, self.current = before, None
        self.num_read = max(self.num_read, current.stop)

    def seal(self) -> None:
        """Declare that only passes that were read before will be read with gradients again, for their activations."""
        self.is_sealed = True
        self.links.clear()  # Checkpoints hold the store, and must not hold their own graph through it.

    def select_on_cpu(self, rows: Tensor) -> None:
        """Keep only these rows of what is known on the CPU."""
        self.is_real_on_cpu_BC = self.is_real_on_cpu_BC[rows]

    def pack(self, tensor: Tensor, current: CurrentPass) -> Tensor:
        """Leave out the padding of (B, S, ...): (1, N, ...)."""
        if current.places_N is None:
            return tensor
        return tensor.flatten(0, 1).index_select(0, current.places_N)[None]

    def unpack(self, tensor: Tensor, current: CurrentPass) -> Tensor:
        """Put (1, N, ...) back in place, (B, S, ...); padding is 0."""
        if current.places_N is None:
            return tensor
        num_rows, num_columns = len(self.is_real_BC), current.num_columns
        blank = tensor.new_zeros(num_rows * num_columns, *tensor.shape[2:])
        return blank.index_copy_(0, current.places_N, tensor[0]).view(num_rows, num_columns, *tensor.shape[2:])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self.is_real_BC = self.is_real_BC[indices]
        self.padding.clear()
        for layer in self.layers_read.values():
            layer.keys_BKCd, layer.values_BKCd = layer.keys_BKCd[indices], layer.values_BKCd[indices]

    # --- what the model's layers call -----------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the columns read so far."""
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
        query, key, value = (self._prepared(tensor, current) for tensor in (query, key, value))
        layer = self.layers_read.get(layer_idx)
        if layer is None:
            layer = LayerColumns(key, value, num_columns=self.is_real_BC.shape[1], thresholds=self.thresholds)
            self.layers_read[layer_idx] = layer
        link = Link() if self.is_sealed else self.links.setdefault(layer_idx, Link())
        if current.num_columns * current.stop <= self.thresholds.max_scores:
            out_BSHd = layer.attend(query, key, value, link, current, self._mask(query, layer), scaling, dropout)
        else:
            keys, values = layer.append(key, value, link, current)
            mask = None if current.start == 0 and not self.is_padded else self._mask(query)
            if current.num_columns == 1:
                out_BSHd = _attend_from_one(query, keys, values, mask, dropout=dropout, scaling=scaling)
            else:
                out_BSHd, _ = sdpa_attention_forward(
                    module, query, keys, values, mask, dropout=dropout, scaling=scaling
                )
        return self.pack(out_BSHd, current)

    def _prepared(self, tensor: Tensor, current: CurrentPass) -> Tensor:
        """Unpack queries, keys or values, and convert them as autocast does for torch's kernel."""
        if current.places_N is not None:
            tensor = self.unpack(tensor.transpose(1, 2), current).transpose(1, 2)
        device = tensor.device.type
        # Rotated queries and keys come in float32, values do not.
        return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor

    def _mask(self, query_BHSd: Tensor, layer: LayerColumns | None = None) -> Tensor | None:
        """Return what is added to the scores: 0 or a very low number; None if all are 0.

        Its shape is B x 1 x S x T or 1 x 1 x S x T. For a layer's own attention it is in float32 and in that
        attention's shape, A x GS x T or 1 x GS x T.
        """
        assert self.current is not None
        current = self.current
        if not self.is_padded and current.num_columns == 1 and current.num_attended == current.stop:
            return None
        dtype = torch.float32 if layer else query_BHSd.dtype
        num_heads = layer.keys_BKCd.shape[1] if layer else 0
        if (dtype, num_heads) not in current.masks:
            mask = self._additive_mask(current, dtype)
            if layer is not None:
                num_groups = query_BHSd.shape[1] // num_heads
                mask = mask[:, :, None].expand(-1, num_heads if self.is_padded else 1, num_groups, -1, -1)
                mask = mask.reshape(-1, num_groups * current.num_columns, current.num_attended)
            current.masks[dtype, num_heads] = mask
        return current.masks[dtype, num_heads]

    def _additive_mask(self, current: CurrentPass, dtype: torch.dtype) -> Tensor:
        if current.num_columns == 1:
            mask = self._padding(dtype)[: None if self.is_padded else 1, None, None, : current.stop]
            num_hidden = current.num_attended - current.stop
            return functional.pad(mask, (0, num_hidden), value=torch.finfo(dtype).min) if num_hidden else mask
        columns_T = torch.arange(current.stop, device=self.is_real_BC.device)
        is_hidden = (columns_T[None, :] > columns_T[current.start :, None])[None, None]
        if self.is_padded:
            is_hidden = is_hidden | ~self.is_real_BC[:, None, None, : current.stop]
        return _lowest_where(is_hidden, dtype)

    def _padding(self, dtype: torch.dtype) -> Tensor:
        """Return what hides padding from a column that sees all others, once for all passes of one column."""
        if dtype not in self.padding:
            # Rows begin at multiples of 16 bytes, or CUDA's kernels would copy the mask to where they do.
            num_added = -self.is_real_BC.shape[1] % _ALIGNED_COLUMNS
            self.padding[dtype] = _lowest_where(functional.pad(~self.is_real_BC, (0, num_added)), dtype)
        return self.padding[dtype]


def _attend_from_one(
    query_BH1d: Tensor, keys_BKTd: Tensor, values_BKTd: Tensor, mask: Tensor | None, *, dropout: float, scaling: float
) -> Tensor:
    """Attend from one column, B x 1 x H x d. Heads that share keys stand as columns, so that no key is copied."""
    num_rows, num_heads, _, width = query_BH1d.shape
    query_BKGd = query_BH1d.reshape(num_rows, keys_BKTd.shape[1], -1, width)
    out_BKGd = functional.scaled_dot_product_attention(
        query_BKGd, keys_BKTd, values_BKTd, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return out_BKGd.reshape(num_rows, 1, num_heads, width)


def _lowest_where(is_hidden: Tensor, dtype: torch.dtype) -> Tensor:
    # Finite: a padded column that sees nothing must not become NaN.
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=is_hidden.device)
    return mask.masked_fill_(is_hidden, torch.finfo(dtype).min)


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
    """Attend; transformers calls this for every attention layer. The store has masks of its own."""
    del attention_mask
    return column_store.attend(module, query, key, value, scaling=scaling, dropout=dropout), None
