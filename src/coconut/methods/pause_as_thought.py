"""The curriculum of Coconut with pause tokens in place of thoughts.

A pause token is `<|latent|>` with its own trained embedding; all pause tokens are read in one pass.

Source: Hao et al. 2024 (arXiv:2412.06769), table 1, "pause as thought".
"""

from dataclasses import dataclass

from coconut.config.schema import Natural
from coconut.data.layouts import staged_layout
from coconut.methods import Layout, Method, State


@dataclass(frozen=True)
class Keys:
    num_thoughts: Natural | None = None
    """So many pause tokens at every stage, in place of `c_thought` for each removed step."""


class PauseAsThought(Method):
    """At latent stage k, pause tokens replace the first k steps."""

    Keys = Keys
    asked_with = ("num_thoughts",)
    has_stages = True
    paper_arm = "- pause as thought"

    def layout(self, stage: int, *, num_steps: int | None = None, state: State | None = None) -> Layout:
        number = self.keys.num_thoughts
        return staged_layout(stage, self.latent, slot="pause", num_steps=num_steps, num_thoughts=number)

    def thoughts_per_step(self) -> int | None:
        return self.latent.c_thought if self.keys.num_thoughts is None else None
