"""A model's layers as they run over the passes of one batch: `with layers.active():` around each pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from coconut.model.batch import Batch
from coconut.model.fast.gates import Conversion, GatedLinear
from coconut.model.fast.thresholds import Thresholds
from coconut.model.fast.tied import TiedEmbeddings, is_tied

Forward = tuple[nn.Module, Callable[..., Any]]


class BatchLayers:
    """The layers of one model during one batch.

    Args:
        batch: whose ids are looked up; without it, ids are asked for where they are.
        saves_memory: keep no more factors of a weight's gradient than the gradient itself would take. Without
            activation checkpoints the factors exist anyway, as activations.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Batch | None = None,
        *,
        saves_memory: bool = False,
        thresholds: Thresholds | None = None,
    ) -> None:
        self.is_active = False
        self.blocks = checkpointable_blocks(model)
        self.forwards: list[Forward] = []
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        thresholds = thresholds or Thresholds()
        self.conversion = Conversion()
        for module in model.modules():
            if "forward" in module.__dict__:
                continue  # Somebody else has replaced it already, on purpose.
            if type(module) is NewGELUActivation:
                self.forwards.append((module, fused_gelu))
            elif type(module) in (nn.Linear, Conv1D):
                max_kept = module.weight.numel() if saves_memory else None
                if module is head:
                    max_kept = min(module.weight.numel(), thresholds.max_kept_of_head)
                layer = GatedLinear(module, max_kept, thresholds, self.conversion)
                self.forwards.append((module, layer))
                if module is head and is_tied(embeddings, layer):
                    self.forwards.append((embeddings, TiedEmbeddings(embeddings, layer, batch)))

    @contextmanager
    def active(self, recompute_in: Callable[[], AbstractContextManager[None]] | None = None) -> Iterator[None]:
        """Run the model's layers this way until the block ends.

        Args:
            recompute_in: keep only what enters each of the decoder's layers, and run the layer again in the
                backward pass, within the context that this makes.
        """
        forwards = list(self.forwards)
        if recompute_in is not None:
            forwards += [(block, self._checkpointed(block, recompute_in)) for block in self.blocks]
        self.is_active = True
        try:
            with _replaced(forwards):
                yield
        finally:
            self.is_active = False
            self.conversion.clear()

    def _checkpointed(
        self, block: nn.Module, recompute_in: Callable[[], AbstractContextManager[None]]
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                if not self.is_active:  # In the backward pass.
                    inside = set(block.modules())
                    stack.enter_context(_replaced([pair for pair in self.forwards if pair[0] in inside]))
                    stack.callback(self.conversion.clear)
                    stack.enter_context(recompute_in())
                # The class's own `forward`: the block's is the one that is made here.
                return type(block).forward(block, *args, **kwargs)

        return partial(checkpoint, run, use_reentrant=False)


def checkpointable_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """List the decoder's layers that can be run again one by one in the backward pass."""
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and "forward" not in module.__dict__
    ]


@contextmanager
def _replaced(forwards: Sequence[Forward]) -> Iterator[None]:
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward  # As an assignment does, after a search for parameters.
        yield
    finally:
        for module, _ in forwards:
            module.__dict__.pop("forward", None)


def fused_gelu(input: Tensor) -> Tensor:
    """Apply GPT-2's activation as one operation instead of eight; it keeps one tensor instead of five."""
    return gelu(input, approximate="tanh")
