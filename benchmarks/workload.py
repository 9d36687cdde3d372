"""What is measured: a model, batches, updates of several kinds, and how time and memory are taken."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from coconut.config.methods import find_method
from coconut.config.schema import LatentConfig
from coconut.data.collator import Batch, collate
from coconut.data.encoding import EncodedExample
from coconut.data.views import IGNORED, View
from coconut.methods import DEFAULT, Method
from coconut.model.fast import layers, products
from coconut.model.fast.thresholds import Thresholds
from coconut.model.feedback import Feedback
from coconut.model.latent import latent_nll, supervised_nll
from coconut.model.passes import PassOptions, PlainPasses
from coconut.training.rows import TrainingRow

VOCAB_SIZE = 50260
Nll = Callable[[PreTrainedModel, Batch, PassOptions], tuple[Tensor, int]]


def build_gpt2(device: str, *, vocab_size: int = VOCAB_SIZE, **shape: int) -> PreTrainedModel:
    """Random weights in the shape of GPT-2 (124M), without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab_size, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **shape)
    return GPT2LMHeadModel(config).to(device).train()


def make_views(
    num_rows: int,
    *,
    num_latents: int = 6,
    question: tuple[int, int] = (48, 64),
    supervised: tuple[int, int] = (8, 24),
    seed: int = 0,
) -> list[View]:
    """Rows of random tokens; `question` and `supervised` are the shortest and the longest."""
    random = Random(seed)
    views = []
    for _ in range(num_rows):
        prompt = [random.randrange(50257) for _ in range(random.randint(*question))]
        target = [random.randrange(50257) for _ in range(random.randint(*supervised))]
        ids = prompt + [50259] * num_latents + target
        labels = [IGNORED] * (len(prompt) + num_latents) + target
        views.append(View(ids, labels, prefix_length=len(prompt), num_slots=num_latents, num_thoughts=num_latents))
    return views


def default_method() -> Method:
    """The method whose loss is that of the text, with thoughts as many as the views say."""
    kind = find_method(DEFAULT)
    return kind(0, LatentConfig(1, 1, True, False, 0.0, "hidden[-1]", 0), kind.Keys())


def as_rows(views: Sequence[View]) -> list[TrainingRow]:
    """Views as an update shows them that reads each row in one layout."""
    return [TrainingRow(EncodedExample([], [], []), {"row": view}, 0) for view in views]


def make_batch(num_rows: int, device: str, **options: Any) -> Batch:
    """A padded batch of `make_views`."""
    return collate(make_views(num_rows, **options), pad_id=0).to(device)


# --- kinds of updates -------------------------------------------------------------------------


def plain(model: PreTrainedModel, batch: Batch, options: PassOptions) -> tuple[Tensor, int]:
    """The baseline: the same batch as ordinary tokens, one pass of the library's own model."""
    output = model.base_model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=batch.position_ids_BT,
        use_cache=False,
    )
    passes = PlainPasses(model, batch, replace(options, fast=False))
    return supervised_nll(passes, output.last_hidden_state, batch)


def with_thoughts(model: PreTrainedModel, batch: Batch, options: PassOptions) -> tuple[Tensor, int]:
    """The update that is shipped."""
    return latent_nll(model, Feedback(), batch, options)


def checkpointed(model: PreTrainedModel, batch: Batch, options: PassOptions) -> tuple[Tensor, int]:
    """The same, keeping no activations between passes."""
    return latent_nll(model, Feedback(), batch, replace(options, checkpoint_activations=True))


def without_thoughts(model: PreTrainedModel, batch: Batch, options: PassOptions) -> tuple[Tensor, int]:
    """A stricter baseline: the same batch as ordinary tokens, with every part of the fast path."""
    device, host = batch.input_ids_BT.device, batch.host
    batch = host._replace(is_latent_BT=torch.zeros_like(host.is_latent_BT)).to(device)
    return latent_nll(model, Feedback(), batch, options)


NEVER = 1 << 60


def ideas(*, gates: bool = False, store: bool = False, packed: bool = False, onednn: bool = False) -> PassOptions:
    """Options that switch on these parts of the fast path alone; none of them is a straightforward implementation."""
    default = Thresholds()
    thresholds = replace(
        default,
        min_weight_elements=0 if gates else NEVER,
        min_multiplications=default.min_multiplications if onednn else NEVER,
        min_width=0 if store else NEVER,
        min_packed_work=default.min_packed_work if packed else NEVER,
    )
    return PassOptions(thresholds=thresholds)


@contextlib.contextmanager
def activation(*, fused: bool) -> Iterator[None]:
    """Compute GPT-2's activation in one operation or, as the library does, in eight."""
    before = layers.fused_gelu
    layers.fused_gelu = before if fused else _eight_operations
    try:
        yield
    finally:
        layers.fused_gelu = before


def _eight_operations(input: Tensor) -> Tensor:
    return 0.5 * input * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (input + 0.044715 * torch.pow(input, 3.0))))


class Update:
    """One optimizer update on a batch: zero the gradients, forward, backward, AdamW."""

    def __init__(
        self, model: PreTrainedModel, batch: Batch, nll: Nll, *, gelu: bool = True, options: PassOptions | None = None
    ) -> None:
        self.model, self.batch, self.nll = model, batch, nll
        self.gelu, self.options = gelu, options or PassOptions()
        self.optimizer: torch.optim.Optimizer | None = None
        self.keeps_gradients = False
        self.is_bf16 = False

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=not self.keeps_gradients)
        with activation(fused=self.gelu):
            with torch.autocast(self.batch.input_ids_BT.device.type, torch.bfloat16, enabled=self.is_bf16):
                nll, num_tokens = self.nll(self.model, self.batch, self.options)
            (nll / num_tokens).backward()
        assert self.optimizer is not None
        self.optimizer.step()


def share_optimizer(updates: Mapping[str, Update]) -> None:
    """One AdamW for all, as they update one model."""
    model = next(iter(updates.values())).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for update in updates.values():
        update.optimizer = optimizer


# --- measures ---------------------------------------------------------------------------------


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(steps: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each, taken in turns: what disturbs the machine for a while disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + repeats):
        for name, step in steps.items():
            synchronize()
            started = time.perf_counter()
            step()
            synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_mb(step: Callable[[], Any]) -> float:
    """Largest sum of tensors that the step allocates over what is there already, in MB.

    On a CPU from the allocator's own events (torch profiler): exact, and blind to what malloc keeps
    back or the kernel hands out lazily, which make resident memory of one process depend on what ran
    before. On a GPU from torch's allocator.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 1e6


def update_peak_mb(update: Update) -> float:
    """Peak of an update above weights, gradients and Adam's moments, all of which are there before."""
    update()
    update.keeps_gradients = True
    update()
    peak = peak_mb(update)
    update.keeps_gradients = False
    return peak


def matrix_rates(device: str, dtype: torch.dtype = torch.float32, size: int = 2048) -> dict[str, float]:
    """Operations per second of a large matrix product: torch's own, and through the library that we take."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        seconds = alternate({"torch": lambda: a @ b, "ours": lambda: products.linear(a, b)}, repeats=7)
    return {name: 2 * size**3 / value for name, value in seconds.items()}
