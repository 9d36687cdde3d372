"""Updates of a GPT-2 (124M): latent against plain, in time and memory."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut.data.collator import Batch
from coconut.model.batch import latent_columns
from coconut.model.fast.products import linear
from coconut.model.passes import PassOptions
from workload import (
    Update,
    alternate,
    build_gpt2,
    checkpointed,
    ideas,
    make_batch,
    matrix_rates,
    peak_mb,
    plain,
    share_optimizer,
    update_peak_mb,
    with_thoughts,
    without_thoughts,
)

KINDS = {"plain": plain, "ours, no thoughts": without_thoughts, "latent": with_thoughts}
ALL_PASSES = "products of all passes alone"
ONE_PASS = "the same in one pass"
STRAIGHT: dict[str, Any] = {"gelu": False, "options": ideas()}
IDEAS: dict[str, dict[str, Any]] = {
    "straightforward": STRAIGHT,
    "weight gradients once": {"gelu": False, "options": ideas(gates=True)},
    "one operation per GELU": {"gelu": True, "options": ideas()},
    "key-value store": {"gelu": False, "options": ideas(store=True)},
    "store, padding left out": {"gelu": False, "options": ideas(store=True, packed=True)},
    "oneDNN products": {"gelu": False, "options": ideas(onednn=True)},
    "all but oneDNN": {"gelu": True, "options": ideas(gates=True, store=True, packed=True)},
    "all": {"gelu": True, "options": ideas(gates=True, store=True, packed=True, onednn=True)},
}
"""On top of a straightforward implementation: one pass per latent column, the library's cache and layers."""


