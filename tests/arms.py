"""Training methods as tests use them: one layout, or a list of views as the rows of an update."""

from collections.abc import Sequence
from typing import Any

from coconut.config.methods import find_method
from coconut.config.schema import LatentConfig
from coconut.config.strict import parse
from coconut.data.layouts import Layout
from coconut.data.views import MarkerIds, View, ViewWriter
from coconut.methods import Method, State
from coconut.training.rows import TrainingRow

_LATENT = LatentConfig(1, 1, True, False, 0.0, "hidden[-1]", 0)


def make_method(name: str = "coconut", stage: int = 0, latent: LatentConfig = _LATENT, **keys: Any) -> Method:
    kind = find_method(name)
    return kind(stage, latent, parse({**kind.example_keys, **keys}, kind.Keys, name))


def layout_of(
    name: str,
    stage: int,
    latent: LatentConfig,
    *,
    num_steps: int | None = None,
    state: State | None = None,
    **keys: Any,
) -> Layout:
    return make_method(name, stage, latent, **keys).layout(stage, num_steps=num_steps, state=state)


def rows_of(views: Sequence[View]) -> list[TrainingRow]:
    """Return views as an update shows them that reads each row in one layout."""
    return [TrainingRow(None, {"row": view}, 0) for view in views]  # type: ignore[arg-type]


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    def decode(self, ids: Sequence[int], **_options: bool) -> str:
        return " ".join(map(str, ids))


def writer_of(markers: MarkerIds) -> ViewWriter:
    """Return a writer of ids without words, for layouts that leave the wording of answers as it is."""
    return ViewWriter(Numbers(), markers)  # type: ignore[arg-type]
