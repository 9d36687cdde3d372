"""What a training method is: how a row looks, what an update minimises, and how a question is asked.

A method is a module of this package, found by its name, with one class derived from `Method`. Everything else (data,
resume, precision, processes, evaluation, probes, report) is the same for all of them, and names none.
docs/methods.md shows how to write one.

Legend: B rows of a micro-batch, D hidden.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from coconut.config.schema import Entry, LatentConfig
from coconut.data.encoding import EncodedExample
from coconut.data.examples import ANSWER_MARK
from coconut.data.layouts import Layout, Slot
from coconut.data.views import View, ViewWriter

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from coconut.model.thoughts import Edit
    from coconut.training.reading import Draws, Reading

Role = Literal["main", "words", "control"]
State = Mapping[str, int]

DEFAULT = "coconut"
"""The method of a plain model folder that is opened with thoughts."""
WORDS = "cot"
"""The method by which an untrained model is asked: it says its steps."""


@dataclass(frozen=True)
class Part:
    """A part of an update's loss: a sum over a micro-batch, and the number by which the update's sum is divided."""

    total: "Tensor"
    count: int
    """Of the whole update, over all its micro-batches and processes."""
    weight: float = 1.0
    """By which the mean enters the loss. What is logged is the mean itself."""


@dataclass(frozen=True)
class Row:
    """A training example in one epoch, from which a method makes its views."""

    example: EncodedExample
    draw: random.Random
    """Keyed by seed, entry, epoch and row: the only source of chance."""
    state: State
    writer: ViewWriter

    def view(self, layout: Layout) -> View:
        """Lay the example out."""
        return self.writer.view(self.example, layout)


@dataclass(frozen=True)
class Released:
    """How a checkpoint that others have released is prompted, fed back and read."""

    latent_stage: int
    c_thought: int
    max_latent_stage: int
    thought: str
    prompt: Literal["plain", "bare"]
    answer: str = "marked"
    keys: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NoKeys:
    """The keys of a method that has none of its own."""


@dataclass(frozen=True)
class Method:
    """A training method with the values of one entry; methods derive from it, and override what differs.

    The defaults are those of a method that shows each row in one layout and minimises its next-token loss.
    """

    latent_stage: int
    latent: LatentConfig
    keys: Any

    Keys: ClassVar[type] = NoKeys
    """A frozen dataclass: the keys that an entry of this method may have besides those of every entry."""
    state_names: ClassVar[Sequence[str]] = ()
    """What `state_at` names."""
    asked_with: ClassVar[Sequence[str]] = ()
    """Keys on which the layout of a question depends, so that a checkpoint holds them."""
    has_stages: ClassVar[bool] = False
    """Whether `latent_stage` and `uniform_prob` say how many steps are left out."""
    shows_steps: ClassVar[bool] = True
    """Whether training shows a step, so that the training data must have some."""

    role: ClassVar[Role] = "control"
    """`main`: its thoughts are what a page is about. `words`: it says its steps. `control`: it is compared with."""
    example_keys: ClassVar[Mapping[str, Any]] = {}
    """Values of keys without a default, with which `coconut check-method` tries the method."""
    paper_arm: ClassVar[str | None] = None
    """The row of table 1 of the Coconut paper that it stands for."""
    controls: ClassVar[Sequence[str]] = ()
    """Methods that are its controls, the closest one first."""

    released: ClassVar[Mapping[str, Released]] = {}
    """Checkpoints of others, by their ids on the hub."""

    readings: ClassVar[Sequence[str]] = ("row",)
    """Names of the layouts that an update reads, one after another; `views` gives a view for each."""
    reads_layers: ClassVar[Sequence[str]] = ()
    """Readings of which the loss needs the hidden states of all layers; see `Reading.states_at`."""
    reads_thoughts: ClassVar[Sequence[str]] = ()
    """Readings of which the loss needs the vectors that were fed back; see `Reading.thoughts`."""

    # --- before training ---

    def check(self, entry: Entry) -> None:
        """Raise a ValueError for values of an entry that do not go with this method; the message begins with a key."""

    def check_model(self, num_layers: int) -> None:
        """Raise a ValueError for values that no model of so many layers allows; the message begins with a key."""

    def build_modules(self, model: "PreTrainedModel", seed: int) -> "nn.Module | None":
        """Build what is trained with the model and thrown away with the training; no checkpoint holds it.

        Its weights are in the resume state. They must be a function of the model and the seed.
        """
        return None

    # --- how a row looks, and how a question is asked ---

    def layout(self, stage: int, *, num_steps: int | None = None, state: State | None = None) -> Layout:
        """Return the layout at a latent stage.

        Args:
            num_steps: of a training example; None where a question is asked, whose solution is not known.
            state: of the entry, after some updates; see `state_at`.
        """
        raise NotImplementedError

    def draw_layout(self, num_steps: int, draw: random.Random, state: State) -> Layout:
        """Draw the layout of a training example in one epoch.

        With probability `uniform_prob`, the example is shown at a random stage from 0 to `num_steps`. The generator
        is used in every case, so that later draws do not depend on the outcome.
        """
        is_mixed = draw.random() < self.latent.uniform_prob
        random_stage = draw.randint(0, num_steps)
        stage = random_stage if is_mixed and self.has_stages else self.latent_stage
        return self.layout(stage, num_steps=num_steps, state=state)

    def views(self, row: Row) -> Mapping[str, View]:
        """Return the views of a training example by the names in `readings`."""
        return {"row": row.view(self.draw_layout(len(row.example.steps_ids), row.draw, row.state))}

    def training_layouts(self) -> list[Layout]:
        """Return all layouts that training may show, to find out beforehand whether they fit the model."""
        stages = range(self.latent.max_latent_stage + 2) if self.latent.uniform_prob else [self.latent_stage]
        return [self.layout(stage) for stage in stages]

    def thoughts_per_step(self) -> int | None:
        """Return how many slots stand for one step, for probes that compare them; None where none stands for a step."""
        return self.latent.c_thought

    def answer_rule(self) -> str:
        """Return where a text says its answer; see `coconut.evaluation.outcomes.read_answer`."""
        return "marked"

    # --- how thoughts are made, and what an update minimises ---

    def edit_thoughts(self, reading: str, draws: "Draws") -> "Edit | None":
        """Return what turns the vectors that are about to enter a slot, B x D, into those that enter; None for nothing.

        It is asked for each micro-batch while the model trains, not when questions are asked.

        Args:
            draws: the only source of chance.
        """
        return None

    def loss(self, reading: "Reading") -> Mapping[str, Part]:
        """Return the parts of the loss of a micro-batch in one of the readings, by name: the same names for all rows.

        It must not depend on how the update is cut into micro-batches: counts are those of the whole update, and what
        is kept in one reading (`Reading.keep`) can be read as a whole in later ones (`Reading.whole`).
        """
        return {"nll": reading.nll()}

    # --- what changes during an entry ---

    def state_at(self, update: int, updates_per_epoch: int, parent: State) -> State:
        """Return the state after so many updates, which the checkpoint keeps and a child entry goes on from.

        Args:
            parent: the state at the end of the parent entry; empty where its method keeps none.
        """
        return {}

    def restarts_optimizer(self, state: State, examples: Iterable[EncodedExample]) -> bool:
        """Say whether the optimizer begins anew before an update; asked only where `reset_optimizer` is on.

        Args:
            state: before the update.
            examples: of the update; they are read from the disk.
        """
        return False


__all__ = [
    "ANSWER_MARK",
    "DEFAULT",
    "WORDS",
    "Layout",
    "Method",
    "NoKeys",
    "Part",
    "Released",
    "Role",
    "Row",
    "Slot",
    "State",
]
