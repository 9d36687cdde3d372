"""The curriculum of Coconut without its thoughts: steps are removed stage by stage, and nothing replaces them.

Source: Hao et al. 2024 (arXiv:2412.06769), table 1, "w/o thought".
"""

from dataclasses import replace

from coconut.data.layouts import staged_layout
from coconut.methods import Layout, Method, State


class NoThoughts(Method):
    """At latent stage k, the first k steps are removed."""

    has_stages = True
    paper_arm = "- w/o thought"

    def layout(self, stage: int, *, num_steps: int | None = None, state: State | None = None) -> Layout:
        return replace(staged_layout(stage, self.latent), num_latents=0, markers=False)
