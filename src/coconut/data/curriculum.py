"""Decides which steps of an example are removed, and how many slots replace them.

`plan_view` decides it for training and for evaluation.

| method | removed text of the solution | slots before the answer |
|---|---|---|
| `cot` | nothing | none |
| `no_cot` | all of it | none |
| `coconut` | the first k steps | k x `c_thought` thoughts |
| `no_thoughts` | the first k steps | none |
| `pause_as_thought` | the first k steps | k x `c_thought` pause tokens |
| `pause` | all of it | `max_latent_stage` x `c_thought` pause tokens |
| `icot` | the first tokens, a growing number of them | none |

k is the latent stage, at most `max_latent_stage`; at later stages all steps are removed. A pause token
is `<|latent|>` with its own trained embedding; all pause tokens are read in one pass. Methods with slots
have markers around them, even if the number of slots is 0. Methods without slots have no markers.

Source: Hao et al. 2024 (arXiv:2412.06769), sections 3 and 4.2; for `icot` see `count_removed`.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

from coconut.config.schema import Entry, LatentConfig, Method

ALL_STEPS = 1_000_000
"""A number of steps that no example reaches."""
ALL_TOKENS = 1_000_000
"""A number of reasoning tokens that no example reaches."""

Slot = Literal["thought", "pause"]


@dataclass(frozen=True)
class ViewPlan:
    """The shape of a view, without the text of an example."""

    num_dropped_steps: int
    num_latents: int
    slot: Slot = "thought"
    """A `thought` slot holds a fed-back vector; a `pause` slot keeps the embedding of `<|latent|>`."""
    markers: bool = False
    num_dropped_tokens: int = 0
    """Number of tokens removed from the left of the remaining steps (`icot`)."""


def plan_view(
    method: Method,
    latent_stage: int,
    latent: LatentConfig,
    *,
    num_steps: int | None = None,
    num_removed_tokens: int = 0,
) -> ViewPlan:
    """Plan a view at `latent_stage`.

    Up to `max_latent_stage`, k x `c_thought` slots replace the first k steps. At later stages,
    max_latent_stage x `c_thought` slots replace all steps.

    Args:
        num_steps: The number of steps of a training example. Leave it out at evaluation, where the number
            of slots must not depend on the gold solution. It matters only if `pad_latent_to_max` is off.
        num_removed_tokens: See `count_removed`. Only `icot` uses it.

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


def all_plans(latent: LatentConfig) -> list[ViewPlan]:
    """Return a plan per latent stage. No method's view is longer than the longest view by these plans."""
    return [plan_view("coconut", stage, latent) for stage in range(latent.max_latent_stage + 1)]


def entry_plans(entry: Entry) -> list[ViewPlan]:
    """Return the plans of all views that training this entry may show."""
    stages = range(entry.latent.max_latent_stage + 2) if entry.latent.uniform_prob else [entry.latent_stage]
    return [plan_view(entry.method, stage, entry.latent) for stage in stages]


def draw_plan(entry: Entry, num_steps: int, generator: random.Random, *, num_removed_tokens: int = 0) -> ViewPlan:
    """Draw the plan of one training example in one epoch.

    With probability `uniform_prob`, the example is shown at a random stage from 0 to `num_steps`. This
    applies to the methods that have stages. The generator is used in every case, so that later draws do not
    depend on the outcome. `icot` loses more tokens than the schedule says, by the number of `draw_extra`.
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
    """Return how many reasoning tokens `icot` has removed from the left of every example before `update`.

    Updates are counted from 0. The number of tokens grows evenly over the updates, by `icot_tokens_per_epoch`
    in an epoch. If a row has fewer reasoning tokens, its view has none left. If `icot_remove_all_at` is
    given, all reasoning is removed from every row once that number is reached.

    There are two differences from the authors' code. It raises the number every `round(updates of an epoch /
    tokens per epoch)` updates, which drifts from the requested rate; here it is exact at the end of each
    epoch. It begins to remove after the question's separator, and keeps the separator before the answer;
    here the line break at the end of a step is removed with the step.

    Args:
        start: The number of tokens that the parent entry had removed at its end, if its method was `icot`.

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
    # The small addend corrects products like 3130 x 2.3 / 313, which rounding leaves below a whole number.
    count = start + math.floor(update * entry.icot_tokens_per_epoch / updates_per_epoch + 1e-9)
    if entry.icot_remove_all_at is not None and count >= entry.icot_remove_all_at:
        return ALL_TOKENS
    return min(count, ALL_TOKENS)


def draw_extra(rate: float, generator: random.Random) -> int:
    """Draw how many tokens are removed in addition to the schedule.

    The number is o with probability (1 - exp(-rate)) x exp(-rate x o), so that the model sees later stages
    of the schedule in advance. With the authors' rate, 4, the number is 0 with probability .982.

    Source: Deng et al. 2024 (arXiv:2405.14838), section 3.
    """
    return min(ALL_TOKENS, int(-math.log(1.0 - generator.random()) / rate))
