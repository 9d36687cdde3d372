"""AdamW, its learning rate, and its state as named tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from coconut.config.schema import Entry, TrainConfig
from coconut.shards import like, local

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

    The warm-up counts the optimizer's own updates: one that is taken over from the parent entry
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
    """The optimizer's state as `<parameter>/<moment>` tensors, and the updates it has done."""
    tensors = {_NUM_UPDATES: torch.tensor(num_updates)}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def fits_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> bool:
    """Say whether a state was left by an optimizer of this kind; 8-bit Adam keeps others, under other names."""
    kinds = {name.rpartition("/")[2] for name in tensors if "/" in name}
    return not kinds or ("exp_avg" in kinds) == isinstance(optimizer, torch.optim.AdamW)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, tensors: Mapping[str, Tensor]
) -> int:
    """Put back what `optimizer_tensors` took out; parameters without state stay fresh.

    Returns:
        The number of updates the optimizer has done.

    Raises:
        ValueError: if the state is not whole, not finite, or not that of these parameters.
    """
    names = {key.rpartition("/")[0] for key in tensors if "/" in key}
    # A thought that was trained in the parent may have no place here.
    strangers = sorted(name for name in names - parameters.keys() if not name.startswith("feedback."))
    if strangers:
        raise ValueError(f"found optimizer state of {strangers[0]:.80}, which is no weight of this model")
    for name, parameter in parameters.items():
        prefix = f"{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        _check_state(optimizer, name, state, parameter)
        if state:
            optimizer.state[parameter] = {key: _place(key, value, parameter) for key, value in state.items()}
    num_updates = int(tensors[_NUM_UPDATES])
    if num_updates < 0:
        raise ValueError(f"{_NUM_UPDATES}: found {num_updates}, wanted at least 0")
    return num_updates


def _check_state(
    optimizer: torch.optim.Optimizer, name: str, state: Mapping[str, Tensor], parameter: nn.Parameter
) -> None:
    if state and isinstance(optimizer, torch.optim.AdamW) and state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        raise ValueError(f"{name}: found {', '.join(sorted(state)):.200}, wanted step, exp_avg and exp_avg_sq")
    for key, value in state.items():
        if key.startswith("exp_avg") and value.shape != parameter.shape:
            raise ValueError(f"{name}/{key}: found shape {tuple(value.shape)}, wanted {tuple(parameter.shape)}")
        if key == "step" and value.numel() != 1:
            raise ValueError(f"{name}/{key}: found shape {tuple(value.shape)}, wanted a single number")
        if value.is_floating_point() and not bool(local(value).isfinite().all()):
            raise ValueError(f"{name}/{key}: found values that are not finite, wanted finite ones")


def _place(key: str, value: Tensor, parameter: nn.Parameter) -> Tensor | int:
    if value.ndim == 0 and not value.is_floating_point():
        return int(value)
    # A parent of another precision has its state in that; AdamW wants them in the parameter's.
    dtype = parameter.dtype if key.startswith("exp_avg") else value.dtype
    # A copy, because the tensors may be a memory-mapped file that is about to be replaced.
    return like(value, parameter, dtype)
