"""How a checkpoint was trained: the `coconut.json` beside its weights."""

from dataclasses import dataclass
from typing import cast

from coconut.config.schema import LatentConfig, Method
from coconut.data.curriculum import ViewPlan, plan_view


@dataclass(frozen=True)
class CheckpointMeta:
    """What it takes to use a checkpoint without `params.yaml`. Flat, because it is a file that people read."""

    method: str
    latent_stage: int
    c_thought: int
    max_latent_stage: int
    pad_latent_to_max: bool
    markers: bool
    thought: str
    parallel_iterations: int
    prompt: str
    num_removed_tokens: int = 0
    """Reasoning tokens that `icot` had removed in its last update; 0 for other methods."""
    num_removed_at_end: int = 0
    """What its schedule had come to by then, from where a child goes on."""

    @classmethod
    def of(
        cls,
        method: Method,
        latent_stage: int,
        latent: LatentConfig,
        *,
        prompt: str,
        num_removed_tokens: int = 0,
        num_removed_at_end: int = 0,
    ) -> "CheckpointMeta":
        """What an entry with these values leaves to its users."""
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
        """The view that the checkpoint was trained for last, without a look at any gold solution."""
        return self.plan_at(self.latent_stage)

    def plan_at(self, latent_stage: int) -> ViewPlan:
        """The checkpoint's view at another stage."""
        method, latent = cast(Method, self.method), self.latent_config()
        return plan_view(method, latent_stage, latent, num_removed_tokens=self.num_removed_tokens)
