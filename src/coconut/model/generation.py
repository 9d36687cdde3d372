"""Greedy decoding after thoughts: batched, on one key-value cache.

Legend: B rows, T columns of the prompt, V vocabulary.

A batch gives, token for token, what decoding each row alone without a cache gives: prompts are
padded on the left, every row counts its own positions, and a row ends at its own end-of-sequence
token, never at padding.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from coconut.model.fast.layers import BatchLayers
from coconut.model.feedback import Feedback
from coconut.model.head import num_positions, output_logits
from coconut.model.latent import read_columns, read_pass

MAX_SHARE_KEPT = 7 / 8
"""Rows that are done leave the batch once this share is running: leaving copies the whole cache of those that stay."""


@dataclass
class Decoded:
    """What one row generated."""

    ids: list[int] = field(default_factory=list)
    """Without the end-of-sequence token."""
    num_tokens: int = 0
    """Generated tokens, the end-of-sequence token included."""
    truncated: bool = True
    """True if the row was cut off before it said that it was done."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    feedback: Feedback,
    *,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    position_ids_BT: Tensor,
    is_latent_BT: Tensor,
    eos_ids: Collection[int],
    max_new_tokens: int | Sequence[int],
) -> list[Decoded]:
    """Decode greedily after a left-padded batch of prompts.

    Args:
        max_new_tokens: one limit, or one per row.

    Returns:
        One `Decoded` per row, in the order of the rows.
    """
    num_rows = input_ids_BT.shape[0]
    limits = [max_new_tokens] * num_rows if isinstance(max_new_tokens, int) else list(max_new_tokens)
    assert bool(attention_mask_BT[:, -1].all()), "prompts must be padded on the left"
    decoded = [Decoded() for _ in range(num_rows)]
    reading = read_columns(
        model,
        feedback,
        input_ids_BT=input_ids_BT,
        attention_mask_BT=attention_mask_BT,
        position_ids_BT=position_ids_BT,
        is_latent_BT=is_latent_BT,
        num_further_columns=max(0, max(limits, default=0) - 1),
    )
    batch = _Running(
        model=model,
        layers=reading.layers,
        rows=list(range(num_rows)),
        cache=reading.cache,
        mask_BT=attention_mask_BT,
        positions_B=position_ids_BT[:, -1],
        last_BD=reading.hidden_BTD[:, -1],
    )
    del reading
    eos = frozenset(eos_ids)
    while True:
        next_ids_B = batch.next_ids()
        running = []
        for place, (row, token) in enumerate(zip(batch.rows, next_ids_B.tolist(), strict=True)):
            if not decoded[row].truncated or decoded[row].num_tokens >= limits[row]:
                continue
            decoded[row].num_tokens += 1
            if token in eos:
                decoded[row].truncated = False
                continue
            decoded[row].ids.append(token)
            if decoded[row].num_tokens < limits[row]:
                running.append(place)
        if not running:
            return decoded
        if len(running) <= MAX_SHARE_KEPT * len(batch.rows):
            batch.select(running)
            next_ids_B = next_ids_B[running]
        batch.advance(next_ids_B)


@dataclass
class _Running:
    """The rows that are decoded, a few of which may be done."""

    model: PreTrainedModel
    layers: BatchLayers
    rows: list[int]
    cache: Cache
    mask_BT: Tensor
    positions_B: Tensor
    """Of each row's last column."""
    last_BD: Tensor
    """Hidden state of each row's last column."""

    def next_ids(self) -> Tensor:
        """The most probable next token of each row."""
        with self.layers.active():
            return output_logits(self.model, self.last_BD).argmax(dim=-1)

    def select(self, places: list[int]) -> None:
        """Keep only these rows."""
        index = torch.tensor(places, device=self.mask_BT.device)
        self.rows = [self.rows[place] for place in places]
        self.cache.batch_select_indices(index)
        self.mask_BT, self.positions_B = self.mask_BT[index], self.positions_B[index]

    def advance(self, ids_B: Tensor) -> None:
        """Read one more token in every row."""
        # A row that is done and still here must not run out of the positions that the model has.
        self.positions_B = (self.positions_B + 1).clamp(max=num_positions(self.model) - 1)
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.rows), 1)], dim=1)
        output = read_pass(
            self.model,
            self.model.get_input_embeddings()(ids_B[:, None]),
            attention_mask_BT=self.mask_BT,
            position_ids_BS=self.positions_B[:, None],
            cache=self.cache,
            layers=self.layers,
        )
        self.last_BD = output.last_hidden_state[:, -1]
