"""The parts of `gpu_check.py`. Each takes a device and returns what JSON can hold.

`problems` in a result are what is wrong; `skipped` is why a part says nothing on this machine.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coconut.data.collator import collate
from coconut.data.views import View
from coconut.model.feedback import Feedback, build_feedback
from coconut.model.generation import generate
from coconut.model.latent import latent_nll
from coconut.model.passes import PassOptions
from coconut.recipes import whole_params
from coconut.training.objective import Objective
from workload import (
    Update,
    alternate,
    as_rows,
    default_method,
    make_views,
    peak_mb,
    plain,
    share_optimizer,
    synchronize,
    with_thoughts,
)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is used first.
ROOT = Path(__file__).parents[1]
Found = dict[str, Any]
_GPT2: Found = {"model_type": "gpt2", "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "vocab_size": 50260}
_QWEN: Found = {"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
                "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                "tie_word_embeddings": True}  # fmt: skip
_LLAMA: Found = {"model_type": "llama", "vocab_size": 50260, "hidden_size": 512, "intermediate_size": 1024,
                 "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
_SMALL: dict[str, Found] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 50260},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2},
}  # fmt: skip
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1}
"""Of a gradient, relative to the CPU's in float32."""


def build(config: Found, device: str, *, small: bool) -> PreTrainedModel:
    """Build a model with random weights, the same on every device."""
    fields = config | (_SMALL[config["model_type"]] if small else {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    return model.to(device).train()


@contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Compute in fp32, tf32 or bf16."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=name == "bf16"):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def gradient(model: PreTrainedModel, views: list[View], thought: str, options: PassOptions, name: str) -> Tensor:
    """Compute the gradient of the mean loss as one vector on the CPU."""
    device = str(model.device)
    model.zero_grad(set_to_none=True)
    feedback = build_feedback(thought, model)
    with precision(name, device):
        nll, num_tokens = latent_nll(model, feedback, collate(views, pad_id=0).to(device), options)
    (nll / num_tokens).backward()
    return torch.cat([p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None])


def agreement(device: str, *, small: bool) -> Found:
    """Compare gradients of updates with those of the CPU: families, forms of thought, ragged rows, both paths."""
    found: Found = {}
    problems = []
    views = [*make_views(5), *make_views(2, num_latents=2, seed=1), *make_views(1, num_latents=0, seed=2)]
    for config in (_GPT2, _LLAMA, _QWEN | _LLAMA | {"model_type": "qwen2"}):
        reference, model = (build(config, one, small=small) for one in ("cpu", device))
        for thought in ("hidden[-1]", "normalised", "input+suppressed[0.5:]"):
            wanted = gradient(reference, views, thought, PassOptions(fast=False), "fp32")
            for fast in (True, False):
                for kind in ("fp32", "bf16"):
                    got = gradient(model, views, thought, PassOptions(fast=fast), kind)
                    error = float((got - wanted).norm() / wanted.norm())
                    case = f"{config['model_type']}, {thought}, {'fast' if fast else 'plain'}, {kind}"
                    found[case] = error
                    if not error <= _TOLERANCE[kind]:
                        problems.append(f"{case}: {error:.1e}, wanted at most {_TOLERANCE[kind]:.0e}")
    return {"relative_error": found, "problems": problems}


def synchronisations(device: str, *, small: bool) -> Found:
    """Count how often an update and a generated token wait for the GPU."""
    if not device.startswith("cuda"):
        return {"skipped": "CUDA counts its synchronisations, other devices do not"}
    model = build(_GPT2, device, small=small)
    batch = collate(make_views(8), pad_id=0).to(device)
    prompts = collate([_prompt(view) for view in make_views(8)], pad_id=0).to(device)

    def update() -> None:
        nll, num_tokens = latent_nll(model, Feedback(), batch)
        (nll / num_tokens).backward()

    def decode(num_tokens: int) -> Callable[[], object]:
        return lambda: generate(model, Feedback(), prompts, eos_ids=[], max_new_tokens=num_tokens)

    few, many = (count_synchronisations(decode(count)) for count in (4, 12))
    return {"forward and backward": count_synchronisations(update), "a further token": (many - few) / 8}


def count_synchronisations(step: Callable[[], object]) -> int:
    """Count the warnings by which CUDA names an operation that waits for it."""
    step()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def times(device: str, *, small: bool) -> Found:
    """Measure seconds of an update: 0, 1 and 6 thoughts, three precisions, two sizes, ours and the library's layers."""
    found: Found = {}
    models = {"gpt2": _GPT2} if small else {"gpt2": _GPT2, "qwen2": _QWEN}
    for family, config in models.items():
        model = build(config, device, small=small)
        for num_rows in (8,) if small else (8, 32):
            for kind in ("fp32", "tf32", "bf16"):
                updates = {}
                for count in (0, 1, 6):
                    batch = collate(make_views(num_rows, num_latents=count), pad_id=0).to(device)
                    updates[f"{count} thoughts, ours"] = Update(model, batch, with_thoughts)
                    updates[f"{count} thoughts, library's layers"] = Update(
                        model, batch, with_thoughts, gelu=False, options=PassOptions(fast=False)
                    )
                    updates[f"{count} thoughts as tokens, library"] = Update(model, batch, plain, gelu=False)
                share_optimizer(updates)
                for update in updates.values():
                    update.is_bf16 = kind == "bf16"
                with precision("tf32" if kind == "tf32" else "fp32", device):
                    seconds = alternate(updates, repeats=1 if small else 5)
                found[f"{family}, {num_rows} rows, {kind}"] = seconds
        del model
    return {"seconds": found}


def profile(device: str, *, small: bool) -> Found:
    """Count the kernels of a plain update and of one with thoughts, and the share of the time that the device works."""
    model = build(_GPT2, device, small=small)
    found: Found = {}
    is_cuda = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if is_cuda else []
    for count in (0, 1, 6):
        batch = collate(make_views(8, num_latents=count), pad_id=0).to(device)
        updates = {"it": Update(model, batch, with_thoughts)}
        share_optimizer(updates)
        updates["it"]()
        synchronize()
        start = time.perf_counter()
        with torch.profiler.profile(activities=activities) as profiled:
            updates["it"]()
            synchronize()
        wall = time.perf_counter() - start
        events = profiled.key_averages()
        busy_us = sum(event.self_device_time_total if is_cuda else event.self_cpu_time_total for event in events)
        number = sum(event.count for event in events if not is_cuda or event.self_device_time_total > 0)
        found[f"{count} thoughts"] = {"operations": number, "busy_share": busy_us / 1e6 / wall, "seconds": wall}
    return found


def memory(device: str, *, small: bool) -> Found:
    """Measure the peak of an update, and run out of memory in earnest: the micro-batch must shrink."""
    model = build(_GPT2, device, small=small)
    found: Found = {}
    for name, nll in (("plain", plain), ("6 thoughts", with_thoughts)):
        updates = {name: Update(model, collate(make_views(8), pad_id=0).to(device), nll)}
        share_optimizer(updates)
        updates[name]()
        found[f"{name}: peak_mb"] = peak_mb(updates[name])
    if not device.startswith("cuda"):
        return found | {"out of memory": "only a GPU has a limit that can be set"}
    views = make_views(64)
    torch.cuda.empty_cache()
    one = collate(views[:8], pad_id=0).to(device)
    model.zero_grad(set_to_none=True)
    needed_mb = torch.cuda.memory_allocated() / 1e6 + peak_mb(lambda: latent_nll(model, Feedback(), one)[0].backward())
    total_mb = torch.cuda.get_device_properties(0).total_memory / 1e6
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.2 * needed_mb / total_mb))
    objective = Objective(model, Feedback(), Accelerator(), 0, micro_batch=64, method=default_method())
    cost = objective.accumulate(as_rows(views), dict(model.named_parameters()))
    problems = [] if objective.num_oom_retries else ["memory never ran out, though the limit was set for 8 rows of 64"]
    return found | {"retries": objective.num_oom_retries, "micro_batch": objective.micro_batch, "loss": cost.loss,
                    "problems": problems}  # fmt: skip


