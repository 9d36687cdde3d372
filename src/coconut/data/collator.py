"""Padded batches of views.

Legend: B rows, T columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coconut.data.views import IGNORED, View


class Batch(NamedTuple):
    """The tensors that the model's functions take. Each is B x T."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """1 in columns that hold a token or a thought, 0 on padding."""
    position_ids_BT: Tensor
    is_latent_BT: Tensor
    """True in columns whose input embedding is a fed-back vector."""
    labels_BT: Tensor
    original: "Batch | None" = None
    """Of a copy on an accelerator: what it was copied from."""

    @property
    def host(self) -> "Batch":
        """The same tensors on the CPU; what is read from them waits for no accelerator."""
        return self.original or self

    def to(self, device: torch.device | str) -> "Batch":
        """Return a copy on an accelerator, made in one piece and without waiting for it; for the CPU, `host`."""
        device = torch.device(device)
        if device.type == "cpu":
            return self.host
        ids, mask, positions, is_latent, labels, _ = self.host
        together = torch.stack([ids, mask, positions, is_latent.long(), labels])
        if device.type == "cuda":
            together = together.pin_memory()  # From other memory the copy would begin with a copy.
        ids, mask, positions, is_latent, labels = together.to(device, non_blocking=True).unbind()
        return Batch(ids, mask, positions, is_latent.bool(), labels, original=self.host)

    @property
    def num_columns(self) -> int:
        return self.input_ids_BT.numel()


def collate(views: Sequence[View], *, pad_id: int, min_columns: int = 0) -> Batch:
    """Pad rows on the left until their first slots share a column, and then on the right.

    This is the result for questions of 2 and 1 tokens with 2 and 0 slots (`L`); `.` is padding:

        q q L L s a        input_ids
        . q s s a .

    If rows are aligned, one pass per latent column serves the whole batch. Masked columns get position 0
    and are not counted, because GPT-2 has only 1024 position embeddings.

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
    num_columns = max(num_columns, min_columns)
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
