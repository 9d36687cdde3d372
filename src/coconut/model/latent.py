"""The mathematics: hidden states fed back as inputs, and the loss over what remains as text.

Legend: B rows, T columns, S columns of one pass, N supervised columns, D hidden, V vocabulary.

A batch is cut into passes before every latent column. The thought that enters at latent
column t comes from the pass that ended at column t-1: in the paper, the hidden state after
the final norm. All passes share one key-value cache, so every column is computed once:

    columns   q q q L L L s s a         (the first latent column is 3)
    passes   [q q q|L|L|L s s a]         (the last latent needs no pass of its own)

Source: Hao et al. 2024 (arXiv:2412.06769), section 3.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from coconut.model.fast.columns import ColumnStore, attention_through, can_store
from coconut.model.fast.layers import BatchLayers
from coconut.model.feedback import Feedback
from coconut.model.head import output_logits
from coconut.model.parallel import copy_cache, read_in_parallel

IGNORED = -100
CHUNK_LOGITS = 1 << 25
"""Logits (tokens x V) that exist at once while the loss is computed: 128 MB in float32."""


@dataclass
class Reading:
    """What a batch left behind."""

    hidden_BTD: Tensor
    """After the final norm. Padded columns hold arbitrary finite values."""
    cache: Cache
    """Keys and values of all columns."""
    layers: BatchLayers
    """The model's layers, to read on with."""


def read_columns(
    model: PreTrainedModel,
    feedback: Feedback,
    *,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    position_ids_BT: Tensor,
    is_latent_BT: Tensor,
    num_further_columns: int = 0,
    checkpoint_activations: bool = False,
) -> Reading:
    """Run the decoder over all columns, each once, feeding thoughts back where `is_latent_BT` says so.

    Rows need not be aligned, nor hold the same number of latents: a row without a latent at some
    column keeps its token's embedding there. Alignment only lowers the number of passes.

    Args:
        num_further_columns: room to take in the cache for columns that will be read after these.
        checkpoint_activations: keep only what enters each layer, and run it again in the backward pass. Passes of
            one column keep all: the weights' gradients need most of it, and running them again costs the most time.

    Raises:
        ValueError: if a row has a latent in column 0, which nothing could feed.
    """
    latent_columns = is_latent_BT.any(dim=0).nonzero().flatten().tolist()
    if latent_columns and latent_columns[0] == 0:
        raise ValueError("a latent stands in column 0, where no column before it can feed it; give it a question")
    num_columns = input_ids_BT.shape[1]
    layers = BatchLayers(model, saves_memory=checkpoint_activations)
    with layers.active():
        embeds_BTD = model.get_input_embeddings()(input_ids_BT)
    in_parallel = bool(latent_columns) and feedback.parallel_iterations > 0
    cache: Cache = DynamicCache(config=model.config)
    # Where no layer can be run again by itself, a pass is, as with every other cache.
    can_checkpoint = bool(layers.blocks) or not checkpoint_activations
    if not in_parallel and can_checkpoint and can_store(model, num_columns + num_further_columns):
        is_real_BC = functional.pad(attention_mask_BT.bool(), (0, num_further_columns), value=True)
        cache = ColumnStore(is_real_BC, width=embeds_BTD.shape[2])

    def read(embeds_BSD: Tensor, columns: slice, cache: Cache) -> BaseModelOutput:
        return read_pass(
            model,
            embeds_BSD,
            attention_mask_BT=attention_mask_BT[:, : columns.stop],
            position_ids_BS=position_ids_BT[:, columns],
            cache=cache,
            all_layers=feedback.needs_all_layers,
            layers=layers,
            checkpoint_activations=checkpoint_activations,
        )

    if in_parallel:
        hidden_BTD = read_in_parallel(read, feedback, embeds_BTD=embeds_BTD, is_latent_BT=is_latent_BT, cache=cache)
        return Reading(hidden_BTD, cache, layers)
    hidden_parts: list[Tensor] = []
    thought_BD: Tensor | None = None
    try:
        for start, stop in zip([0, *latent_columns], [*latent_columns, num_columns], strict=True):
            pass_embeds_BSD = embeds_BTD[:, start:stop]
            if thought_BD is not None:
                is_latent_B1 = is_latent_BT[:, start, None]
                first_BD = torch.where(is_latent_B1, thought_BD.to(embeds_BTD.dtype), pass_embeds_BSD[:, 0])
                pass_embeds_BSD = torch.cat([first_BD[:, None], pass_embeds_BSD[:, 1:]], dim=1)
            output = read(pass_embeds_BSD, slice(start, stop), cache)
            hidden_parts.append(output.last_hidden_state)
            if stop < num_columns:
                thought_BD = feedback(output, pass_embeds_BSD[:, -1])
    finally:  # Also of a pass that ran out of memory, whose graph would stay for ever.
        if isinstance(cache, ColumnStore):
            cache.seal()
    return Reading(torch.cat(hidden_parts, dim=1), cache, layers)


