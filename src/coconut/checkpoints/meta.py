"""How a checkpoint was trained: its `coconut.json`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from coconut.checkpoints.tensors import RESTORE
from coconut.checkpoints.weights import read_json
from coconut.config.schema import LatentConfig, Method
from coconut.config.strict import Range, parse
from coconut.config.thought import parse_thought
from coconut.data.chat import PROMPT_DATE
from coconut.data.curriculum import ViewPlan, plan_view

META_FILE = "coconut.json"
Prompt = Literal["plain", "bare", "chat"]
AnswerRule = Literal["marked", "last_number"]
"""Where a text says its answer; see `coconut.evaluation.answers`."""
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
    answer: AnswerRule = "marked"
    """Checkpoints of others end in `The answer is: 18`."""

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
        answer: AnswerRule = "marked",
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
            answer=answer,
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


def read_meta(folder: Path) -> CheckpointMeta:
    """Read how a checkpoint was trained.

    Raises:
        ValueError: if its `coconut.json` is missing or damaged.
    """
    path = folder / META_FILE
    found, fields = read_json(path), dataclasses.fields(CheckpointMeta)
    # Keys with a default were added later: checkpoints from before them are still read.
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not required <= found.keys() <= {field.name for field in fields}:
        wanted = sorted(field.name for field in fields)
        raise ValueError(f"{path}: found {sorted(found)!s:.300}, wanted exactly the keys {wanted}; {RESTORE}")
    try:
        meta: CheckpointMeta = parse(found, CheckpointMeta, "")
        parse_thought(meta.thought)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {RESTORE}") from None
    return meta
