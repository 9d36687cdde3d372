"""Reading a batch pass by pass: the model's own layers on the library's key-value cache.

A pass is a run of the decoder body over the next columns of a batch, on top of the cache of all columns before
them. `model/latent.py` decides where a pass ends. This is the plain way to read one, and the reference for
`model/fast`, which gives the same numbers with less work; `open_passes` in `model/choice.py` chooses.

Legend: B rows, T columns of the batch, S columns of a pass, C columns of the batch and of the tokens decoded after
it, D hidden, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from coconut.model.batch import Batch
from coconut.model.dropout import RowDropout
from coconut.model.fast.thresholds import Thresholds
from coconut.model.head import output_logits


@dataclass(frozen=True)
class PassOptions:
    """Options of how batches are read. No value changes a result by more than float rounding."""

    fast: bool = True
    """Whether the fast path may be used."""
    checkpoint_activations: bool = False
    """Keep only what enters each layer (or pass), and compute the rest again in the backward pass."""
    max_logits: int = 1 << 25
    """Logits (tokens x V) that exist at once while the loss is computed: 128 MB in float32."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    num_passes: int = 0
    """Passes that a batch is cut into at least, where processes must read equally many; more cuts change nothing."""


def cut(latent_columns: list[int], num_columns: int, num_passes: int) -> list[int]:
    """Return the columns before which a batch is cut: the latent ones, and the last others up to `num_passes`.

    >>> cut([3, 4], 9, 0), cut([3, 4], 9, 5), cut([], 9, 2)
    ([3, 4], [3, 4, 7, 8], [8])
    """
    num_more = max(0, num_passes - 1 - len(latent_columns))
    others = [column for column in range(1, num_columns) if column not in latent_columns]
    return sorted([*latent_columns, *others[len(others) - num_more :]])


class PlainPasses:
    """The passes over one batch.

    Args:
        all_layers: return the hidden states of every layer, which some forms of thought read.
        keeps_layers: keep them in `kept_layers`, for a loss that reads them.
        num_further_columns: room for tokens that are decoded after the batch.
        keys_B: of the rows' dropout (`model/dropout.py`); None for torch's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        options: PassOptions,
        *,
        all_layers: bool = False,
        keeps_layers: bool = False,
        num_further_columns: int = 0,
        keys_B: Tensor | None = None,
    ) -> None:
        self.model, self.options, self.all_layers = model, options, all_layers or keeps_layers
        self.kept_layers: list[Sequence[Tensor]] | None = [] if keeps_layers else None
        """Of each pass, the hidden states of all layers, B x S x D."""
        self.cache: Cache = DynamicCache(config=model.config)
        self.num_read = 0
        """Columns read so far."""
        self.mask_BC, self.mask_on_cpu_BC = (
            functional.pad(mask_BT, (0, num_further_columns), value=1)
            for mask_BT in (batch.attention_mask_BT, batch.host.attention_mask_BT)
        )
        self.position_ids_BT = batch.position_ids_BT
        self.dropout = None if keys_B is None else RowDropout(model, keys_B, batch.position_ids_BT)

    def embed(self, ids: Tensor) -> Tensor:
        """Look up the input embeddings of token ids, ... -> ... x D."""
        with self._layers():
            embeds: Tensor = self.model.get_input_embeddings()(ids)
        return embeds

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head to hidden states after the final norm, ... x D -> ... x V."""
        with self._layers():
            return output_logits(self.model, hidden)

    def read(self, embeds_BSD: Tensor, position_ids_BS: Tensor | None = None) -> BaseModelOutput:
        """Run the decoder body over the next S columns; the cache grows by S.

        `use_cache=True` is passed and checked, because a model's config or gradient checkpointing may silently
        drop the cache, and then every thought after the first would be wrong.

        Args:
            position_ids_BS: needed for columns after the batch's own.
        """
        columns = slice(self.num_read, self.num_read + embeds_BSD.shape[1])
        if position_ids_BS is None:
            position_ids_BS = self.position_ids_BT[:, columns]
        output = self._run(embeds_BSD, position_ids_BS, columns)
        assert self.cache.get_seq_length() == columns.stop, "the model dropped the key-value cache"
        self.num_read = columns.stop
        if self.kept_layers is not None:
            assert output.hidden_states is not None, "the model returned no hidden states"
            self.kept_layers.append(output.hidden_states)
        return output

    def states(self) -> list[Tensor]:
        """Return the hidden states that were kept, B x T x D for each of the L + 1 states of a column."""
        return [torch.cat(list(parts), dim=1) for parts in zip(*(self.kept_layers or []), strict=True)]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the cache; decoding goes on with them.

        Args:
            rows: their numbers, on the CPU.
        """
        there = rows.to(self.mask_BC.device, non_blocking=True)
        self.cache.batch_select_indices(there)
        self.mask_BC, self.mask_on_cpu_BC = self.mask_BC[there], self.mask_on_cpu_BC[rows]

    def fork(self) -> "PlainPasses":
        """Return passes that read on from here without changing these."""
        twin = copy.copy(self)
        twin.cache, twin.kept_layers = copy_cache(self.cache), None
        return twin

    def close(self) -> None:
        """Declare that no further pass will be read with gradients."""

    def _layers(self) -> AbstractContextManager[None]:
        """Return the context in which the model's layers run."""
        return nullcontext()

    def _run(self, embeds_BSD: Tensor, position_ids_BS: Tensor, columns: slice) -> BaseModelOutput:
        mask = self._attention_mask(columns)
        run = partial(self._run_body, columns=columns, attention_mask=mask, position_ids=position_ids_BS)
        if not (self.options.checkpoint_activations and torch.is_grad_enabled()):
            return run(embeds_BSD, self.cache)
        # The cache would grow once more when the pass runs again, so each run grows a copy.
        output, grown = checkpoint(_run_on_copy, run, embeds_BSD, copy_cache(self.cache), use_reentrant=False)
        self.cache.layers = grown.layers
        return output

    def _attention_mask(self, columns: slice) -> Tensor | None:
        """Return which of the columns read so far hold something, of which the model makes its masks."""
        return self.mask_BC[:, : columns.stop]

    def _drawing(self, columns: slice, places_N: Tensor | None = None) -> AbstractContextManager[None]:
        """Return the context in which dropout is drawn for these columns."""
        return nullcontext() if self.dropout is None else self.dropout.active(columns, places_N)

    def _run_body(self, embeds_BSD: Tensor, cache: Cache, *, columns: slice, **inputs: Any) -> BaseModelOutput:
        with self._layers(), self._drawing(columns):
            output: BaseModelOutput = self.model.base_model(
                inputs_embeds=embeds_BSD,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=self.all_layers,
                **inputs,
            )
        return output


def _run_on_copy(
    run: Callable[[Tensor, Cache], BaseModelOutput], embeds_BSD: Tensor, cache: Cache
) -> tuple[BaseModelOutput, Cache]:
    twin = copy_cache(cache)
    return run(embeds_BSD, twin), twin


def copy_cache(cache: Cache) -> Cache:
    """Return a cache that can grow without growing the original; neither writes into the tensors that they share."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
