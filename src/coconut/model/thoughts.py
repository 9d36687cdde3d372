"""Watching and replacing what enters the slots of a batch.

`SlotFeedback` stands in for the feedback of a model wherever one is passed: in training's own path (`latent_nll`) and
in generation. It keeps the vector that enters every slot, and lets a function put another one there, before the
key-value cache and later thoughts see it. Pause slots hold an embedding instead of a thought; read through
`pause_feedback` they give the same numbers, and can be replaced in the same way.

Legend: B rows, K slots, S columns of a pass, D hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from coconut.model.feedback import Feedback, States

Edit = Callable[[int, Tensor], Tensor]
"""(slot, counted from 0; the vectors that are about to enter it, B x D) -> the vectors that enter it, B x D."""


class SlotFeedback(Feedback):
    """A feedback that keeps what enters the slots of one batch, and may replace it.

    It counts slots by its calls, so that it serves one batch only, whose rows have their slots in the same columns, as
    the collator lays them out.

    Args:
        feedback: what it stands in for.
        edit: what enters instead; nothing is replaced if None.
    """

    def __init__(self, feedback: Feedback, edit: Edit | None = None) -> None:
        super().__init__(needs_all_layers=feedback.needs_all_layers, parallel_iterations=feedback.parallel_iterations)
        self.inner = feedback
        self.edit = edit
        self.entered: list[Tensor] = []
        """One B x D for each slot so far."""

    def forward(self, output: BaseModelOutput, input_BD: Tensor) -> Tensor:
        """Return what enters the next slot, B x D."""
        vector_BD = self._enter(len(self.entered), self.inner(output, input_BD))
        self.entered.append(vector_BD)
        return vector_BD

    def of_columns(self, output: BaseModelOutput, inputs_BSD: Tensor) -> Tensor:
        """Return what enters all slots but the first, B x S x D; every round of Jacobi iteration asks again."""
        later_BSD = self.inner.of_columns(output, inputs_BSD)
        vectors = [self._enter(1 + place, vector_BD) for place, vector_BD in enumerate(later_BSD.unbind(1))]
        self.entered = [self.entered[0], *vectors]
        return torch.stack(vectors, dim=1)

    def _enter(self, slot: int, vector_BD: Tensor) -> Tensor:
        return vector_BD if self.edit is None else self.edit(slot, vector_BD).to(vector_BD)


def pause_feedback(model: PreTrainedModel, latent_id: int) -> Feedback:
    """Return a feedback that puts the embedding of `<|latent|>` into every slot, as a pause token has it."""
    embed = model.get_input_embeddings()

    def embedding(states: States) -> Tensor:
        ids = torch.full(states.last.shape[:-1], latent_id, device=states.last.device)
        vectors: Tensor = embed(ids)
        return vectors

    return Feedback(embedding)
