"""Which models can be read in passes."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from coconut.model.head import num_positions, output_logits

_CHECK_COLUMNS = 8
_CHECK_TOLERANCE = 1e-4


@torch.no_grad()
def check_supported(model: PreTrainedModel) -> None:
    """Check that embeddings, body, cache and head, used one by one, give the model's own logits.

    The model reads a few tokens at once; then its body reads their embeddings in two passes over
    one key-value cache, as thoughts require, and `output_logits` follows. This finds models that
    read in both directions, keep their past elsewhere, or do more after the body than we know of.

    Raises:
        ValueError: naming the model's class and what differs.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    # A model with fewer positions than that is a matter of its data, which `encode` judges.
    num_columns = min(_CHECK_COLUMNS, num_positions(model))
    ids_BT = torch.arange(num_columns, device=model.device)[None] % config.vocab_size
    was_training = model.training
    model.eval()
    try:
        wanted_BTV = model(input_ids=ids_BT, use_cache=False).logits
        found_BTV = output_logits(model, _read_in_two_passes(model, ids_BT))
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"model: {name} cannot be read in passes over a key-value cache ({error});"
            " wanted a decoder-only model with attention in every layer"
        ) from error
    finally:
        model.train(was_training)
    if not wanted_BTV.isfinite().all():
        raise ValueError(f"model: the logits of {name} are not finite; its weights are damaged, fetch them again")
    difference = (wanted_BTV - found_BTV).abs().max().item()
    if difference > _CHECK_TOLERANCE * max(1.0, wanted_BTV.abs().max().item()):
        raise ValueError(
            f"model: read in two passes over a key-value cache, {name} gives logits that differ by {difference:.2g}"
            " from those of one pass; wanted a decoder-only model with causal attention in every layer"
            " and a head that is a linear map, scaled or capped at most"
        )


def _read_in_two_passes(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    embeds_BTD = model.get_input_embeddings()(ids_BT)
    columns_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    cut = ids_BT.shape[1] // 2
    hidden_parts = [
        model.base_model(
            inputs_embeds=embeds_BTD[:, columns],
            position_ids=columns_BT[:, columns],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        for columns in (slice(0, cut), slice(cut, None))
    ]
    return torch.cat(hidden_parts, dim=1)
