"""Run by tests as one of several processes: the gradients of updates, and validation, which rank 0 writes down.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=... python tests/update_of_ranks.py result.safetensors none fp32
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from arms import make_method, rows_of
from coconut.config.params import load_params
from coconut.data.views import IGNORED, View
from coconut.devices import build_accelerator, compute_dtype_of, ranks_of
from coconut.model.feedback import build_feedback
from coconut.model.passes import PassOptions
from coconut.shards import whole
from coconut.training.objective import Objective
from coconut.training.sharding import Shards
from families import build_family

VIEWS_OF = [(5, 3, 4), (9, 3, 2), (2, 1, 6), (4, 0, 5), (7, 2, 3), (3, 3, 3), (6, 2, 2)]
"""Columns of the question, thoughts, and columns with a label."""
CASES = {
    "gpt2": {"family": "gpt2"},  # With the dropout that it is published with.
    "llama, wide, in pieces": {"family": "llama", "width": 256, "micro_batch": 2},
    "qwen2, projection": {"family": "qwen2", "thought": "projection"},
    "mistral, checkpoints": {"family": "mistral", "checkpoint_activations": True},
    "gpt2, normalised, plain": {"family": "gpt2", "thought": "normalised", "fast": False, "micro_batch": 3},
    "gpt2, no thoughts": {"family": "gpt2", "thought": "projection", "num_thoughts": 0},
    "llama, all at once": {"family": "llama", "parallel_iterations": 2},
    "gpt2, one row": {"family": "gpt2", "num_rows": 1},  # The other processes have nothing to do.
    "llama, no room for two rows in the last process": {"family": "llama", "room": 1},
}


def make_views(num_rows: int = len(VIEWS_OF), num_thoughts: int | None = None) -> list[View]:
    views = []
    for row, (num_question, thoughts, num_target) in enumerate(VIEWS_OF[:num_rows]):
        thoughts = thoughts if num_thoughts is None else num_thoughts
        length = num_question + thoughts + num_target
        ids = [(5 + 13 * row + 7 * column) % 60 for column in range(length)]
        labels = [IGNORED] * (length - num_target) + ids[length - num_target :]
        views.append(View(ids, labels, num_question, thoughts, thoughts))
    return views


def limit_rows(objective: Objective, room: int) -> None:
    """Let larger micro-batches run out of memory, as on a device that others use too."""
    read = objective._read

    def limited(name, rows, places, *rest):
        if len(places) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return read(name, rows, places, *rest)

    objective._read = limited


@contextmanager
def counting(name: str) -> Iterator[list[tuple[int, int]]]:
    """The elements of what enters and leaves torch's collective of this name, each time."""
    found = []
    collective = getattr(torch.distributed, name)

    def counted(*tensors, **keywords):
        given = [tensor for tensor in (*tensors, *keywords.values()) if isinstance(tensor, torch.Tensor)]
        found.append(tuple(tensor.numel() for tensor in given))
        return collective(*tensors, **keywords)

    setattr(torch.distributed, name, counted)
    try:
        yield found
    finally:
        setattr(torch.distributed, name, collective)


def gradients(accelerator: Accelerator, case: dict, sharding: str) -> dict[str, torch.Tensor]:
    """One update's gradients and its cost; with shards, also how much of the weights was gathered."""
    case = dict(case)
    views = make_views(case.pop("num_rows", len(VIEWS_OF)), case.pop("num_thoughts", None))
    model = build_family(case.pop("family"), case.pop("width", 64)).train()
    feedback = build_feedback(
        case.pop("thought", "hidden[-1]"), model, parallel_iterations=case.pop("parallel_iterations", 0)
    )
    room = case.pop("room", len(views))
    num_weights = sum(p.numel() for module in (model, feedback) for p in module.parameters())
    ranks, compute_dtype = ranks_of(accelerator), compute_dtype_of(accelerator)
    shards = Shards(model, feedback, ranks, sharding, compute_dtype) if sharding != "none" else None
    objective = Objective(
        model,
        feedback,
        accelerator,
        0,
        micro_batch=case.pop("micro_batch", len(views)),
        method=make_method(),
        options=PassOptions(**case),
        ranks=ranks_of(accelerator),
        shards=shards,
    )
    parameters = dict(model.named_parameters()) | {f"feedback.{name}": p for name, p in feedback.named_parameters()}
    if ranks_of(accelerator).rank == ranks_of(accelerator).count - 1 and sharding == "none":
        limit_rows(objective, room)
    torch.manual_seed(7)
    with counting("all_gather_single") as gathered, counting("reduce_scatter_single") as reduced:
        cost = objective.accumulate(rows_of(views), parameters, stops=ranks_of(accelerator).rank == 1)
    found = {name: whole(p.grad).clone() for name, p in parameters.items() if p.grad is not None}
    nll, num_tokens, _ = cost.parts["nll"]
    numbers = [nll, num_tokens, cost.num_columns - cost.num_padding, cost.num_latents, cost.stops]
    of_weights = [max(map(sum, zip(*sizes, strict=True)), default=0) / num_weights for sizes in (gathered, reduced)]
    numbers += [*of_weights, objective.micro_batch, objective.num_oom_retries]
    # Every process must say the same.
    assert len({str(one) for one in ranks_of(accelerator).gather(numbers)}) == 1
    return found | {"cost": torch.tensor(numbers, dtype=torch.float64)}


if __name__ == "__main__":
    runtime = load_params(Path(__file__).parents[1] / "params.yaml").runtime
    sharding, precision = sys.argv[2:]
    accelerator = build_accelerator(runtime, precision)
    results = {
        f"{name}/{key}": tensor
        for name, case in CASES.items()
        if not (sharding == "pass" and "parallel_iterations" in case)
        for key, tensor in gradients(accelerator, case, sharding).items()
    }
    if ranks_of(accelerator).is_main:
        save_file(results, sys.argv[1])