def read_pass(
    model: PreTrainedModel,
    embeds_BSD: Tensor,
    *,
    attention_mask_BT: Tensor,
    position_ids_BS: Tensor,
    cache: Cache,
    layers: BatchLayers,
    all_layers: bool = False,
    checkpoint_activations: bool = False,
) -> BaseModelOutput:
    """Run the decoder body over the next S columns on top of the cache, which grows by S.

    `use_cache=True` is passed and checked, because a model's config or gradient checkpointing may
    silently drop the cache, and every thought after the first would be wrong.

    Args:
        attention_mask_BT: of all columns up to these; a `ColumnStore` knows it, and does not look.
    """
    run = partial(
        _run_body,
        model,
        attention_mask_BT=attention_mask_BT,
        position_ids_BS=position_ids_BS,
        all_layers=all_layers,
        layers=layers,
    )
    checkpoint_activations = checkpoint_activations and torch.is_grad_enabled()
    if isinstance(cache, ColumnStore):
        output = run(embeds_BSD, cache, checkpoint_layers=checkpoint_activations and embeds_BSD.shape[1] > 1)
    elif checkpoint_activations:
        # Another cache would grow once more when a layer runs again, so each run of a pass grows a copy.
        output, grown = checkpoint(_run_on_copy, run, embeds_BSD, copy_cache(cache), use_reentrant=False)
        cache.layers = grown.layers
    else:
        output = run(embeds_BSD, cache)
    assert cache.get_seq_length() == attention_mask_BT.shape[1], "the model dropped the key-value cache"
    return output


def _run_on_copy(
    run: Callable[[Tensor, Cache], BaseModelOutput], embeds_BSD: Tensor, cache: Cache
) -> tuple[BaseModelOutput, Cache]:
    twin = copy_cache(cache)
    return run(embeds_BSD, twin), twin


def _run_body(
    model: PreTrainedModel,
    embeds_BSD: Tensor,
    cache: Cache,
    *,
    attention_mask_BT: Tensor,
    position_ids_BS: Tensor,
    all_layers: bool,
    layers: BatchLayers,
    checkpoint_layers: bool = False,
) -> BaseModelOutput:
    inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "output_hidden_states": all_layers}
    if not isinstance(cache, ColumnStore):
        with layers.active():
            return model.base_model(
                inputs_embeds=embeds_BSD, attention_mask=attention_mask_BT, position_ids=position_ids_BS, **inputs
            )
    stop = attention_mask_BT.shape[1]
    current = cache.begin(stop - embeds_BSD.shape[1], stop)
    through_store = partial(attention_through, cache, model, current)
    with layers.active(recompute_in=through_store if checkpoint_layers else None), through_store():
        output = model.base_model(
            inputs_embeds=cache.pack(embeds_BSD, current),
            position_ids=cache.pack(position_ids_BS, current),
            column_store=cache,
            **inputs,
        )
    output.last_hidden_state = cache.unpack(output.last_hidden_state, current)
    if all_layers:
        output.hidden_states = tuple(cache.unpack(hidden, current) for hidden in output.hidden_states)
    return output


def supervised_nll(
    model: PreTrainedModel, hidden_BTD: Tensor, labels_BT: Tensor, *, layers: BatchLayers | None = None
) -> tuple[Tensor, int]:
    """Sum the next-token loss over supervised columns; the head sees no other column.

    A sum and a count, not a mean: micro-batches hold different numbers of supervised tokens, so
    the caller divides once, after adding them all up. The logits exist for `CHUNK_LOGITS` at a time.

    Returns:
        (nll, num_tokens): nats summed over tokens; how many there were.

    Source: Hao et al. 2024 (arXiv:2412.06769), section 3: no loss on question or thoughts.
    """
    targets_BT = labels_BT[:, 1:]
    is_supervised_BT = targets_BT != IGNORED
    hidden_ND, targets_N = hidden_BTD[:, :-1][is_supervised_BT], targets_BT[is_supervised_BT]
    chunk_size = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)
    nll = hidden_BTD.new_zeros((), dtype=torch.float32)
    chunks = zip(hidden_ND.split(chunk_size), targets_N.split(chunk_size), strict=True)
    for chunk_hidden_ND, chunk_targets_N in chunks:
        if len(targets_N) > chunk_size and torch.is_grad_enabled():
            # Recomputed in the backward pass, so that one chunk's logits are all that is ever held.
            nll = nll + checkpoint(_chunk_nll, model, chunk_hidden_ND, chunk_targets_N, layers, use_reentrant=False)
        else:
            nll = nll + _chunk_nll(model, chunk_hidden_ND, chunk_targets_N, layers)
    return nll, len(targets_N)


def _chunk_nll(model: PreTrainedModel, hidden_ND: Tensor, targets_N: Tensor, layers: BatchLayers | None) -> Tensor:
    with nullcontext() if layers is None else layers.active():
        logits_NV = output_logits(model, hidden_ND)
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def latent_nll(
    model: PreTrainedModel,
    feedback: Feedback,
    *,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    position_ids_BT: Tensor,
    is_latent_BT: Tensor,
    labels_BT: Tensor,
    checkpoint_activations: bool = False,
) -> tuple[Tensor, int]:
    """Sum the loss of a batch of views, thoughts fed back; see `read_columns`, `supervised_nll`."""
    reading = read_columns(
        model,
        feedback,
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        position_ids_BT=position_ids_BT,
        is_latent_BT=is_latent_BT,
        checkpoint_activations=checkpoint_activations,
    )
    return supervised_nll(model, reading.hidden_BTD, labels_BT, layers=reading.layers)
