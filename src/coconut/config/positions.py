"""How many positions a model has, by its `config.json`."""

from collections.abc import Mapping
from typing import Any

_TEXT_CONFIGS = ("text_config", "decoder", "generator", "text_encoder")
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names of the same number; families differ."""


def num_positions(config: Mapping[str, Any]) -> int | None:
    """Return how many columns a model can tell apart, or None if it has no limit.

    Args:
        config: The fields of a `config.json`, or `model.config.to_dict()`.

    >>> num_positions({"model_type": "gpt2", "n_positions": 1024})
    1024
    >>> num_positions({"model_type": "gemma3", "text_config": {"max_position_embeddings": 8192}})
    8192
    """
    text_config = next((config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), Mapping)), config)
    numbers = (text_config.get(name) for name in _NAMES)
    return next((number for number in numbers if type(number) is int and number > 0), None)
