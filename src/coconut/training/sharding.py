"""Weights, gradients and optimizer state in shards, one for each process (FSDP2), for models too large for one.

* `update`: the weights are gathered once per update, so each process holds a shard of everything and one whole copy of
  the weights while an update runs.
* `pass`: every layer is gathered when a pass reaches it and given back when the pass leaves it, so each process holds
  a shard of everything and one layer, for a multiple of the messages.

Embeddings, final norm, head and a trained thought are whole throughout an update. Sharded weights are read by the
plain passes: torch gathers a layer when the layer itself is called.

A layer's gradients are summed over the processes, and only a shard of the sum is kept, after each pass in the backward
direction: what autograd gives for all passes together would be a whole copy of them.

Every process must send and receive in the same order. So each of them reads as many micro-batches as the others, of as
many passes: what it lacks is filled with rows that count nothing, and with cuts that change nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from coconut.checkpoints.tensors import RESTORE, read_tensors
from coconut.checkpoints.weights import quiet_transformers, read_config, weight_files
from coconut.model.feedback import Feedback
from coconut.model.passes import PassOptions
from coconut.ranks import Ranks
from coconut.shards import like, local, whole

T = TypeVar("T")
Sharding = Literal["update", "pass"]


class Step(nn.Module):
    """A model and its feedback as one module. Whatever reads their weights runs within its call."""

    def __init__(self, model: PreTrainedModel, feedback: Feedback) -> None:
        super().__init__()
        self.model, self.feedback = model, feedback

    def forward(self, work: Callable[[], Any]) -> Any:
        """Do the work, with embeddings, norm, head and feedback whole, and each layer whole while it runs."""
        return work()


class Shards:
    """The sharded weights of a model and its feedback. All processes must make it, and call it, together.

    Args:
        model: its weights are replaced by shards of them, under the same names. They may be on the meta device.
        compute_dtype: in which the layers are gathered, and multiplied under autocast; None: as they are stored.
            Autocast itself would keep a converted copy of every weight for every pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        feedback: Feedback,
        ranks: Ranks,
        kind: Sharding,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.kind, self.ranks = kind, ranks
        step = self.step = Step(model, feedback)
        self.model, self.feedback = model, feedback
        mesh = init_device_mesh(torch.device(ranks.device).type, (ranks.count,))
        # The rounds of parallel thoughts differ from process to process, so there the sums wait for the last of them.
        self._is_in_step = not feedback.parallel_iterations
        gathered = compute_dtype if self._is_in_step else None
        # What enters a layer stays as autocast has it, and sums over processes are in float32 in any case.
        precision = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
        for layer in find_layers(model):
            fully_shard(layer, mesh=mesh, reshard_after_forward=kind == "pass", mp_policy=precision)
            if self._is_in_step:
                replace_in_calls(layer, widens=gathered is not None)
        fully_shard(self.step, mesh=mesh, reshard_after_forward=False)
        for module in self._modules():
            module.set_gradient_divide_factor(1.0)  # Our losses are sums over tokens, not means over processes.
            module.set_force_sum_reduction_for_comms(True)
        if kind == "update":
            assert isinstance(step, FSDPModule), "fully_shard makes it one"
            step.set_reshard_after_backward(False)

    def run(self, read: Callable[[PassOptions], Tensor], options: PassOptions, *, num_passes: int) -> Tensor:
        """Return the loss of a micro-batch, which `read` computes with the options that shards need.

        Args:
            num_passes: the most that any process needs for its micro-batch.
        """
        options = replace(options, fast=False, num_passes=num_passes if self._is_in_step else 0)

        def work() -> Tensor:
            # A process whose rows hold no thought sends zeros; `settle` takes out what none has reached.
            zeros = [0.0 * parameter.sum() for parameter in self.feedback.parameters()]
            return torch.stack([read(options), *zeros]).sum()

        loss: Tensor = self.step(work)
        return loss

    def settle(self, *, has_thoughts: bool) -> None:
        """End the gradient of an update: give back what was gathered.

        Args:
            has_thoughts: whether any process's rows held one. A thought's weights have no gradient otherwise: AdamW
                would decay them for a gradient of zeros.
        """
        self._give_back()
        if not has_thoughts:
            for parameter in self.feedback.parameters():
                parameter.grad = None

    def read_whole(self, work: Callable[[], T]) -> T:
        """Do work that reads the weights without gradients.

        With `update` each process holds the whole weights meanwhile, and may read rows of its own. With `pass` all of
        them must read the same rows.
        """

        def unsharded() -> T:
            if self.kind == "update":
                for module in self._modules():
                    module.unshard()
            return work()

        try:
            found: T = self.step(unsharded)
            return found
        finally:
            self._give_back()

    def gather(self) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """Return the whole model, on the CPU, and the feedback's weights; only the first process gets them."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.step.named_parameters():
            found = whole(parameter.detach())
            if self.ranks.is_main:
                weights[name] = found.to("cpu", copy=True)
        if not self.ranks.is_main:
            return self.model, {}
        of_model = {name.removeprefix("model."): t for name, t in weights.items() if name.startswith("model.")}
        of_feedback = {name.removeprefix("feedback."): t for name, t in weights.items() if name.startswith("feedback.")}
        return assemble(self.model, of_model), of_feedback

    def _modules(self) -> list[FSDPModule]:
        return [module for module in self.step.modules() if isinstance(module, FSDPModule)]

    def _give_back(self) -> None:
        for module in self._modules():
            module.reshard()


def replace_in_calls(layer: nn.Module, *, widens: bool) -> None:
    """Let each call of a sharded layer read stand-ins of its weights.

    Autograd hands over the gradient of a weight once, when every call that reads it is done; until then it holds the
    sum, whole. The gradient of a stand-in is complete after its own call, in the backward direction, and becomes that
    of its weight when FSDP looks for one there. Stand-ins share the memory of the weights, but for widened vectors.

    Args:
        widens: stand in, in float32, for vectors: norms do not take weights of less bits than what they normalise.
    """
    names = [(owner, name, p.ndim) for owner in layer.modules() for name, p in owner.named_parameters(recurse=False)]
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []

    def enter(_layer: nn.Module, _inputs: object) -> None:
        for owner, name, num_dimensions in names:
            is_widened = widens and num_dimensions < 2
            if torch.is_grad_enabled() or is_widened:
                parameter = getattr(owner, name)
                replaced.append((owner, name, parameter))
                setattr(owner, name, _stand_in(parameter, torch.float32 if is_widened else parameter.dtype))

    def leave(*_: object) -> None:
        for owner, name, parameter in replaced:
            setattr(owner, name, parameter)
        replaced.clear()

    layer.register_forward_pre_hook(enter)  # After FSDP's, which gathers the weights.
    layer.register_forward_hook(leave, prepend=True, always_call=True)  # Before FSDP's, which gives them back.


def _stand_in(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    found = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)

    def hand_over(of_call: Tensor) -> None:
        assert of_call.grad is not None, "the hook follows its accumulation"
        gradient = of_call.grad.to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        of_call.grad = None

    if found.requires_grad:
        found.register_post_accumulate_grad_hook(hand_over)
    return found


def build_empty(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the causal language model of a config with its buffers, and weights that take no memory."""
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # Within the context every weight is an object of its own.
    return model


