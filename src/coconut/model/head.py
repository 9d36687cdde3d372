"""The output head, and the number of positions that a model has. Legend: D hidden, V vocabulary."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut.config.positions import num_positions as config_positions

_NO_LIMIT = 1 << 30
"""More columns than fit into any memory; a config may hold numbers that no tensor can."""


def num_positions(model: PreTrainedModel) -> int:
    """Return how many columns the model can tell apart, or a very large number if it has no limit."""
    return min(config_positions(model.config.get_text_config().to_dict()) or _NO_LIMIT, _NO_LIMIT)


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Turn hidden states after the final norm (..., D) into logits (..., V), as the model itself does.

    Some families scale the head's output (Cohere, Granite) or cap it (Gemma 2);
    `checkpoints.support` proves that a model does no more than that.
    """
    logits: Tensor = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None) is not None:
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits
