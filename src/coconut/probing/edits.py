"""What can be put into the slots in place of the thoughts. Legend: N questions, K slots, D hidden."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from coconut.evaluation.evaluator import Edits
from coconut.model.thoughts import Edit


def put(vectors_NKD: Tensor, slots: Collection[int]) -> Edits:
    """Return edits that put every question's own row of vectors into these slots, counted from 0."""

    def edits(places: Sequence[int]) -> Edit:
        def edit(slot: int, vector_BD: Tensor) -> Tensor:
            return vectors_NKD[list(places), slot].to(vector_BD) if slot in slots else vector_BD

        return edit

    return edits


def replacements(vectors_NKD: Tensor) -> dict[str, Tensor]:
    """Return what enters instead of the vectors, by the name of the intervention, each N x K x D.

    Noise has the norm of what it replaces; another question is the next one; the order of the slots is turned around.
    """
    generator = torch.Generator().manual_seed(0)
    noise_NKD = torch.randn(vectors_NKD.shape, generator=generator)
    scale_NK1 = vectors_NKD.norm(dim=-1, keepdim=True) / noise_NKD.norm(dim=-1, keepdim=True)
    return {
        "zero": torch.zeros_like(vectors_NKD),
        "mean": vectors_NKD.mean(dim=0, keepdim=True).expand_as(vectors_NKD),
        "noise": noise_NKD * scale_NK1,
        "other_question": vectors_NKD.roll(1, dims=0),
        "reordered": vectors_NKD.flip(1),
    }