def assemble(sharded: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Build a plain model like a sharded one, of whole weights."""
    model = build_empty(sharded.config, next(iter(weights.values())).dtype)
    for name, tensor in weights.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(tensor))
    model.tie_weights()
    model.generation_config = sharded.generation_config
    return model.eval()


def load_sharded(
    folder: Path,
    load_thought: Callable[[PreTrainedModel], Feedback],
    ranks: Ranks,
    kind: Sharding,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
) -> Shards:
    """Load a checkpoint of this project, of which each process reads and holds its own part only.

    Args:
        load_thought: builds the feedback for the model.
        dtype: in which the weights are held.
        compute_dtype: see `Shards`.

    Raises:
        ValueError: if weights are missing, damaged, not finite, or under other names than the model's own.
    """
    model = build_empty(read_config(folder), dtype)
    shards = Shards(model, load_thought(model), ranks, kind, compute_dtype)
    device = torch.device(ranks.device)

    def place(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    shards.step._apply(place)  # type: ignore[no-untyped-call]
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        found |= read_tensors(path, "the weights")  # Mapped: what a process does not copy takes no memory of its own.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _check_fits(found.get(name), parameter, f"{folder}: {name}")
            parameter.copy_(like(found[name], parameter, dtype))
            if not bool(torch.isfinite(local(parameter)).all()):
                raise ValueError(f"{folder}: {name}: found weights that are not finite, wanted finite ones; {RESTORE}")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.eval()
    return shards


def _check_fits(found: Tensor | None, wanted: Tensor, place: str) -> None:
    if found is None:
        raise ValueError(
            f"{place}: no such tensor in the weights, wanted every weight under the name that the model gives it;"
            f" {RESTORE}, or take runtime.sharding: none"
        )
    if found.shape != wanted.shape:
        raise ValueError(f"{place}: found shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}; {RESTORE}")


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model.

    Raises:
        ValueError: if its body does not hold as many modules in a row as its config says that it has layers.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"runtime.sharding: found a {type(model).__name__} without a list of its {num_layers} layers, wanted a model"
        " whose layers can be sharded one by one; use none"
    )
