"""Random float32 models of each supported family, small enough that a test builds one in milliseconds."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 64
EOS_ID = 1

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GEMMA_LIKE: dict[str, Any] = _LLAMA_LIKE | {"head_dim": 8, "query_pre_attn_scalar": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE | {"tie_word_embeddings": True},
    "qwen3": _LLAMA_LIKE | {"head_dim": 8, "tie_word_embeddings": True},
    "mistral": _LLAMA_LIKE | {"sliding_window": None},
    "phi3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE | {"head_dim": 8},
    "gemma2": _GEMMA_LIKE,
    "gemma3_text": _GEMMA_LIKE,
}
"""Family -> what its config needs besides the common values. All have 2 layers, 32 wide, 128 positions."""


def build_tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a random model in evaluation mode; `overrides` go into its config, for other families too.

    Weights are drawn five times wider than a fresh model's, so that different inputs give clearly
    different logits: a test with a bug of position or mask must not pass on a nearly constant output.
    """
    config = AutoConfig.for_model(family, **(_COMMON | FAMILIES.get(family, {}) | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
    model.eval()
    return model
