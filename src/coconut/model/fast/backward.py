"""Autograd functions that cost little around their operations, and telling one backward pass from the next.

A thin pass is bound by the host: where a thought takes 600 microseconds a layer and its products 40, what torch does
in Python for each function counts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Function(torch.autograd.Function):
    """An autograd function that is called by `run`, which is `apply` without a search for what functorch has left."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """Call the function."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse to differentiate a second time, as `once_differentiable` does, at no cost where nobody asks for it."""
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
