"""Tensors of which each process may hold a part (DTensor), and plain ones, handled alike."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Say whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, which all processes must ask for together; a plain one is whole already."""
    if not is_shard(tensor):
        return tensor
    found: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return found


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    if not is_shard(tensor):
        return tensor
    found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return found


def like(value: Tensor, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a tensor that lies where a parameter does; of a sharded one, this process's part.

    Nothing is sent: each process cuts its part out of the whole, which may be a mapped file.
    """
    if is_shard(value):
        return value.to(dtype, copy=True)
    if not is_shard(parameter) or value.ndim == 0:
        return value.to(parameter.device, dtype, copy=True)
    from torch.distributed.tensor import distribute_tensor  # Here, because importing it takes part of a second.

    sharded: Any = parameter
    part = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    return part.to(parameter.device, dtype, copy=True)


def give_shards(tensors: Mapping[str, Tensor]) -> None:
    """Take part in the gathering of tensors that another process writes down, in its order."""
    for name in sorted(tensors):
        whole(tensors[name])
