"""Pause tokens between the question and the answer, without steps: the control for more columns to compute in.

A pause token is `<|latent|>` with its own trained embedding; all pause tokens are read in one pass.

Source: Hao et al. 2024 (arXiv:2412.06769), table 1, "pause token".
"""

from dataclasses import dataclass

from coconut.config.schema import Natural
from coconut.data.layouts import ALL_STEPS
from coconut.methods import Layout, Method, State


@dataclass(frozen=True)
class Keys:
    num_thoughts: Natural | None = None
    """The number of pause tokens; `max_latent_stage` x `c_thought` where it is left out."""


class Pause(Method):
    """All steps are removed; as many pause tokens stand in their place as a whole curriculum has thoughts."""

    Keys = Keys
    asked_with = ("num_thoughts",)
    paper_arm = "Pause token"
    shows_steps = False

    def layout(self, stage: int, *, num_steps: int | None = None, state: State | None = None) -> Layout:
        number = self.keys.num_thoughts
        if number is None:
            number = self.latent.max_latent_stage * self.latent.c_thought
        return Layout(ALL_STEPS, number, "pause", self.latent.markers)

    def thoughts_per_step(self) -> int | None:
        return self.latent.c_thought if self.keys.num_thoughts is None else None