def resume(device: str, *, small: bool) -> Found:
    """Train twice, once with a save and a load in the middle: equal bytes are promised for deterministic algorithms."""
    found: Found = {"problems": []}
    for name, is_deterministic in (("fastest", False), ("deterministic", True)):
        torch.use_deterministic_algorithms(is_deterministic)
        undisturbed, resumed = (_trained(device, small=small, stops=stops) for stops in (False, True))
        torch.use_deterministic_algorithms(False)
        difference = float((undisturbed - resumed).abs().max())
        is_equal = torch.equal(undisturbed, resumed)
        found |= {f"{name}: largest difference": difference, f"{name}: equal bytes": is_equal}
        if difference > 1e-4 or (is_deterministic and not is_equal):
            found["problems"].append(f"{name}: weights differ by {difference:.1e} after a save and a load")
    return found


def _trained(device: str, *, small: bool, stops: bool) -> Tensor:
    """Return all weights after four updates; stopping, they and the moments leave the device and come back between."""
    model = build(_GPT2, device, small=small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for number in range(4):
        if stops and number == 2:
            weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
            moments = optimizer.state_dict()
            model = build(_GPT2, device, small=small)
            model.load_state_dict(weights)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            optimizer.load_state_dict(moments)
        gradient(model, make_views(4, seed=number), "hidden[-1]", PassOptions(), "fp32")
        optimizer.step()
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


def generation(device: str, *, small: bool) -> Found:
    """Measure tokens a second with 1 and 64 rows, in fp32 and bf16, and compare the ids with the CPU's."""
    model, reference = (build(_GPT2, one, small=small).eval() for one in (device, "cpu"))
    found: Found = {}
    for num_rows in (1, 8) if small else (1, 64):
        prompts = [_prompt(view) for view in make_views(num_rows)]
        batch = collate(prompts, pad_id=0).to(device)
        for kind in ("fp32", "bf16"):

            def decode(batch: Any = batch, kind: str = kind) -> list[Any]:
                with precision(kind, device):
                    return generate(model, Feedback(), batch, eos_ids=[], max_new_tokens=16)

            seconds = alternate({"it": decode}, repeats=1 if small else 5)["it"]
            found[f"{num_rows} rows, {kind}: tokens per second"] = num_rows * 16 / seconds
        wanted = generate(reference, Feedback(), collate(prompts[:4], pad_id=0), eos_ids=[], max_new_tokens=16)
        got = generate(model, Feedback(), batch, eos_ids=[], max_new_tokens=16)[:4]
        found[f"{num_rows} rows: equal texts of 4"] = sum(a.ids == b.ids for a, b in zip(got, wanted, strict=False))
    return found


def graph(device: str, *, small: bool) -> Found:
    """Time a layer stack over one column a row, launched one by one and as one captured graph."""
    if not device.startswith("cuda"):
        return {"skipped": "only CUDA captures graphs"}
    model = build(_GPT2, device, small=small).eval()
    embeds_B1D = torch.randn(32, 1, model.config.n_embd, device=device)

    @torch.no_grad()
    def thin_pass() -> Tensor:
        hidden: Tensor = model.base_model(inputs_embeds=embeds_B1D, use_cache=False).last_hidden_state
        return hidden

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            thin_pass()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        output = thin_pass()
    captured.replay()
    difference = float((output - thin_pass()).abs().max())
    seconds = alternate({"eager": thin_pass, "captured": captured.replay}, repeats=20)
    problems = [] if difference < 1e-3 else [f"the captured pass differs by {difference:.1e}"]
    return {"seconds": seconds, "captured / eager": seconds["captured"] / seconds["eager"], "problems": problems}


# --- the pipeline -----------------------------------------------------------------------------


def pipeline(device: str, *, small: bool) -> Found:
    """Run the recipe `ci` from the data to the page."""
    return _run_pipeline(device, small=small)


def processes(device: str, *, small: bool) -> Found:
    """Run the same in two processes (NCCL on GPUs)."""
    return _too_few(device) or _run_pipeline(device, small=small, processes=2)


def sharded(device: str, *, small: bool) -> Found:
    """Run the same with the weights in two parts, gathered once per update, and once per pass."""
    if skipped := _too_few(device):
        return skipped
    kinds = ("pass",) if small else ("update", "pass")
    return {kind: _run_pipeline(device, small=small, processes=2, sharding=kind) for kind in kinds}


def srun(device: str, *, small: bool) -> Found:
    """Run the same on every host of the allocation that this runs in."""
    if shutil.which("srun") is None or "SLURM_JOB_ID" not in os.environ:
        return {"skipped": "not within an allocation of Slurm"}
    return _run_pipeline(device, small=small, launcher="srun --ntasks-per-node=1")


def _too_few(device: str) -> Found | None:
    if device.startswith("cuda") and torch.cuda.device_count() < 2:
        return {"skipped": f"{torch.cuda.device_count()} GPU here; two are needed"}
    return None


def _run_pipeline(device: str, *, small: bool, **runtime: object) -> Found:
    """Run the pipeline in a copy of the repository; return its accuracies.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="coconut-gpu-") as folder:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if not name.startswith(("outputs/", "benchmarks/", "dvc.lock")) and (ROOT / name).is_file():
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        _write_params(Path(folder), device, small=small, runtime=runtime)
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        for command in (["git", "init", "-q"], ["dvc", "repro", "evaluate@latent_1"]):
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}: {' '.join((done.stdout + done.stderr).split())[-600:]}")
        import json

        outputs = Path(folder) / "outputs"
        found = {
            name: json.loads((outputs / name / "train.json").read_text(encoding="utf-8"))
            for name in ("cot", "latent_1")
        }
        metrics = json.loads((outputs / "latent_1/metrics.json").read_text(encoding="utf-8"))
    return {"train": found, "accuracy of latent_1": metrics["accuracy"]}


def _write_params(folder: Path, device: str, *, small: bool, runtime: dict[str, object]) -> None:
    tree = yaml.safe_load(whole_params("ci", ROOT))
    tree["runtime"] |= {"device": device.partition(":")[0], **runtime}
    if small:
        tree["data"]["train"]["rows"] = 64
        for entry in tree["curriculum"].values():
            entry["epochs"] = 1
            entry.pop("min_accuracy", None)
    (folder / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def _prompt(view: View) -> View:
    length = view.prefix_length + view.num_slots
    return View(view.input_ids[:length], view.labels[:length], view.prefix_length, view.num_slots, view.num_thoughts)


PARTS: dict[str, Callable[..., Found]] = {
    part.__name__: part
    for part in (
        *(agreement, synchronisations, times, profile, memory, resume, generation, graph),
        *(pipeline, processes, sharded, srun),
    )
}
