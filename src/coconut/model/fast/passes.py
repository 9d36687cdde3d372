"""The fast ways to read a pass: our layers on the library's cache, and our layers on the key-value store.

Legend: B rows, T columns, S columns of a pass, C columns there is room for, D hidden.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from coconut.model.batch import Batch
from coconut.model.fast.layers import BatchLayers, checkpointable_blocks
from coconut.model.fast.store import ColumnStore, CurrentPass
from coconut.model.passes import PassOptions, PlainPasses


class LayerPasses(PlainPasses):
    """Passes through `BatchLayers`, on the library's cache."""

    def __init__(self, model: PreTrainedModel, batch: Batch, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, batch, *args, **kwargs)
        self.layers = BatchLayers(
            model,
            batch,
            saves_memory=self.options.checkpoint_activations,
            thresholds=self.options.thresholds,
        )

    def _layers(self) -> AbstractContextManager[None]:
        return self.layers.active()

    def _attention_mask(self, columns: slice) -> Tensor | None:
        """Return the mask itself, B x 1 x S x C, or None where no column is padding.

        The library makes the same one, but asks the device on the way for what is known on the CPU.
        """
        if not _is_causal(self.model.base_model.config, self.mask_BC.shape[1]):
            return super()._attention_mask(columns)
        if bool(self.mask_on_cpu_BC[:, : columns.stop].all()):
            return None
        is_real_B11C = self.mask_BC[:, None, None, : columns.stop].bool()
        if columns.stop - columns.start == 1:
            return is_real_B11C
        numbers_C = torch.arange(columns.stop, device=is_real_B11C.device)
        return is_real_B11C & (numbers_C <= numbers_C[columns, None])


class StorePasses(LayerPasses):
    """Passes through `BatchLayers`, on the key-value store."""

    def __init__(self, model: PreTrainedModel, batch: Batch, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, batch, *args, **kwargs)
        width = model.get_input_embeddings().weight.shape[1]
        self.cache = ColumnStore(
            self.mask_BC.bool(),
            width=width,
            thresholds=self.options.thresholds,
            is_real_on_cpu_BC=self.mask_on_cpu_BC.bool(),
        )

    def fork(self) -> "PlainPasses":
        """Raise: the store is written in place, so nothing can read on from a copy of it."""
        raise NotImplementedError("the key-value store cannot be forked; Jacobi iteration takes LayerPasses")

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, also of what the store knows on the CPU."""
        super().select(rows)
        self.cache.select_on_cpu(rows)

    def close(self) -> None:
        """Release the links between passes; checkpoints would hold the graph through them."""
        self.cache.seal()

    def _run(self, embeds_BSD: Tensor, position_ids_BS: Tensor, columns: slice) -> BaseModelOutput:
        store: ColumnStore = self.cache
        current = store.begin(columns.start, columns.stop)
        attended = partial(self._attending, current)
        # A pass of one column keeps all: the weights' gradients need most of it, and running it again costs most.
        recomputes = self.options.checkpoint_activations and torch.is_grad_enabled() and embeds_BSD.shape[1] > 1
        with self.layers.active(recompute_in=attended if recomputes else None), attended():
            output: BaseModelOutput = self.model.base_model(
                inputs_embeds=store.pack(embeds_BSD, current),
                position_ids=store.pack(position_ids_BS, current),
                past_key_values=store,
                use_cache=True,
                output_hidden_states=self.all_layers,
                column_store=store,
            )
        output.last_hidden_state = store.unpack(output.last_hidden_state, current)
        if self.all_layers:
            output.hidden_states = tuple(store.unpack(hidden, current) for hidden in output.hidden_states)
        return output

    @contextmanager
    def _attending(self, current: CurrentPass) -> Iterator[None]:
        with self.cache.attended_by(self.model, current), self._drawing(current.columns, current.places_N):
            yield


def can_store(model: PreTrainedModel, num_columns: int, options: PassOptions) -> bool:
    """Say whether the store computes every attention layer of this model, and the model is wide enough to gain."""
    return (
        _is_causal(model.base_model.config, num_columns)
        and model.get_input_embeddings().weight.shape[1] >= options.thresholds.min_width
        # Where no layer can be run again by itself, whole passes are, which needs a cache that can be copied.
        and (not options.checkpoint_activations or bool(checkpointable_blocks(model)))
    )


def _is_causal(config: PretrainedConfig, num_columns: int) -> bool:
    """Say whether every attention layer is torch's, and each of so many columns sees all before it."""
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    return (
        config._attn_implementation == "sdpa"
        and kinds <= {"full_attention", "sliding_attention"}
        and (window is None or num_columns < window)
        and getattr(config, "attention_chunk_size", None) is None
    )
