"""Telling one backward pass of autograd from the next."""

import torch


class Backward:
    """Knows in which backward pass something is collected; a failed one leaves behind what it collected."""

    def __init__(self) -> None:
        self._id = -1

    def is_another(self) -> bool:
        """Say whether another backward pass has begun since this was last asked. Ask within one."""
        current = torch._C._current_graph_task_id()
        is_another, self._id = current != self._id, current
        return is_another
