"""Coconut: a chain of continuous thoughts.

Source: Hao et al. 2024 (arXiv:2412.06769), section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from coconut.config.schema import Natural
from coconut.data.layouts import staged_layout
from coconut.methods import Layout, Method, Released, State


@dataclass(frozen=True)
class Keys:
    num_thoughts: Natural | None = None
    """So many thoughts at every stage, in place of `c_thought` for each removed step: thoughts from the start."""


class Coconut(Method):
    """At latent stage k, thoughts replace the first k steps of the chain.

    A thought is the last hidden state of the column before it, fed back as its input embedding. The loss is that of
    the text that is left: there is none on the question and none on thoughts, so that a thought may hold whatever
    helps to predict what follows. Gradients flow through the thoughts.

    `max_latent_stage` steps are replaced by `c_thought` thoughts each; at later stages the thoughts stay as many, and
    all steps are gone. With probability `uniform_prob` a row is shown at a random stage, so that earlier ones are not
    forgotten.
    """

    Keys = Keys
    asked_with = ("num_thoughts",)
    has_stages = True
    role = "main"
    paper_arm: ClassVar[str | None] = "Coconut"
    controls: ClassVar[Sequence[str]] = ("pause", "pause_as_thought", "no_thoughts", "no_cot")
    # Source: the code that was released with it (LatentTTS), read at commit 6657f20.
    released: ClassVar[Mapping[str, Released]] = {
        "ModalityDance/latent-tts-coconut": Released(3, 2, 3, "hidden[-1]", "plain")
    }

    def layout(self, stage: int, *, num_steps: int | None = None, state: State | None = None) -> Layout:
        return staged_layout(stage, self.latent, num_steps=num_steps, num_thoughts=self.keys.num_thoughts)

    def thoughts_per_step(self) -> int | None:
        return self.latent.c_thought if self.keys.num_thoughts is None else None
