"""Memory of each of several processes with whole and with sharded weights: `python benchmarks/sharding.py`.

A model of 111 million weights (0.44 GB in float32) in 16 layers; two updates on four short rows, so that activations
count little. What is measured is the largest anonymous memory (RssAnon) above that after the imports, which leaves out
mapped files.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES = [("none", 1), ("none", 2), ("update", 2), ("update", 4), ("pass", 2), ("pass", 4)]
THOUGHTS = (0, 2)
_CONFIG = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048,
           "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 4,
           "tie_word_embeddings": True}  # fmt: skip


def anonymous_mb() -> float:
    """Return the memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Looks at the memory every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.largest = anonymous_mb()

    def run(self) -> None:
        while True:
            self.largest = max(self.largest, anonymous_mb())
            time.sleep(0.003)


def work(folder: Path, kind: str, num_thoughts: int, precision: str) -> None:
    """Train two updates as one of the processes; the first one prints the peaks of all."""
    import torch

    from coconut.checkpoints.weights import load_model
    from coconut.config.params import load_params
    from coconut.devices import build_accelerator, compute_dtype_of, ranks_of
    from coconut.model.feedback import Feedback
    from coconut.model.passes import PassOptions
    from coconut.training.learner import Learner
    from coconut.training.objective import Objective
    from coconut.training.sharding import load_sharded
    from workload import as_rows, default_method, make_views

    params = load_params(HERE.parent / "params.yaml")
    accelerator = build_accelerator(params.runtime, precision)
    ranks = ranks_of(accelerator)
    peak = Peak()
    peak.start()
    shards = None
    if kind == "none":
        model = load_model(folder)
    else:
        shards = load_sharded(
            folder,
            lambda _model: Feedback(),
            ranks,
            kind,  # type: ignore[arg-type]
            torch.float32,
            compute_dtype_of(accelerator),
        )
        model = shards.model
    learner = Learner(model, Feedback(), params.train)
    objective = Objective(
        model,
        Feedback(),
        accelerator,
        0,
        micro_batch=1,
        method=default_method(),
        options=PassOptions(fast=False),
        ranks=ranks,
        shards=shards,
    )
    views = make_views(4, num_latents=num_thoughts, question=(4, 8), supervised=(2, 4))
    for view in views:
        view.input_ids[:] = [index % 4096 for index in view.input_ids]
        view.labels[:] = [label if label < 0 else label % 4096 for label in view.labels]
    rows = as_rows(views)
    for _ in range(2):
        objective.accumulate(rows, learner.parameters)
        learner.clip_gradients()
        learner.step(1e-5)
    peaks = ranks.gather(peak.largest - peak.before)
    if ranks.is_main:
        print(json.dumps(peaks))


def measure(folder: Path, kind: str, count: int, num_thoughts: int, precision: str) -> list[float]:
    """Start the processes; return their peaks in MB."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    # Memory that is given back goes back to the system at once.
    shared |= {"MASTER_PORT": str(port), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", str(folder), "--kind", kind, "--thoughts", str(num_thoughts),
             "--precision", precision],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    shown = [process.communicate()[0] for process in processes]
    peaks: list[float] = json.loads(shown[0].splitlines()[-1])
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="none", help=argparse.SUPPRESS)
    parser.add_argument("--thoughts", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.kind, arguments.thoughts, arguments.precision)
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**_CONFIG))
        weights_mb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
        model.save_pretrained(folder)
        del model
        cases = [*product(("fp32",), THOUGHTS, CASES), *product(("bf16",), THOUGHTS[1:], CASES)]
        for precision, num_thoughts, (kind, count) in cases:
            peaks = measure(Path(folder), kind, count, num_thoughts, precision)
            case = f"{precision}, {num_thoughts} thoughts, sharding {kind}, {count} processes"
            found[case] = {"peak_mb": peaks, "in weights": [peak / weights_mb for peak in peaks]}
            print(f"{case}: {', '.join(f'{peak / weights_mb:.2f}' for peak in peaks)} x weights", flush=True)
    result = {"weights_mb": weights_mb, "cases": found}
    (HERE / "results/cpu/sharding.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
