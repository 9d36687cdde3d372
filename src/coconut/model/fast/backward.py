"""Differentiating once at no cost where nobody asks for more, and telling one backward pass from the next."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to differentiate a second time, as `once_differentiable` does."""
    refusing = once_differentiable(backward)

    def run(ctx: Any, *gradients: Any) -> Any:
        return refusing(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return run


class Backward:
    """Knows in which backward pass something is collected; a failed one leaves behind what it collected."""

    def __init__(self) -> None:
        self._id = -1

    def is_another(self) -> bool:
        """Say whether another backward pass has begun since this was last asked. Ask within one."""
        current = torch._C._current_graph_task_id()
        is_another, self._id = current != self._id, current
        return is_another
