"""A decoder that says steps from thoughts, trained beside a model; what methods of SIM-CoT share.

Legend: B rows of a micro-batch, G steps that are said, C thoughts that stand for a step, S tokens of a step without
<eos>, T columns that the decoder reads, N tokens that it says, D hidden.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coconut.data.views import IGNORED
from coconut.model.head import num_positions, output_logits

if TYPE_CHECKING:
    from coconut.training.reading import Reading

Targets = Sequence[Sequence[list[int]]]
"""Of each row, the ids that its first groups of thoughts stand for, <eos> included."""


class StepDecoder(nn.Module):
    """A language model without input embeddings: it reads those of the model beside which it is trained.

    Args:
        folder: of the `config.json` of which it is built, with fresh weights; None for a copy of the model.
    """

    def __init__(self, folder: str | None, model: PreTrainedModel, seed: int) -> None:
        super().__init__()
        width = model.config.get_text_config().hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = copy.deepcopy(model) if folder is None else _fresh_model(folder, model)
            own_width = self.decoder.config.get_text_config().hidden_size
            is_as_wide = own_width == width
            self.entry = nn.Identity() if is_as_wide else nn.Linear(width, own_width, dtype=model.dtype)
        self.decoder.set_input_embeddings(nn.Identity())
        self.eval()  # In this mode, it has no dropout.

    def forward(
        self, reading: "Reading", targets: Targets, *, group_size: int, first_position: int, per_token: bool
    ) -> Tensor:
        """Return the loss of each row: a mean over its targets of the nats of their tokens; 0 without a target, B.

        Args:
            first_position: of the decoder's columns.
            per_token: whether the nats of a target are divided by the number of its tokens.
        """
        nll_G = self._nll(reading, targets, group_size, first_position)
        if per_token:
            nll_G = nll_G / nll_G.new_tensor([len(ids) for own in targets for ids in own])
        counts = [len(own) for own in targets]
        sums_B = torch.stack([own.sum() for own in nll_G.split(counts)])
        return sums_B / sums_B.new_tensor(counts).clamp(min=1)

    def _nll(self, reading: "Reading", targets: Targets, group_size: int, first_position: int) -> Tensor:
        """Return the nats of all targets, row after row, G."""
        said = [(row, group, ids) for row, own in enumerate(targets) for group, ids in enumerate(own)]
        if not said:
            return reading.hidden_BTD.new_zeros(0, dtype=torch.float32)
        device, longest = reading.hidden_BTD.device, max(len(ids) for _, _, ids in said)
        positions_1T = torch.arange(first_position, first_position + group_size + longest - 1, device=device)[None]
        if (room := num_positions(self.decoder)) < first_position + positions_1T.shape[1]:
            raise ValueError(f"explain_model: found {room} positions, wanted more, for a step of {longest} tokens")
        # A column's label is the token that follows it; the last thought's is the first token of the step.
        labels = [[IGNORED] * (group_size - 1) + ids + [IGNORED] * (longest - len(ids)) for _, _, ids in said]
        on_cpu_GT = torch.tensor(labels)
        places_N = (on_cpu_GT.flatten() != IGNORED).nonzero().flatten().to(device, non_blocking=True)
        labels_GT = on_cpu_GT.to(device, non_blocking=True)
        rows_G1 = torch.tensor([[row] for row, _, _ in said], device=device)
        first_slots_G1 = torch.tensor([[group * group_size] for _, group, _ in said], device=device)
        slots_GC = first_slots_G1 + torch.arange(group_size, device=device)
        words_GSD = reading.passes.embed(labels_GT[:, group_size - 1 : -1].clamp(min=0))
        thoughts_GCD = reading.thoughts[rows_G1, slots_GC].to(words_GSD.dtype)
        # Padding stands on the right, where no column of a step sees it.
        hidden_GTD = self.decoder.base_model(
            inputs_embeds=self.entry(torch.cat([thoughts_GCD, words_GSD], dim=1)),
            position_ids=positions_1T,
            use_cache=False,
        ).last_hidden_state
        hidden_ND, labels_N = (part.flatten(0, 1).index_select(0, places_N) for part in (hidden_GTD, labels_GT))
        nll_N = self._nll_of_tokens(hidden_ND, labels_N, reading.passes.options.max_logits)
        nll_GT = nll_N.new_zeros(labels_GT.numel()).index_copy(0, places_N, nll_N).view_as(labels_GT)
        return nll_GT.sum(dim=1)

    def _nll_of_tokens(self, hidden_ND: Tensor, labels_N: Tensor, max_logits: int) -> Tensor:
        """Return the nats of each token, N; so many logits exist at once at most."""
        num_tokens = max(1, max_logits // self.decoder.config.get_text_config().vocab_size)
        if len(labels_N) <= num_tokens:
            return self._chunk_nll(hidden_ND, labels_N)
        chunks = zip(hidden_ND.split(num_tokens), labels_N.split(num_tokens), strict=True)
        return torch.cat([checkpoint(self._chunk_nll, *chunk, use_reentrant=False) for chunk in chunks])

    def _chunk_nll(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        return functional.cross_entropy(output_logits(self.decoder, hidden_ND).float(), labels_N, reduction="none")


def _fresh_model(folder: str, model: PreTrainedModel) -> PreTrainedModel:
    """Build the model of a `config.json`, with the vocabulary of another one."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text_config = config.get_text_config()
    text_config.vocab_size = model.config.get_text_config().vocab_size
    text_config.bos_token_id = text_config.eos_token_id = text_config.pad_token_id = None
    attention = model.config._attn_implementation
    built: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
    return built
