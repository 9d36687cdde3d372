"""Telling one backward pass of autograd from the next."""

import torch


class Backward:
    """The backward pass in which something is collected; a pass that fails leaves behind what it collected."""

    def __init__(self) -> None:
        self._id = -1

    def is_another(self) -> bool:
        """Whether, since this was last asked, another backward has begun. Ask within one."""
        current = torch._C._current_graph_task_id()
        is_another, self._id = current != self._id, current
        return is_another
