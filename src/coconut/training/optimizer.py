"""AdamW, its learning rate, and its state as named tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from coconut.config.schema import Entry, TrainConfig

NamedParameters = Mapping[str, nn.Parameter]

_NUM_UPDATES = "num_updates"


def build_optimizer(parameters: NamedParameters, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters; the learning rate is set before each update.

    Raises:
        ValueError: if `adamw_8bit` is asked for where `bitsandbytes` is not installed.
    """
    values = list(parameters.values())
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw_8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise ValueError(
                "train.optimizer: found adamw_8bit, but bitsandbytes is not installed;"
                " pip install -e '.[bitsandbytes]', or use adamw"
            ) from None
        eight_bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            values, betas=betas, weight_decay=config.weight_decay
        )
        return eight_bit
    return torch.optim.AdamW(values, betas=betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(entry: Entry, *, update: int, num_updates: int, optimizer_updates: int) -> float:
    """The rate of update `update` (from 0) of `num_updates` in this entry.

    The warm-up counts the optimiser's own updates: one that is taken over from the parent entry
    is warm already, a fresh one warms up again.
    """
    rate = entry.lr
    if entry.train.schedule == "linear":
        rate *= 1 - update / num_updates
    elif entry.train.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * update / num_updates))
    if optimizer_updates < entry.train.warmup_updates:
        rate *= (optimizer_updates + 1) / entry.train.warmup_updates
    return rate


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, *, num_updates: int
) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter>/<moment>` tensors, and the updates it has done."""
    tensors = {_NUM_UPDATES: torch.tensor(num_updates)}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def fits_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> bool:
    """Whether moments were left by an optimiser of this kind; 8-bit Adam keeps others, under other names."""
    kinds = {name.rpartition("/")[2] for name in tensors if "/" in name}
    return not kinds or ("exp_avg" in kinds) == isinstance(optimizer, torch.optim.AdamW)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, tensors: Mapping[str, Tensor]
) -> int:
    """Put back what `optimizer_tensors` took out; parameters without state stay fresh.

    Returns:
        The number of updates the optimiser has done.

    Raises:
        ValueError: if a moment has not its parameter's shape, as after a change of the model.
    """
    for name, parameter in parameters.items():
        prefix = f"{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for key, value in state.items():
            if key.startswith("exp_avg") and value.shape != parameter.shape:
                raise ValueError(
                    f"optimiser state {prefix}{key}: found shape {tuple(value.shape)}, wanted"
                    f" {tuple(parameter.shape)}; set train.reset_optimizer: true"
                )
        if state:
            optimizer.state[parameter] = {key: _place(key, value, parameter) for key, value in state.items()}
    return int(tensors[_NUM_UPDATES])


def _place(key: str, value: Tensor, parameter: nn.Parameter) -> Tensor | int:
    if value.ndim == 0 and not value.is_floating_point():
        return int(value)
    # A parent of another precision has its moments in that; AdamW wants them in the parameter's.
    dtype = parameter.dtype if key.startswith("exp_avg") else value.dtype
    # A copy, because the tensors may be a memory-mapped file that is about to be replaced.
    return value.to(parameter.device, dtype, copy=True)
