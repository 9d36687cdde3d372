"""Rotary position embeddings in fewer operations.

transformers turns x into `x * cos + cat(-x2, x1) * sin`. Here the sign is that of the sine, which all layers share:
`x * cos + roll(x) * (-sin1, sin2)`, without the pieces of x that autograd would put together again.

Legend: B rows, S columns of one pass, H heads of queries, K of keys, d width of a head.
"""

import sys
from types import FunctionType, ModuleType

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from coconut.model.fast.same_code import is_same_code

_APPLY, _ROTATE = "apply_rotary_pos_emb", "rotate_half"
_LLAMAS_APPLY = modeling_llama.apply_rotary_pos_emb


class Rotation:
    """Stands in for `apply_rotary_pos_emb` of one Python module during one batch."""

    def __init__(self, python_module: ModuleType, original: FunctionType) -> None:
        self.python_module, self.original = python_module, original
        self._signed: tuple[Tensor, Tensor] | None = None
        """The last sine, and the same with signs."""

    def install(self) -> None:
        """Take the place of the function."""
        setattr(self.python_module, _APPLY, self)

    def remove(self) -> None:
        """Put the function back, and keep nothing of the last pass."""
        setattr(self.python_module, _APPLY, self.original)
        self._signed = None

    def __call__(
        self, query: Tensor, key: Tensor, cosine_BSd: Tensor, sine_BSd: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rotate queries, B x H x S x d, and keys, B x K x S x d; with S before the heads if `unsqueeze_dim` is 2."""
        cosine, sine = (one.unsqueeze(unsqueeze_dim) for one in (cosine_BSd, self._with_signs(sine_BSd)))
        rotated_query, rotated_key = (
            torch.addcmul(one * cosine, one.roll(one.shape[-1] // 2, dims=-1), sine) for one in (query, key)
        )
        return rotated_query, rotated_key

    def _with_signs(self, sine_BSd: Tensor) -> Tensor:
        last = self._signed  # Once, as other threads may rotate too.
        if last is None or last[0] is not sine_BSd:
            first, second = sine_BSd.chunk(2, dim=-1)
            last = self._signed = sine_BSd, torch.cat((-first, second), dim=-1)
        return last[1]


def rotations_of(model: nn.Module) -> list[Rotation]:
    """Make one for each Python module of this model's layers that rotates as Llama's does."""
    rotations = []
    for name in sorted({type(module).__module__ for module in model.modules()}):
        found = vars(sys.modules[name])
        apply, rotate = found.get(_APPLY), found.get(_ROTATE)
        if isinstance(apply, Rotation):  # Another model is being read.
            apply = apply.original
        is_known = is_same_code(apply, _LLAMAS_APPLY) and is_same_code(rotate, modeling_llama.rotate_half)
        if is_known and isinstance(apply, FunctionType):
            rotations.append(Rotation(sys.modules[name], apply))
    return rotations
