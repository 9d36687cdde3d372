"""Which steps of an example are gone, and how many slots stand in their place.

One function decides, for training and for evaluation: `plan_view`.

| method | text of the solution that is gone | slots before the answer |
|---|---|---|
| `cot` | nothing | none |
| `no_cot` | all of it | none |
| `coconut` | the first k steps | k x `c_thought` thoughts |
| `no_thoughts` | the first k steps | none |
| `pause_as_thought` | the first k steps | k x `c_thought` pause tokens |
| `pause` | all of it | `max_latent_stage` x `c_thought` pause tokens |
| `icot` | the first tokens, ever more of them | none |

k is the latent stage, at most `max_latent_stage`; beyond that all steps are gone. A pause token is
`<|latent|>` with its own trained embedding; all of them are read in one pass. Markers stand
around slots only, also where there are 0 of them; methods without slots have none.

Source: Hao et al. 2024 (arXiv:2412.06769), sections 3 and 4.2; for `icot` see `count_removed`.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

from coconut.config.schema import Entry, LatentConfig, Method

ALL_STEPS = 1_000_000
"""More steps than any example has."""
ALL_TOKENS = 1_000_000
"""More reasoning tokens than any example has."""

Slot = Literal["thought", "pause"]


@dataclass(frozen=True)
class ViewPlan:
    """The shape of a view, before it meets an example."""

    num_dropped_steps: int
    num_latents: int
    slot: Slot = "thought"
    """`thought`: the slot holds a fed-back vector. `pause`: it keeps the embedding of `<|latent|>`."""
    markers: bool = False
    num_dropped_tokens: int = 0
    """Reasoning tokens removed from the left of what the steps still hold (`icot`)."""


def plan_view(
    method: Method,
    latent_stage: int,
    latent: LatentConfig,
    *,
    num_steps: int | None = None,
    num_removed_tokens: int = 0,
) -> ViewPlan:
    """Say what a view at `latent_stage` looks like.

    Up to `max_latent_stage` the first k steps go and k x `c_thought` slots come; beyond it all
    steps go and max_latent_stage x `c_thought` slots come.

    Args:
        num_steps: of a training example. Leave it out at evaluation, where the number of slots
            must not depend on the gold solution; it matters only if `pad_latent_to_max` is off.
        num_removed_tokens: of `icot`, see `count_removed`; other methods do not look at it.

    >>> config = LatentConfig(2, 3, True, True, 0.0, "hidden[-1]", 0)
    >>> plan_view("coconut", 1, config)
    ViewPlan(num_dropped_steps=1, num_latents=2, slot='thought', markers=True, num_dropped_tokens=0)
    >>> plan_view("coconut", 4, config) == ViewPlan(ALL_STEPS, 6, markers=True)
    True

    Source: Hao et al. 2024 (arXiv:2412.06769), section 3, and their released configuration.
    """
    if method == "cot":
        return ViewPlan(0, 0)
    if method == "icot":
        return ViewPlan(0, 0, num_dropped_tokens=num_removed_tokens)
    if method == "no_cot":
        return ViewPlan(ALL_STEPS, 0)
    if method == "pause":
        return ViewPlan(ALL_STEPS, latent.max_latent_stage * latent.c_thought, "pause", latent.markers)
    num_dropped = latent_stage if latent_stage <= latent.max_latent_stage else ALL_STEPS
    if method == "no_thoughts":
        return ViewPlan(num_dropped, 0)
    num_slots = min(latent_stage, latent.max_latent_stage)
    if num_steps is not None and not latent.pad_latent_to_max:
        num_slots = min(num_slots, num_steps)
    slot: Slot = "pause" if method == "pause_as_thought" else "thought"
    return ViewPlan(num_dropped, num_slots * latent.c_thought, slot, latent.markers)


def draw_plan(entry: Entry, num_steps: int, generator: random.Random, *, num_removed_tokens: int = 0) -> ViewPlan:
    """The plan of one training example in one epoch; with `uniform_prob` at a random stage 0..num_steps.

    Mixing applies to the methods that have stages; the generator is used in every case, so
    that what it yields next does not depend on the outcome. `icot` loses some tokens more than
    the schedule says, as many as `draw_extra` tells.
    """
    is_mixed = generator.random() < entry.latent.uniform_prob
    random_stage = generator.randint(0, num_steps)
    staged = entry.method in ("coconut", "no_thoughts", "pause_as_thought")
    stage = random_stage if is_mixed and staged else entry.latent_stage
    if entry.method == "icot" and entry.icot_smoothing is not None:
        num_removed_tokens += draw_extra(entry.icot_smoothing, generator)
    return plan_view(entry.method, stage, entry.latent, num_steps=num_steps, num_removed_tokens=num_removed_tokens)


# --- stepwise internalisation ---------------------------------------------------------------


def count_removed(entry: Entry, *, update: int, updates_per_epoch: int, start: int = 0) -> int:
    """How many reasoning tokens `icot` has removed, from the left of every example, before `update` (from 0).

    The count grows evenly over the updates, by `icot_tokens_per_epoch` in an epoch, and not in one
    leap between epochs. A row whose reasoning is shorter goes from the question to the answer. From
    `icot_remove_all_at` removed tokens on, where that is given, all reasoning is gone from every row.

    Two things differ from the authors' code. It raises the count every `round(updates of an epoch /
    tokens per epoch)` updates, which drifts from what was asked; ours is exact at every epoch's end.
    It removes from the token after the question's separator, and keeps the separator before the answer;
    here a step ends with its own line break, which goes with it.

    Args:
        start: tokens that the parent entry had removed at its end, if it was `icot` too.

    >>> from types import SimpleNamespace
    >>> entry = SimpleNamespace(icot_tokens_per_epoch=2.0, icot_remove_all_at=5)
    >>> [count_removed(entry, update=update, updates_per_epoch=4) for update in (0, 1, 2, 4, 9)]
    [0, 0, 1, 2, 4]
    >>> count_removed(entry, update=10, updates_per_epoch=4) == ALL_TOKENS
    True

    Source: Deng et al. 2024 (arXiv:2405.14838), section 3, and the authors' code, where the values are
    8 tokens per epoch, all of them from 39 on (GSM8K), and a fresh optimiser at every step of the count.
    """
    if entry.icot_tokens_per_epoch is None:
        return 0
    # The sum before the floor makes up for products like 3130 x 2.3 / 313, which fall short of a whole number.
    count = start + math.floor(update * entry.icot_tokens_per_epoch / updates_per_epoch + 1e-9)
    if entry.icot_remove_all_at is not None and count >= entry.icot_remove_all_at:
        return ALL_TOKENS
    return min(count, ALL_TOKENS)


def draw_extra(rate: float, generator: random.Random) -> int:
    """Draw the tokens that go beyond the schedule: o of them with probability (1 - exp(-rate)) x exp(-rate x o).

    So the model meets every later stage of the schedule a little beforehand. With the original's
    rate, 4, a row keeps to the schedule with probability .982.

    Source: Deng et al. 2024 (arXiv:2405.14838), section 3.
    """
    return min(ALL_TOKENS, int(-math.log(1.0 - generator.random()) / rate))
