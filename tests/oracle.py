"""The slow, plain way: every row alone, no cache, everything recomputed for every thought and every token."""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from coconut.data.views import IGNORED, View


def read_row(model: PreTrainedModel, view: View) -> tuple[Tensor, Tensor]:
    """Embeddings (thoughts filled in) and logits of one unpadded row, T x D and T x V."""
    embeds_TD = model.get_input_embeddings()(torch.tensor(view.input_ids))
    for column in range(view.prefix_length, view.prefix_length + view.num_thoughts):
        hidden_TD = _hidden(model, embeds_TD[:column])
        embeds_TD = torch.cat([embeds_TD[:column], hidden_TD[-1:], embeds_TD[column + 1 :]])
    logits_TV = model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0]
    return embeds_TD, logits_TV


def nll(model: PreTrainedModel, views: list[View]) -> tuple[Tensor, int]:
    """Sum of the loss over the rows, each on its own."""
    total, num_tokens = torch.zeros(()), 0
    for view in views:
        _, logits_TV = read_row(model, view)
        targets_T = torch.tensor(view.labels)[1:]
        total = total + functional.cross_entropy(logits_TV[:-1], targets_T, reduction="sum", ignore_index=IGNORED)
        num_tokens += int((targets_T != IGNORED).sum())
    return total, num_tokens


@torch.no_grad()
def generate(model: PreTrainedModel, prompt: View, *, eos_id: int, max_new_tokens: int) -> list[int]:
    """Greedy ids of one row, the end-of-sequence token included if it came."""
    embeds_TD, logits_TV = read_row(model, prompt)
    ids: list[int] = []
    while len(ids) < max_new_tokens:
        ids.append(int(logits_TV[-1].argmax()))
        if ids[-1] == eos_id:
            break
        embeds_TD = torch.cat([embeds_TD, model.get_input_embeddings()(torch.tensor(ids[-1:]))])
        logits_TV = model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0]
    return ids


def _hidden(model: PreTrainedModel, embeds_TD: Tensor) -> Tensor:
    return model.base_model(inputs_embeds=embeds_TD[None], use_cache=False).last_hidden_state[0]
