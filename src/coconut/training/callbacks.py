"""What a trainer tells and asks the world around it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from coconut.methods import State
from coconut.training.position import Score


class Stopped(Exception):  # noqa: N818 - it is no error: the state is saved, and the stage goes on next time
    """The run was asked to end, and has saved its state."""


class Validation(Protocol):
    """Scores the model on validation data."""

    @property
    def num_oom_retries(self) -> int:
        """Count how often it ran out of memory in this session."""

    def score(self, state: State) -> Score:
        """Score the weights as they are now.

        Args:
            state: of the entry's method; see `coconut.methods.Method.state_at`.
        """


class Callbacks:
    """The trainer's only way to disk, signals and trackers. This one keeps nothing and never stops a run.

    `coconut.training.entry` gives the trainer one that saves, listens and reports; tests and benchmarks
    override what they need.
    """

    def save(self, update: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Take the resume state after this many updates: its tensors by name, and what is JSON."""

    def is_save_due(self) -> bool:
        """Say whether the last save is long enough ago; saving stays a small share of the time."""
        return False

    def report(self, progress: Mapping[str, Any]) -> None:
        """Take the progress of the run: `update`, `num_updates`, `loss`, `eta_s`."""

    def track(self, values: Mapping[str, Any], update: int) -> None:
        """Take figures and the update that they belong to."""

    def should_stop(self) -> bool:
        """Say whether the run was asked to end; asked once after each update."""
        return False

    def poll(self) -> None:
        """Raise `Interrupted` if within `interrupting` the run was asked to end: asked between batches."""

    def interrupting(self) -> AbstractContextManager[None]:
        """Within this context a request to stop raises `Interrupted` instead of waiting for `should_stop`."""
        return nullcontext()
