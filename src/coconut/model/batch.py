"""What the mathematics needs of a padded batch. Legend: B rows, T columns."""

# ruff: noqa: N802 - shape suffixes, of what would be fields if protocols had read-only ones.

from typing import Protocol

from torch import Tensor


class Batch(Protocol):
    """Tensors of one shape, B x T; `coconut.data.collator.Batch` is one."""

    @property
    def host(self) -> "Batch":
        """The same on the CPU. Decisions are read there: to ask an accelerator is to wait for all its work."""

    @property
    def input_ids_BT(self) -> Tensor: ...

    @property
    def attention_mask_BT(self) -> Tensor:
        """1 where a column holds something, 0 on padding."""

    @property
    def position_ids_BT(self) -> Tensor:
        """Counted per row, from 0 at the row's first real column."""

    @property
    def is_latent_BT(self) -> Tensor:
        """True where the input embedding is a vector that is fed back."""

    @property
    def labels_BT(self) -> Tensor:
        """Ids of the supervised tokens; `latent.IGNORED` elsewhere."""


def latent_columns(batch: Batch) -> list[int]:
    """List the columns that are latent in any row."""
    columns: list[int] = batch.host.is_latent_BT.any(dim=0).nonzero().flatten().tolist()
    return columns
