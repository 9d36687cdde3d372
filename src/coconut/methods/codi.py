"""CODI: one model learns to think from its own chain of thought, without a curriculum.

    teacher   question | steps but the last | answer <eos>
    student   question | <start> | thought x n | <end> | answer <eos>

Both are read with the same weights in every update. At the column that predicts the first token of the answer, the
hidden states of all layers are drawn to those of the teacher. The loss is

    nll + teacher_weight x teacher + distill_weight x distill

* `nll`: next-token loss of the student's answer, a mean over its tokens.
* `teacher`: next-token loss of the teacher's steps and answer, a mean over their tokens.
* `distill`: mean over layers and rows of SmoothL1(student, teacher) / deviation. The teacher's states carry no
  gradient; the deviation of a layer is taken over all rows of the update and all coordinates.

Source: Shen et al. 2025 (arXiv:2502.21074), and the authors' code, from which this differs in four points. The
deviation is of the whole update, so that the loss does not depend on the micro-batch, where theirs is of the
micro-batch. The teacher is read once, where they read it twice. Padding is masked and takes no position. The column is
found from the token ids, where theirs goes by the model's name. With questions of one length and one micro-batch the
three losses and all gradients are theirs.

Legend: B rows of a micro-batch, U rows of the update, L layers that are compared, D hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from coconut.config.schema import Count, Entry, Natural, NonNegative
from coconut.config.strict import Word
from coconut.data.layouts import ALL_STEPS
from coconut.data.views import View
from coconut.methods import ANSWER_MARK, Layout, Method, Part, Released, Row, State

if TYPE_CHECKING:
    from torch import Tensor

    from coconut.training.reading import Reading


@dataclass(frozen=True)
class Keys:
    num_thoughts: Count = 6
    """Thoughts between the question and the answer."""
    distill_weight: NonNegative = 1.0
    """Weight of the distance between the two views; the authors take 1 for GPT-2 and 20 for Llama."""
    teacher_weight: NonNegative = 1.0
    """Weight of the loss of the chain of thought."""
    distill_layers: Annotated[tuple[Natural, ...] | None, Word("all")] = None
    """The first and the last layer that are compared, [1, 12] say; 0 is the embeddings."""
    teacher_drops: Natural = 1
    """Steps that are left out at the end of the teacher's chain. The last one often is the answer, which the model
    would then only copy."""
    answer_wording: str = ANSWER_MARK
    """The text before the answer: `The answer is:` in the authors' code."""


class Codi(Method):
    """The teacher is read first, so that its states are known of the whole update when the student is read."""

    Keys = Keys
    asked_with = ("num_thoughts", "answer_wording")
    role = "main"
    controls: ClassVar[Sequence[str]] = ("pause", "no_cot")
    released: ClassVar[Mapping[str, Released]] = {
        # Source: the code that was released with it (LatentTTS), read at commit 6657f20.
        "ModalityDance/latent-tts-codi": Released(0, 1, 6, "projector", "bare", answer="last_number")
    }
    readings = ("teacher", "student")
    reads_layers = readings

    def check(self, entry: Entry) -> None:
        layers = self.keys.distill_layers
        if layers is not None and (len(layers) != 2 or layers[0] > layers[1]):
            raise ValueError(f"distill_layers: found {list(layers)}, wanted all, or the first and the last layer")
        if not self.keys.answer_wording.strip():
            raise ValueError(f"answer_wording: found an empty text, wanted {ANSWER_MARK!r} or another one")

    def check_model(self, num_layers: int) -> None:
        if (self.keys.distill_layers or (0, 0))[1] > num_layers:
            raise ValueError(
                f"distill_layers: found layer {self.keys.distill_layers[1]}, but the model has {num_layers} layers,"
                " wanted at most that number"
            )

    # --- how a row looks, and how a question is asked ---

    def layout(self, stage: int, *, num_steps: int | None = None, state: State | None = None) -> Layout:
        wording = self.keys.answer_wording
        return Layout(ALL_STEPS, self.keys.num_thoughts, markers=self.latent.markers, wording=wording)

    def teacher_layout(self) -> Layout:
        return Layout(num_dropped_last=self.keys.teacher_drops, wording=self.keys.answer_wording)

    def training_layouts(self) -> list[Layout]:
        return [self.teacher_layout(), self.layout(0)]

    def views(self, row: Row) -> Mapping[str, View]:
        layouts = {"teacher": self.teacher_layout(), "student": self.layout(0)}
        return {name: _with_answer_column(row, layout) for name, layout in layouts.items()}

    def thoughts_per_step(self) -> int | None:
        return None

    def answer_rule(self) -> str:
        wording = self.keys.answer_wording
        return "marked" if wording == ANSWER_MARK else f"after {wording}"

    # --- what an update minimises ---

    def loss(self, reading: "Reading") -> Mapping[str, Part]:
        states_BLD = self.compared(reading.states_at("answer"))
        if reading.name == "teacher":
            reading.keep("targets", states_BLD)
            return {"teacher": reading.nll(self.keys.teacher_weight)}
        distances_B = distance(states_BLD, reading.kept("targets"), reading.whole("targets"))
        return {"nll": reading.nll(), "distill": reading.mean_over_rows(distances_B, self.keys.distill_weight)}

    def compared(self, states: "Tensor") -> "Tensor":
        """Return those of all layers' states, B x (L + 1) x D, that are compared."""
        first, last = self.keys.distill_layers or (0, states.shape[1])
        return states[:, first : last + 1]


def distance(states_BLD: "Tensor", targets_BLD: "Tensor", all_targets_ULD: "Tensor") -> "Tensor":
    """Return how far each row is from its target: the mean over layers of SmoothL1 / deviation of the targets, B."""
    from torch.nn.functional import smooth_l1_loss  # Here, because params.yaml is checked without torch.

    deviation_L = all_targets_ULD.std(dim=(0, 2))
    distances_BL = smooth_l1_loss(states_BLD.float(), targets_BLD, reduction="none").mean(dim=2)
    return (distances_BL / deviation_L).mean(dim=1)


def _with_answer_column(row: Row, layout: Layout) -> View:
    """Lay a row out, with the name `answer` for the column that predicts the first token of the answer's own text."""
    view = row.view(layout)
    return replace(view, columns={"answer": row.writer.column_before_answer(view, row.example, layout)})
