"""SIM-CoT on CODI: an auxiliary decoder reads each thought of the student, and must say a step of the teacher.

    teacher   question | steps but the last | answer <eos>
    student   question | <start> | thought x n | <end> | answer <eos>
    decoder                        thought -> step <eos>, for each thought that has one

The loss is CODI's and explain_weight x explain. `explain`: of each row, the mean over its thoughts that have a step of
the mean over the step's tokens and <eos>; the mean over the rows of the update.

Thought j stands for step j of those that the teacher shows, and the last thought for all that are left.

Source: Wei et al. 2025 (arXiv:2509.20317), and the authors' code, from which this differs in three points:

* Their decoder reads one vector more, which comes after the last thought and is never fed.
* Steps come from the examples, each with its line's end; theirs are found by token ids.
* Each row has a mean of its own; theirs is over the tokens of a micro-batch, in which every row loses what is longer
  than the first row's step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from coconut.config.schema import NonNegative
from coconut.config.strict import Word
from coconut.data.encoding import EncodedExample
from coconut.data.views import View
from coconut.methods import Part, Released
from coconut.methods.codi import Codi
from coconut.methods.codi import Keys as CodiKeys
from coconut.methods.sim_cot import check_decoder, steps_of_groups

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from coconut.training.reading import Reading


@dataclass(frozen=True)
class Keys(CodiKeys):
    explain_weight: NonNegative = 1.0
    """Weight of the decoder's loss."""
    explain_model: Annotated[str | None, Word("same")] = None
    """What the decoder begins as; see `coconut.methods.sim_cot`."""


class SimCodi(Codi):
    """The decoder costs as much memory as the model, and a pass over each step."""

    Keys = Keys
    controls = ("codi", *Codi.controls)
    released: ClassVar[Mapping[str, Released]] = {}
    reads_thoughts = ("student",)

    def check_model(self, num_layers: int) -> None:
        super().check_model(num_layers)
        check_decoder(self.keys.explain_model)

    def build_modules(self, model: "PreTrainedModel", seed: int) -> "nn.Module":
        from coconut.methods._step_decoder import StepDecoder  # Here, because params.yaml is checked without torch.

        return StepDecoder(self.keys.explain_model, model, seed)

    def loss(self, reading: "Reading") -> Mapping[str, Part]:
        parts = super().loss(reading)
        if reading.name == "teacher":
            return parts
        assert reading.modules is not None, "build_modules has made it"
        targets = [self.targets(*row) for row in zip(reading.views, reading.examples, strict=True)]
        explain_B = reading.modules(reading, targets, group_size=1, first_position=0, per_token=True)
        return {**parts, "explain": reading.mean_over_rows(explain_B, self.keys.explain_weight)}

    def targets(self, view: View, example: EncodedExample) -> list[list[int]]:
        """Return what the decoder must say of the thoughts of a row, of as many as have a step."""
        shown = example.steps_ids[: max(0, len(example.steps_ids) - self.keys.teacher_drops)]
        return steps_of_groups(shown, view.num_thoughts, eos_id=example.answer_ids[-1])
