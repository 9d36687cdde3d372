"""What binds an accelerator where passes are thin: operations, counted on the pretend device, and the host's time.

The host's time is that of a model whose arithmetic takes next to none: GPT-2's layers, 96 wide, one row, one thread.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coconut.model.fast.thresholds import Thresholds
from coconut.model.passes import PassOptions
from workload import Update, alternate, build_gpt2, make_batch, plain, share_optimizer, with_thoughts, without_thoughts

ROOT = Path(__file__).parents[1]
_AS_ON_CUDA = PassOptions(thresholds=replace(Thresholds().on("cuda"), min_width=0, min_weight_elements=0))
_OF_THE_LIBRARY = PassOptions(fast=False)


def measure(*, device: str, repeats: int, **_: Any) -> dict[str, Any]:
    """Count operations of a thought and a token; time a thought and a plain update on the host."""
    del device
    return {"operations": _operations(), "host": _host(repeats)}


def _operations() -> Any:
    command = [sys.executable, "tests/pretend_cases.py", "launches"]
    paths = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | paths, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _host(repeats: int) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build_gpt2("cpu", vocab_size=50260, n_embd=96, n_head=12)
    two, ten = (make_batch(1, "cpu", num_latents=count, question=(8, 8), supervised=(2, 2)) for count in (2, 10))
    updates = {
        "ours, 2": Update(model, two, with_thoughts, options=_AS_ON_CUDA),
        "ours, 10": Update(model, ten, with_thoughts, options=_AS_ON_CUDA),
        "library, 2": Update(model, two, with_thoughts, options=_OF_THE_LIBRARY),
        "library, 10": Update(model, ten, with_thoughts, options=_OF_THE_LIBRARY),
        "ours, plain": Update(model, two, without_thoughts, options=_AS_ON_CUDA),
        "library, plain": Update(model, two, plain, options=_OF_THE_LIBRARY),
    }
    share_optimizer(updates)
    seconds = alternate(updates, repeats=5 * repeats, warm_up=3)
    torch.set_num_threads(threads)
    ours, theirs = ((seconds[f"{who}, 10"] - seconds[f"{who}, 2"]) / 8 for who in ("ours", "library"))
    return {
        "seconds": seconds,
        "per thought, ours / library": ours / theirs,
        "plain update, ours / library": seconds["ours, plain"] / seconds["library, plain"],
    }
