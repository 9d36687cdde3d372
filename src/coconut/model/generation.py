"""Decoding after thoughts: batched, on one key-value cache.

A batch gives, token for token, what decoding each row alone without a cache gives: prompts are padded on the left,
every row counts its own positions, and a row ends at its own end-of-sequence token, never at padding.

Legend: B rows, T columns of the prompt.
"""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coconut.model.batch import Batch
from coconut.model.choice import open_passes
from coconut.model.feedback import Feedback
from coconut.model.head import num_positions
from coconut.model.latent import read_columns
from coconut.model.passes import PassOptions, PlainPasses


@dataclass
class Decoded:
    """The tokens that one row generated."""

    ids: list[int] = field(default_factory=list)
    """Without the end-of-sequence token."""
    num_tokens: int = 0
    """Generated tokens, the end-of-sequence token included."""
    truncated: bool = True
    """Whether the row was cut off before its end-of-sequence token."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    feedback: Feedback,
    batch: Batch,
    *,
    eos_ids: Collection[int],
    max_new_tokens: int | Sequence[int],
    options: PassOptions | None = None,
    max_share_kept: float = 7 / 8,
    not_first: Collection[int] = (),
) -> list[Decoded]:
    """Decode greedily after a left-padded batch of prompts.

    Args:
        max_new_tokens: one limit, or one per row.
        max_share_kept: finished rows leave the batch once at most this share of it is still running; it costs a
            copy of the whole cache of those that stay.
        not_first: ids that no answer may begin with.

    Returns:
        One `Decoded` per row, in the order of the rows.
    """
    num_rows = len(batch.input_ids_BT)
    limits = [max_new_tokens] * num_rows if isinstance(max_new_tokens, int) else list(max_new_tokens)
    assert bool(batch.host.attention_mask_BT[:, -1].all()), "prompts must be padded on the left"
    num_further = max(0, max(limits, default=0) - 1)
    with closing(
        open_passes(model, batch, feedback, options or PassOptions(), num_further_columns=num_further)
    ) as passes:
        last_BD = read_columns(passes, feedback, batch)[:, -1]
        running = Running(passes, batch.position_ids_BT[:, -1], last_BD, barred=not_first)
        return decode(running, limits, eos_ids, max_share_kept=max_share_kept)


def decode(
    running: "Running", limits: Sequence[int], eos_ids: Collection[int], *, max_share_kept: float = 7 / 8
) -> list[Decoded]:
    """Decode until every row has ended or reached its limit; see `generate`."""
    decoded, eos = [Decoded() for _ in running.rows], frozenset(eos_ids)
    while True:
        next_ids_B = running.next_ids()
        places = [
            place
            for place, (row, token) in enumerate(zip(running.rows, next_ids_B.tolist(), strict=True))
            if _takes_more(decoded[row], token, limits[row], eos)
        ]
        if not places:
            return decoded
        if len(places) <= max_share_kept * len(running.rows):
            running.select(places)
            next_ids_B = next_ids_B[places]
        running.advance(next_ids_B)


def _takes_more(row: Decoded, token: int, limit: int, eos: Collection[int]) -> bool:
    """Add a token to a row that is still running; say whether it runs on."""
    if not row.truncated or row.num_tokens >= limit:
        return False
    row.num_tokens += 1
    if token in eos:
        row.truncated = False
        return False
    row.ids.append(token)
    return row.num_tokens < limit


Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""(logits, B x V; the numbers of their rows; how many tokens each has) -> the next token of each row."""


def most_probable(logits_BV: Tensor, _rows: Sequence[int], _step: int) -> Tensor:
    """Choose greedily."""
    return logits_BV.argmax(dim=-1)


@dataclass
class Running:
    """The rows that are being decoded, a few of which may have ended."""

    passes: PlainPasses
    positions_B: Tensor
    """Of each row's last column."""
    last_BD: Tensor
    """Hidden state of each row's last column."""
    choose: Choose = most_probable
    barred: Collection[int] = ()
    """Ids that the next token of no row may be."""

    def __post_init__(self) -> None:
        self.rows = list(range(len(self.positions_B)))
        """The numbers of those that are left."""
        self.num_steps = 0
        """Tokens that each of them has."""
        self._last_position = num_positions(self.passes.model) - 1

    def next_ids(self) -> Tensor:
        """Choose the next token of each row."""
        logits_BV = self.passes.logits(self.last_BD)
        if not math.isfinite(logits_BV.amax().item()):  # That of NaN is NaN.
            raise ValueError(
                f"{self.passes.model.name_or_path or 'the model'}: found logits that are infinite or not a number,"
                " wanted finite ones; its weights are damaged, or its training went wrong: `dvc repro` restores them"
            )
        if self.barred:
            logits_BV[:, list(self.barred)] = -torch.inf
            self.barred = ()
        ids_B = self.choose(logits_BV, self.rows, self.num_steps)
        self.num_steps += 1
        return ids_B

    def select(self, places: list[int]) -> None:
        """Keep only these rows."""
        index = torch.tensor(places)
        self.rows = [self.rows[place] for place in places]
        self.passes.select(index)
        self.positions_B = self.positions_B[index.to(self.positions_B.device, non_blocking=True)]

    def advance(self, ids_B: Tensor) -> None:
        """Read one more token in every row."""
        # A row that has ended and is still here must not run out of the positions that the model has.
        self.positions_B = (self.positions_B + 1).clamp(max=self._last_position)
        output = self.passes.read(self.passes.embed(ids_B[:, None]), self.positions_B[:, None])
        self.last_BD = output.last_hidden_state[:, -1]
