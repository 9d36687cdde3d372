"""The output head: logits, and positions."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut.config.positions import num_positions as config_positions

# --- the output head ------------------------------------------------------------------------


def num_positions(model: PreTrainedModel) -> int:
    """Return how many columns the model can tell apart, or a very large number if it has no limit."""
    return config_positions(model.config.get_text_config().to_dict()) or 1 << 30


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Turn hidden states after the final norm (..., D) into logits (..., V), as the model itself does.

    Beside the head some families scale the logits (Cohere, Granite) or cap them (Gemma 2);
    `check_supported` finds out whether that is all that this model does.
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
