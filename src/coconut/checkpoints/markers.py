"""The three markers in a vocabulary."""

from typing import Any

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut.checkpoints.weights import quiet_transformers
from coconut.data.examples import MARKERS

# --- markers --------------------------------------------------------------------------------


def add_markers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and embeddings the three markers; those that are there already stay as they are.

    Rows that no token had used start as copies of the row of `<<`, or of the mean row where that is not
    one token. The embeddings grow if they must (Qwen's have rows to spare) and never shrink.

    Source: Hao et al. 2024 (arXiv:2412.06769), the authors' code.
    """
    from tokenizers import AddedToken

    known_ids = tokenizer.get_vocab()
    num_known = max(known_ids.values()) + 1
    new_markers = [marker for marker in MARKERS if marker not in known_ids]
    tokenizer.add_tokens([AddedToken(marker, normalized=False, special=True) for marker in new_markers], True)
    marker_ids = tokenizer.convert_tokens_to_ids(new_markers)
    num_rows = model.get_input_embeddings().weight.shape[0]
    num_needed = max([num_known, *(index + 1 for index in marker_ids)])
    if num_needed > num_rows:
        # It draws the new rows first; they are overwritten, but the draws would move every later one.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(num_needed, mean_resizing=False)
    missing = [token for token, index in known_ids.items() if index >= num_rows and token not in MARKERS]
    if missing:
        logger.warning(
            "{} tokens of the tokenizer have no row in the embeddings, {} among them; their rows start like those of"
            " the markers and have to be trained; if weights and tokenizer are of different models, fetch them again",
            *(len(missing), ", ".join(map(repr, sorted(missing, key=known_ids.__getitem__)[:8]))),
        )
    new_rows = sorted({*marker_ids, *range(num_rows, num_needed)})
    like = tokenizer.encode("<<", add_special_tokens=False)
    has_like = len(like) == 1 and like[0] != tokenizer.unk_token_id
    source = slice(like[0], like[0] + 1) if has_like else slice(0, min(num_known, num_rows))
    for rows in _vocabulary_rows(model):
        rows[new_rows] = rows[source].mean(dim=0)


def _vocabulary_rows(model: PreTrainedModel) -> list[Tensor]:
    """Every tensor with one row per token: input embeddings, the head's weight unless tied, its bias."""
    weight: Tensor = model.get_input_embeddings().weight.data
    head: Any = model.get_output_embeddings()
    tensors = [weight]
    if head.weight.data_ptr() != weight.data_ptr():
        tensors.append(head.weight.data)
    if getattr(head, "bias", None) is not None:
        tensors.append(head.bias.data)
    return tensors
