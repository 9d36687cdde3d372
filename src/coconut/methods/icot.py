"""Stepwise internalisation: the reasoning is removed token by token, from its left end.

Source: Deng et al. 2024 (arXiv:2405.14838), section 3, and the authors' code, where the values are 8 tokens per epoch,
all of them from 39 on (GSM8K), and a fresh optimizer at every step of the count.
"""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from coconut.config.schema import Count, Entry, Positive
from coconut.data.encoding import EncodedExample
from coconut.data.layouts import ALL_TOKENS
from coconut.methods import Layout, Method, State

_SHOWN, _NEXT = "num_removed_tokens", "num_removed_at_end"
"""How many tokens the last update had removed, and how many the next one will."""


@dataclass(frozen=True)
class Keys:
    icot_tokens_per_epoch: Positive
    """Reasoning tokens that each epoch removes."""
    icot_smoothing: Positive
    """Rate of the exponential that removes some extra tokens; 4 in the original."""
    icot_remove_all_at: Count | None = None
    """Number of removed tokens at which all reasoning is removed; 39 in the original on GSM8K."""


class StepwiseInternalisation(Method):
    """A growing number of tokens is removed from the left of the reasoning, the same for all rows of an update.

    There are two differences from the authors' code. It raises the number every `round(updates of an epoch / tokens
    per epoch)` updates, which drifts from the requested rate; here it is exact at the end of each epoch. It begins to
    remove after the question's separator, and keeps the separator before the answer; here the line break at the end of
    a step is removed with the step.
    """

    Keys = Keys
    example_keys: ClassVar[Mapping[str, Any]] = {"icot_tokens_per_epoch": 4.0, "icot_smoothing": 4.0}
    state_names = (_SHOWN, _NEXT)
    paper_arm = "iCoT"

    def check(self, entry: Entry) -> None:
        if entry.train.select != "last":
            raise ValueError(
                f"select: found {entry.train.select!r}, wanted 'last' with method {entry.method}, whose early epochs"
                " are scored with more of the reasoning left"
            )

    def layout(self, stage: int, *, num_steps: int | None = None, state: State | None = None) -> Layout:
        return Layout(num_dropped_tokens=(state or {}).get(_SHOWN, 0))

    def draw_layout(self, num_steps: int, draw: random.Random, state: State) -> Layout:
        """Remove what the schedule says, and now and then more, so that the model sees later stages in advance."""
        layout = super().draw_layout(num_steps, draw, state)
        return replace(layout, num_dropped_tokens=state[_NEXT] + draw_extra(self.keys.icot_smoothing, draw))

    def state_at(self, update: int, updates_per_epoch: int, parent: State) -> State:
        start = parent.get(_NEXT, 0)
        shown = self.count_removed(max(0, update - 1), updates_per_epoch=updates_per_epoch, start=start)
        return {_SHOWN: shown, _NEXT: self.count_removed(update, updates_per_epoch=updates_per_epoch, start=start)}

    def restarts_optimizer(self, state: State, examples: Iterable[EncodedExample]) -> bool:
        """Say whether an update is the first that removes more of what its rows still showed.

        The learning rate does not warm up again: at a few tokens per epoch it would never be warm.
        """
        if state[_NEXT] <= state[_SHOWN]:
            return False
        return max((sum(map(len, example.steps_ids)) for example in examples), default=0) > state[_SHOWN]

    def count_removed(self, update: int, *, updates_per_epoch: int, start: int = 0) -> int:
        """Return how many reasoning tokens are removed from the left of every example in an update, counted from 0.

        The number grows evenly over the updates, by `icot_tokens_per_epoch` in an epoch. If a row has fewer reasoning
        tokens, its view has none left.

        Args:
            start: The number that the parent entry had come to.

        >>> method = StepwiseInternalisation(0, None, Keys(2.0, 4.0, 5))
        >>> [method.count_removed(update, updates_per_epoch=4) for update in (0, 1, 2, 4, 9)]
        [0, 0, 1, 2, 4]
        >>> method.count_removed(10, updates_per_epoch=4) == ALL_TOKENS
        True
        """
        keys = self.keys
        # The small addend corrects products like 3130 x 2.3 / 313, which rounding leaves below a whole number.
        count: int = start + math.floor(update * keys.icot_tokens_per_epoch / updates_per_epoch + 1e-9)
        if keys.icot_remove_all_at is not None and count >= keys.icot_remove_all_at:
            return ALL_TOKENS
        return min(count, ALL_TOKENS)


def draw_extra(rate: float, draw: random.Random) -> int:
    """Draw how many tokens are removed in addition to the schedule.

    The number is o with probability (1 - exp(-rate)) x exp(-rate x o), so that the model sees later stages
    of the schedule in advance. With the authors' rate, 4, the number is 0 with probability .982.
    """
    return min(ALL_TOKENS, int(-math.log(1.0 - draw.random()) / rate))
