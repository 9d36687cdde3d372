"""How a checkpoint was trained: its `coconut.json`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from coconut.config.schema import LatentConfig, Method
from coconut.config.strict import Range
from coconut.data.chat import PROMPT_DATE
from coconut.data.curriculum import ViewPlan, plan_view

Prompt = Literal["plain", "chat"]
_Number = Annotated[int, Range(0, 1_000_000)]


@dataclass(frozen=True)
class CheckpointMeta:
    """The values with which a checkpoint is used without `params.yaml`. Flat, because people read the file."""

    method: Method
    latent_stage: _Number
    c_thought: _Number
    max_latent_stage: _Number
    pad_latent_to_max: bool
    markers: bool
    thought: str
    parallel_iterations: _Number
    prompt: Prompt
    num_removed_tokens: _Number = 0
    """Reasoning tokens that `icot` had removed in its last update; 0 for other methods."""
    num_removed_at_end: _Number = 0
    """What its schedule had come to by then, from where a child goes on."""
    prompt_date: str = ""
    """The day that chat templates were told, in ISO form; nothing where prompts are plain."""

    @classmethod
    def of(
        cls,
        method: Method,
        latent_stage: int,
        latent: LatentConfig,
        *,
        prompt: Prompt,
        num_removed_tokens: int = 0,
        num_removed_at_end: int = 0,
    ) -> "CheckpointMeta":
        """Describe the checkpoint of an entry with these values."""
        return cls(
            method=method,
            latent_stage=latent_stage,
            c_thought=latent.c_thought,
            max_latent_stage=latent.max_latent_stage,
            pad_latent_to_max=latent.pad_latent_to_max,
            markers=latent.markers,
            thought=latent.thought,
            parallel_iterations=latent.parallel_iterations,
            prompt=prompt,
            num_removed_tokens=num_removed_tokens,
            num_removed_at_end=num_removed_at_end,
            prompt_date=f"{PROMPT_DATE:%Y-%m-%d}" if prompt == "chat" else "",
        )

    def latent_config(self) -> LatentConfig:
        """The method's switches; nothing is mixed outside of training."""
        return LatentConfig(
            self.c_thought,
            self.max_latent_stage,
            self.pad_latent_to_max,
            self.markers,
            uniform_prob=0.0,
            thought=self.thought,
            parallel_iterations=self.parallel_iterations,
        )

    def plan(self) -> ViewPlan:
        """The view that the checkpoint was trained for last, which depends on no gold solution."""
        return self.plan_at(self.latent_stage)

    def plan_at(self, latent_stage: int) -> ViewPlan:
        """The checkpoint's view at another stage."""
        return plan_view(self.method, latent_stage, self.latent_config(), num_removed_tokens=self.num_removed_tokens)
