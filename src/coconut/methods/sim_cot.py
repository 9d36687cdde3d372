"""SIM-CoT: Coconut whose thoughts an auxiliary decoder reads; it must say the steps that they stand for.

    row        question | <start> | thought x c | thought x c | <end> | remaining steps | answer <eos>
    decoder                         thought x c -> first step <eos>
    decoder                                       thought x c -> second step <eos>

The decoder is trained with the model and thrown away with the training. It reads a group of `c_thought` thoughts as
they were fed, with gradients, and then the step's tokens, embedded by the model's own embeddings. The loss is

    nll + explain_weight x explain

* `nll`: Coconut's next-token loss.
* `explain`: of each row, the mean over its groups of the nats summed over the step's tokens and <eos>; the mean over
  the rows of the update.

Group j stands for step j, and the last group for all steps that are left. Only steps that are gone from the row are
targets: at stage k the first k, at later stages all of them. With `num_thoughts`, groups stand for the same steps from
the first stage on, and those whose step is still in words have no target.

Source: Wei et al. 2025 (arXiv:2509.20317), and the authors' code, from which this differs in five points:

* Steps come from the examples, each with its line's end; theirs are found by the token ids of `<<` and `>>`.
* A group without a step has no target and does not count in the mean; theirs is taught to say the answer.
* The mean is over the rows of the update; theirs is over those of the micro-batch.
* With `num_thoughts`, their targets are the steps in words, too.
* Each entry begins with a new decoder; theirs goes on from stage to stage.

Where every group has a step and an update is one micro-batch, loss and gradients are theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from coconut.config.schema import Entry, NonNegative
from coconut.config.strict import Word
from coconut.data.encoding import EncodedExample
from coconut.data.views import View
from coconut.methods import Part, Released
from coconut.methods.coconut import Coconut
from coconut.methods.coconut import Keys as CoconutKeys

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from coconut.training.reading import Reading


@dataclass(frozen=True)
class Keys(CoconutKeys):
    explain_weight: NonNegative = 1.0
    """Weight of the decoder's loss."""
    explain_model: Annotated[str | None, Word("same")] = None
    """What the decoder begins as: a copy of the model that the entry starts from, or the folder of a `config.json`, of
    which it is built with fresh weights."""


class SimCot(Coconut):
    """The decoder costs as much memory as the model, and a pass over each step that is gone."""

    Keys = Keys
    paper_arm = None
    controls = ("coconut", *Coconut.controls)
    released: ClassVar[Mapping[str, Released]] = {}
    reads_thoughts = ("row",)

    def check(self, entry: Entry) -> None:
        num_thoughts, size = self.keys.num_thoughts, entry.latent.c_thought
        if size == 0:
            raise ValueError("c_thought: found 0, wanted at least 1, since a step is said from its thoughts")
        if num_thoughts is not None and num_thoughts % size:
            raise ValueError(
                f"num_thoughts: found {num_thoughts}, wanted a multiple of c_thought, which is {size}: each step is"
                " said from so many thoughts"
            )

    def check_model(self, num_layers: int) -> None:
        check_decoder(self.keys.explain_model)

    def build_modules(self, model: "PreTrainedModel", seed: int) -> "nn.Module":
        from coconut.methods._step_decoder import StepDecoder  # Here, because params.yaml is checked without torch.

        return StepDecoder(self.keys.explain_model, model, seed)

    def loss(self, reading: "Reading") -> Mapping[str, Part]:
        assert reading.modules is not None, "build_modules has made it"
        targets = [self.targets(*row) for row in zip(reading.views, reading.examples, strict=True)]
        size = self.latent.c_thought
        explain_B = reading.modules(reading, targets, group_size=size, first_position=1, per_token=False)
        return {**super().loss(reading), "explain": reading.mean_over_rows(explain_B, self.keys.explain_weight)}

    def targets(self, view: View, example: EncodedExample) -> list[list[int]]:
        """Return what the decoder must say of the groups of a row, of as many as have a step."""
        gone = example.steps_ids[: view.layout.num_dropped_steps]
        return steps_of_groups(gone, view.num_thoughts // self.latent.c_thought, eos_id=example.answer_ids[-1])


def steps_of_groups(steps_ids: Sequence[list[int]], num_groups: int, *, eos_id: int) -> list[list[int]]:
    """Give each group a step, and the last group all steps that are left.

    >>> steps_of_groups([[3], [4, 5], [6]], 2, eos_id=1), steps_of_groups([[3]], 2, eos_id=1)
    ([[3, 1], [4, 5, 6, 1]], [[3, 1]])
    """
    if len(steps_ids) > num_groups > 0:
        steps_ids = [*steps_ids[: num_groups - 1], list(chain.from_iterable(steps_ids[num_groups - 1 :]))]
    return [[*ids, eos_id] for ids in steps_ids[:num_groups]]


def check_decoder(folder: str | None) -> None:
    """Raise a ValueError unless a folder can hold the model of a decoder; the message begins with the key."""
    if folder is not None and not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"explain_model: found {folder!r:.200}, wanted same, or a folder that holds a config.json; correct the"
            " path, which begins at the folder of params.yaml"
        )
