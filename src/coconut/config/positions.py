"""How many positions and layers a model has, by its `config.json`."""

from collections.abc import Iterator, Mapping
from typing import Any

_TEXT_CONFIGS = ("text_config", "decoder", "generator", "text_encoder")
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names of the same number; families differ."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_ROPE = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"


def num_positions(config: Mapping[str, Any]) -> int | None:
    """Return how many columns a model can tell apart, or None if it has no limit.

    Some rotary embeddings change for the whole batch once its longest row passes a limit; then that limit counts.

    Args:
        config: The fields of a `config.json`, or `model.config.to_dict()`.

    >>> num_positions({"model_type": "gpt2", "n_positions": 1024})
    1024
    >>> num_positions({"model_type": "gemma3", "text_config": {"max_position_embeddings": 8192}})
    8192
    >>> rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    >>> num_positions({"max_position_embeddings": 131072, "rope_parameters": rope})
    4096
    """
    text_config = _text_config(config)
    numbers = (text_config.get(name) for name in _NAMES)
    stated = next((number for number in numbers if type(number) is int and number > 0), None)
    limits = [number for number in (stated, rope_limit(text_config)) if number is not None]
    return min(limits, default=None)


def num_layers(config: Mapping[str, Any]) -> int | None:
    """Return how many layers a model has, or None where its config.json names them by no known word.

    >>> num_layers({"model_type": "gpt2", "n_layer": 12})
    12
    """
    numbers = (_text_config(config).get(name) for name in _LAYERS)
    return next((number for number in numbers if type(number) is int and number > 0), None)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), Mapping)), config)


def rope_limit(config: Mapping[str, Any]) -> int | None:
    """Return the columns beyond which a row's rotary embeddings depend on the longest row of its batch, or None.

    yarn and llama3 look at no row, and have no such limit; that of dynamic types is the number of positions itself.

    >>> rope_limit({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096})
    4096
    >>> rope_limit({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 4096}})
    """
    for rope in _rope_parameters(config):
        kind = str(rope.get("rope_type", rope.get("type")))
        limit = rope.get(_ORIGINAL, config.get(_ORIGINAL))
        if kind in ("longrope", "su") and type(limit) is int and limit > 0:
            return limit
    return None


def _rope_parameters(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what stands for all layers, or for layers of one kind each."""
    for name in _ROPE:
        rope = config.get(name)
        if isinstance(rope, Mapping):
            yield rope
            yield from (part for part in rope.values() if isinstance(part, Mapping))