def compare(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """Seconds of an update, B = 8 and B = 32."""
    model = build_gpt2(device)
    return {f"B={num_rows}": _seconds(model, device, num_rows, repeats) for num_rows in (8, 32)}


def _seconds(model: Any, device: str, num_rows: int, repeats: int) -> dict[str, Any]:
    batch = make_batch(num_rows, device)
    updates = {name: Update(model, batch, nll) for name, nll in KINDS.items()}
    updates["latent, torch's products"] = Update(model, batch, with_thoughts, **IDEAS["all but oneDNN"])
    share_optimizer(updates)
    # Without thoughts the same tokens stand in one pass: fewer readings of the weights, and wider products.
    num_tokens = tokens_of_passes(batch)
    products = {ALL_PASSES: products_of(model, num_tokens), ONE_PASS: products_of(model, [sum(num_tokens)])}
    seconds = alternate({**updates, **products}, repeats=repeats)
    return {
        "columns": batch.input_ids_BT.shape[1],
        "padding_share": round(1 - batch.attention_mask_BT.float().mean().item(), 3),
        "seconds": seconds,
        "latent / plain": seconds["latent"] / seconds["plain"],
        "latent / ours, no thoughts": seconds["latent"] / seconds["ours, no thoughts"],
        "floor of that": 1 + (seconds[ALL_PASSES] - seconds[ONE_PASS]) / seconds["ours, no thoughts"],
    }


def products_of(model: PreTrainedModel, num_tokens: Sequence[int]) -> Callable[[], None]:
    """Make the step that does the products of the layers, so many tokens in each pass, and nothing else.

    Every pass reads all weights in the forward and in the backward direction. The products for the weights' own
    gradients are left out: an update does them once for all passes.
    """
    weights = weights_of_layers(model)
    sizes = {size for weight in weights for size in weight.shape}
    drawn = {(count, size): torch.ones(count, size, device=model.device) for count in set(num_tokens) for size in sizes}

    @torch.no_grad()
    def multiply() -> None:
        for count in num_tokens:
            for weight_IO in weights:
                linear(drawn[count, weight_IO.shape[0]], weight_IO.t())
        for count in reversed(num_tokens):
            for weight_IO in reversed(weights):
                linear(drawn[count, weight_IO.shape[1]], weight_IO)

    return multiply


def tokens_of_passes(batch: Batch) -> list[int]:
    """Count the tokens, without padding, that each pass of an update with thoughts reads."""
    ends = [0, *latent_columns(batch), batch.input_ids_BT.shape[1]]
    return [int(batch.attention_mask_BT[:, start:stop].sum()) for start, stop in pairwise(ends)]


def weights_of_layers(model: PreTrainedModel) -> list[Tensor]:
    """List the matrices of a GPT-2's layers, I x O."""
    return [module.weight for module in model.base_model.modules() if isinstance(module, Conv1D)]


def compare_ideas(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """Each idea alone, on top of a straightforward implementation, B = 8."""
    model = build_gpt2(device)
    batch = make_batch(8, device)
    updates = {name: Update(model, batch, with_thoughts, **switched_on) for name, switched_on in IDEAS.items()}
    updates = {"plain": Update(model, batch, plain), **updates}
    share_optimizer(updates)
    seconds = alternate(updates, repeats=max(3, repeats // 2))
    memory = {name: update_peak_mb(update) for name, update in updates.items()}
    return {"seconds": seconds, "peak_mb": memory}


def further_thoughts(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """What one more thought adds to an update of 32 rows, as a share of a plain update."""
    model = build_gpt2(device)
    batches = {count: make_batch(32, device, num_latents=count) for count in (2, 10)}
    updates = {f"latent {count}": Update(model, batch, with_thoughts) for count, batch in batches.items()}
    updates |= {f"plain {count}": Update(model, batch, plain) for count, batch in batches.items()}
    share_optimizer(updates)
    seconds = alternate(updates, repeats=repeats)
    base = seconds["plain 2"]
    return {
        "seconds": seconds,
        "per thought / plain": (seconds["latent 10"] - seconds["latent 2"]) / 8 / base,
        "plain's own cost of a column / plain": (seconds["plain 10"] - seconds["plain 2"]) / 8 / base,
    }


def memory(*, device: str, **_: Any) -> dict[str, Any]:
    """Peak above weights, gradients and Adam."""
    result = {}
    model = build_gpt2(device)
    for num_rows in (8, 32):
        updates = {name: Update(model, make_batch(num_rows, device), nll) for name, nll in KINDS.items()}
        updates["straightforward"] = Update(model, make_batch(num_rows, device), with_thoughts, **STRAIGHT)
        share_optimizer(updates)
        peaks = {name: update_peak_mb(update) for name, update in updates.items()}
        result[f"B={num_rows}"] = {"peak_mb": peaks, "latent / plain": peaks["latent"] / peaks["plain"]}
    return result


def bf16(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """Autocast to bf16 against float32, the same update."""
    model = build_gpt2(device)
    result: dict[str, Any] = {
        "operations_per_s": {
            str(dtype).removeprefix("torch."): matrix_rates(device, dtype)["ours"]
            for dtype in (torch.float32, torch.bfloat16)
        }
    }
    for num_rows in (8, 32):
        batch = make_batch(num_rows, device)
        updates = {
            f"{name}, {precision}": Update(model, batch, nll)
            for name, nll in (("plain", plain), ("latent", with_thoughts))
            for precision in ("fp32", "bf16")
        }
        for name, update in updates.items():
            update.is_bf16 = name.endswith("bf16")
        share_optimizer(updates)
        seconds = alternate(updates, repeats=repeats)
        result[f"B={num_rows}"] = {
            "seconds": seconds,
            "latent bf16 / fp32": seconds["latent, bf16"] / seconds["latent, fp32"],
            "latent / plain, bf16": seconds["latent, bf16"] / seconds["plain, bf16"],
        }
    return result


def checkpointing(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """Memory that `runtime.checkpoint_activations` saves, and the time that it costs."""
    model = build_gpt2(device)
    batch = make_batch(8, device)
    updates = {"kept": Update(model, batch, with_thoughts), "checkpointed": Update(model, batch, checkpointed)}
    share_optimizer(updates)
    seconds = alternate(updates, repeats=repeats)
    return {"seconds": seconds, "peak_mb": {name: update_peak_mb(update) for name, update in updates.items()}}


def large_vocabulary(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """Forward and backward of the loss at 151,936 entries: logits of all columns, of supervised ones, in chunks."""
    del repeats
    vocab_size = 151936
    model = build_gpt2(device, vocab_size=vocab_size, n_layer=2)
    result: dict[str, Any] = {}
    for num_rows in (4, 16, 64):
        batch = make_batch(num_rows, device)

        def all_columns(batch: Any = batch) -> None:
            model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT)[
                "loss"
            ].backward()

        def supervised(options: PassOptions, batch: Any = batch) -> None:
            nll, num_tokens = without_thoughts(model, batch, options)
            (nll / num_tokens).backward()

        kinds = {
            "all columns": all_columns,
            "supervised columns": lambda: supervised(PassOptions(max_logits=1 << 40)),
            "supervised columns, in chunks": lambda: supervised(PassOptions()),
        }
        steps = {}
        for name, kind in kinds.items():
            model.zero_grad()
            kind()
            steps[name] = peak_mb(kind)
        result[f"B={num_rows}"] = {
            "supervised": int((batch.labels_BT != -100).sum()),
            "columns": batch.num_columns,
            "peak_mb": steps,
            "seconds": alternate(kinds, repeats=3),
        }
    return {"vocab_size": vocab_size, **result}


def profile(*, device: str, results_dir: Path, **_: Any) -> dict[str, Any]:
    """The operations of one latent and one plain update, most expensive first."""
    model = build_gpt2(device)
    batch = make_batch(8, device)
    updates = {name: Update(model, batch, nll) for name, nll in (("plain", plain), ("latent", with_thoughts))}
    share_optimizer(updates)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    lines = []
    for name, update in updates.items():
        update()
        with torch.profiler.profile(activities=activities) as profiled:
            update()
        rows = sorted(profiled.key_averages(), key=lambda row: -_own_us(row, device))[:25]
        total = sum(_own_us(row, device) for row in profiled.key_averages())
        lines += [f"{name} update, B = 8: {total / 1e3:.0f} ms", f"{'ms':>9} {'share':>6} {'calls':>6}  operation"]
        lines += [
            f"{_own_us(row, device) / 1e3:9.1f} {_own_us(row, device) / total:6.1%} {row.count:6d}  {row.key}"
            for row in rows
        ]
        lines.append("")
    (results_dir / "profile.txt").write_text("\n".join(lines), encoding="utf-8")
    return {"file": "profile.txt"}


def _own_us(row: Any, device: str) -> float:
    return float(row.self_device_time_total if device == "cuda" else row.self_cpu_time_total)


def small_model(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """The embedded default: 64 wide, 3 layers, 64 rows, one thread."""
    config = AutoConfig.from_pretrained(Path(__file__).parents[1] / "models" / "tiny", vocab_size=32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = {}
    for num_latents, target in ((0, 11), (1, 9), (4, 3)):
        options = {"num_latents": num_latents, "question": (9, 9), "supervised": (target, target)}
        batch = make_batch(64, device, **options)
        batch = batch._replace(input_ids_BT=batch.input_ids_BT % 32, labels_BT=batch.labels_BT.clamp(max=31))
        updates = {name: Update(model, batch, nll) for name, nll in (("plain", plain), ("latent", with_thoughts))}
        updates["straightforward"] = Update(model, batch, with_thoughts, **STRAIGHT)
        share_optimizer(updates)
        result[f"{num_latents} thoughts"] = {"seconds": alternate(updates, repeats=8 * repeats, warm_up=5)}
    torch.set_num_threads(threads)
    return result
