"""The weights that an entry trains, their optimizer, and a copy of the best epoch's: the tensors of a resume state."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut.checkpoints.tensors import RESTORE
from coconut.config.schema import TrainConfig
from coconut.model.feedback import Feedback
from coconut.shards import is_shard, like, local, whole
from coconut.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer

Tensors = Mapping[str, Tensor]
_THROWN_AWAY = "training."
"""Begins the names of weights that no checkpoint holds."""


class Learner:
    """Every trained parameter by name, with its optimizer.

    Args:
        feedback: its parameters are trained with the model's, under the prefix `feedback.`.
        modules: what the method trains and throws away, under the prefix `training.`.
    """

    def __init__(
        self, model: PreTrainedModel, feedback: Feedback, config: TrainConfig, modules: nn.Module | None = None
    ) -> None:
        named = [*model.named_parameters(), *((f"feedback.{name}", p) for name, p in feedback.named_parameters())]
        if modules is not None:
            named += [(f"{_THROWN_AWAY}{name}", p) for name, p in modules.named_parameters()]
        self.parameters: dict[str, nn.Parameter] = dict(named)
        self.optimizer = build_optimizer(self.parameters, config)
        self.num_updates = 0
        """Done by this optimizer, the parent's included where it was taken over."""
        self._max_grad_norm = torch.inf if config.max_grad_norm is None else config.max_grad_norm
        self._keeps_optimizer_state = not config.reset_optimizer
        self._best: dict[str, Tensor] = {}

    def clip_gradients(self) -> Tensor:
        """Scale all gradients together to `max_grad_norm` at most; their norm before that, not yet asked for."""
        return whole(nn.utils.clip_grad_norm_(self.parameters.values(), self._max_grad_norm))

    def step(self, lr: float) -> None:
        """One optimizer update at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.num_updates += 1

    def is_finite(self) -> bool:
        """Say whether all weights are numbers, of sharded ones this process's part."""
        return all(bool(torch.isfinite(local(parameter)).all()) for parameter in self.parameters.values())

    # --- the best epoch ---

    def keep_best(self) -> None:
        """Remember the weights as the best so far, and the optimizer state where the next entry takes them over."""
        kept: dict[str, Tensor] = {f"weight:{name}": tensor for name, tensor in self.parameters.items()}
        if self._keeps_optimizer_state:
            kept |= {f"moment:{name}": tensor for name, tensor in self.optimizer_state().items()}
        # On the CPU: the copy is read once, and an accelerator's memory is needed for the next updates.
        self._best = {name: _copy(tensor.detach()) for name, tensor in kept.items()}

    def take_best(self) -> None:
        """Put back what `keep_best` remembered."""
        self._load_weights(_with_prefix(self._best, "weight:"))
        if self._keeps_optimizer_state:
            self.take_over(_with_prefix(self._best, "moment:"))

    # --- tensors by name ---

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer state and the best epoch's, by prefixed names."""
        return {
            **{f"weight:{name}": parameter.detach() for name, parameter in self.parameters.items()},
            **{f"moment:{name}": tensor for name, tensor in self.optimizer_state().items()},
            **{f"best:{name}": tensor for name, tensor in self._best.items()},
        }

    def restore(self, tensors: Tensors) -> None:
        """Continue from what `tensors` once gave."""
        self._load_weights(_with_prefix(tensors, "weight:"))
        self.take_over(_with_prefix(tensors, "moment:"))
        # A copy, because the tensors may be a memory-mapped file that is about to be replaced.
        best = _with_prefix(tensors, "best:")
        self._best = {name: like(tensor, self._model_of(name), tensor.dtype) for name, tensor in best.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state, as it goes to the next entry or the resume state."""
        return optimizer_tensors(self.optimizer, self.parameters, num_updates=self.num_updates)

    def inherited_optimizer_state(self) -> dict[str, Tensor]:
        """Return what a child entry takes over: the optimizer state of what the checkpoint holds."""
        return {name: tensor for name, tensor in self.optimizer_state().items() if not name.startswith(_THROWN_AWAY)}

    def take_over(self, moments: Tensors, *, place: str = "resume state") -> None:
        """Continue with this optimizer state, the parent's or a saved state's.

        Args:
            place: where they come from, for the message.

        Raises:
            ValueError: if they are not whole, or of another model.
        """
        try:
            self.num_updates = restore_optimizer(self.optimizer, self.parameters, moments)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{place}: found an optimizer state that is not whole, or of another model ({error}), wanted that of"
                f" this model; {RESTORE}, or set train.reset_optimizer: true"
            ) from error

    def _load_weights(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(like(tensors[name], parameter, parameter.dtype))

    def _model_of(self, name: str) -> Tensor:
        """Return the parameter that a tensor of the best epoch belongs to, or a plain number's place."""
        kind, _, rest = name.partition(":")
        owner = self.parameters.get(rest if kind == "weight" else rest.rpartition("/")[0])
        return torch.empty(0) if owner is None or not is_shard(owner) else owner


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone() if is_shard(tensor) else tensor.to("cpu", copy=True)


def _with_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
