"""The shape of a row: what is removed of an example's solution, and what stands in its place.

A training method (`coconut.methods`) decides which layouts an entry shows; `coconut.data.views` lays them out.
"""

from dataclasses import dataclass
from typing import Literal

from coconut.config.schema import LatentConfig
from coconut.data.examples import ANSWER_MARK

ALL_STEPS = 1_000_000
"""A number of steps that no example reaches."""
ALL_TOKENS = 1_000_000
"""A number of reasoning tokens that no example reaches."""

Slot = Literal["thought", "pause"]


@dataclass(frozen=True)
class Layout:
    """The shape of a row, without the text of an example."""

    num_dropped_steps: int = 0
    """Steps removed from the beginning of the solution."""
    num_latents: int = 0
    """Slots between the question and what is left of the solution."""
    slot: Slot = "thought"
    """A `thought` slot holds a fed-back vector; a `pause` slot keeps the embedding of `<|latent|>`."""
    markers: bool = False
    """Whether the slots stand between `<|start-latent|>` and `<|end-latent|>`."""
    num_dropped_tokens: int = 0
    """Tokens removed from the left of the remaining steps."""
    num_dropped_last: int = 0
    """Steps removed from the end of the solution."""
    wording: str = ANSWER_MARK
    """The text before the answer."""

    def covers(self, other: "Layout") -> bool:
        """Say whether no example takes more columns in the other layout than in this one."""
        return (
            self.num_dropped_steps <= other.num_dropped_steps
            and self.num_latents + 2 * self.markers >= other.num_latents + 2 * other.markers
            and self.num_dropped_last <= other.num_dropped_last
            and self.wording == other.wording
        )


def staged_layout(
    stage: int,
    latent: LatentConfig,
    *,
    slot: Slot = "thought",
    num_steps: int | None = None,
    num_thoughts: int | None = None,
) -> Layout:
    """Return the paper's layout at a latent stage.

    Up to `max_latent_stage`, k x `c_thought` slots replace the first k steps. At later stages,
    max_latent_stage x `c_thought` slots replace all steps.

    Args:
        num_steps: The number of steps of a training example. Leave it out at evaluation, where the number
            of slots must not depend on the gold solution. It matters only if `pad_latent_to_max` is off.
        num_thoughts: So many slots at every stage, in place of the number that the stage gives.

    >>> config = LatentConfig(2, 3, True, True, 0.0, "hidden[-1]", 0)
    >>> staged_layout(1, config) == Layout(1, 2, markers=True)
    True
    >>> staged_layout(4, config) == Layout(ALL_STEPS, 6, markers=True)
    True

    Source: Hao et al. 2024 (arXiv:2412.06769), section 3, and their released configuration.
    """
    num_dropped = stage if stage <= latent.max_latent_stage else ALL_STEPS
    if num_thoughts is None:
        num_replaced = min(stage, latent.max_latent_stage)
        if num_steps is not None and not latent.pad_latent_to_max:
            num_replaced = min(num_replaced, num_steps)
        num_thoughts = num_replaced * latent.c_thought
    return Layout(num_dropped, num_thoughts, slot, latent.markers)


def common_layouts(latent: LatentConfig) -> list[Layout]:
    """Return the layouts by which the encode stage leaves out examples that are too long for the model."""
    return [staged_layout(stage, latent) for stage in range(latent.max_latent_stage + 1)]
