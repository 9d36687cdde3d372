"""Padded batches of views.

Legend: B rows, T columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coconut.data.views import IGNORED, View


class Batch(NamedTuple):
    """What the model's functions take, as `**batch._asdict()`. All tensors are B x T."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """1 where a column holds something, 0 on padding."""
    position_ids_BT: Tensor
    is_latent_BT: Tensor
    """Where the input embedding is a fed-back vector."""
    labels_BT: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def num_columns(self) -> int:
        return self.input_ids_BT.numel()


def collate(views: Sequence[View], *, pad_id: int) -> Batch:
    """Pad on the left so that the first slots of all rows share a column, and on the right after that.

    With questions of 2 and 1 tokens, 2 and 0 slots (`L`), `.` for padding:

        q q L L s a        input_ids
        . q s s a .

    Aligned rows make one pass per latent column serve the whole batch. Masked columns get
    position 0, not a count: GPT-2 has only 1024 position embeddings.

    >>> long = View([1, 2, 9, 9, 5, 6], [-100] * 4 + [5, 6], prefix_length=2, num_slots=2, num_thoughts=2)
    >>> short = View([3, 5, 5, 6], [-100, 5, 5, 6], prefix_length=1, num_slots=0, num_thoughts=0)
    >>> batch = collate([long, short], pad_id=0)
    >>> batch.input_ids_BT.tolist()
    [[1, 2, 9, 9, 5, 6], [0, 3, 5, 5, 6, 0]]
    >>> batch.position_ids_BT.tolist()
    [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 0]]
    >>> batch.is_latent_BT.int().tolist()
    [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    """
    first_slot = max(view.prefix_length for view in views)
    num_columns = first_slot + max(len(view.input_ids) - view.prefix_length for view in views)
    ids, mask, positions, latents, labels = [], [], [], [], []
    for view in views:
        left, length = first_slot - view.prefix_length, len(view.input_ids)
        right = num_columns - left - length
        ids.append([pad_id] * left + view.input_ids + [pad_id] * right)
        mask.append([0] * left + [1] * length + [0] * right)
        positions.append([0] * left + list(range(length)) + [0] * right)
        latents.append([False] * first_slot + [True] * view.num_thoughts)
        latents[-1] += [False] * (num_columns - len(latents[-1]))
        labels.append([IGNORED] * left + view.labels + [IGNORED] * right)
    return Batch(
        torch.tensor(ids),
        torch.tensor(mask),
        torch.tensor(positions),
        torch.tensor(latents, dtype=torch.bool),
        torch.tensor(labels),
    )
