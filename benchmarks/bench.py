"""Time and memory of updates and of decoding, against plain training: `make bench`.

    python benchmarks/bench.py --device cpu                    # everything, some twenty minutes on two cores
    python benchmarks/bench.py --only updates,generation       # parts of it
    python benchmarks/bench.py --device cuda                   # the same on a GPU

Each part writes `results/<device>/<part>.json` (and figures); `results.md` shows all parts that are there.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU arithmetic")
    parser.add_argument("--repeats", type=int, default=5, help="turns that a median is taken over")
    parser.add_argument("--only", default="", help="parts, by commas; all if empty")
    parser.add_argument("--list", action="store_true", help="name the parts and end")
    return parser.parse_args()


def machine(device: str) -> dict[str, Any]:
    """Where it ran, and how busy that machine was."""
    import torch
    import transformers

    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu.rpartition(":")[2].strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": os.getloadavg()[0],
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []


def main() -> None:
    arguments = parse_arguments()
    # Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    import torch

    import data_path
    import decoding
    import growth
    import launches
    import pipeline
    import tables
    import updates

    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "updates": updates.compare,
        "ideas": updates.compare_ideas,
        "thoughts": updates.further_thoughts,
        "memory": updates.memory,
        "bf16": updates.bf16,
        "checkpointing": updates.checkpointing,
        "vocabulary": updates.large_vocabulary,
        "profile": updates.profile,
        "small": updates.small_model,
        "launches": launches.measure,
        "generation": decoding.compare,
        "growth_thoughts": growth.over_thoughts,
        "growth_batch": growth.over_batch,
        "growth_columns": growth.over_columns,
        "data_path": data_path.measure,
        "pipeline": pipeline.measure,
    }
    if arguments.list:
        print("\n".join(parts))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here; use --device cpu")
    torch.set_num_threads(arguments.threads)
    chosen = arguments.only.split(",") if arguments.only else list(parts)
    unknown = sorted(set(chosen) - parts.keys())
    if unknown:
        sys.exit(f"--only: found {', '.join(unknown)}, wanted some of {', '.join(parts)}")
    results_dir = HERE / "results" / arguments.device
    results_dir.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        started, before = time.perf_counter(), machine(arguments.device)
        result = parts[name](device=arguments.device, repeats=arguments.repeats, results_dir=results_dir)
        result |= {"took_s": round(time.perf_counter() - started, 1), "machine": before}
        result["load_after"] = os.getloadavg()[0]
        (results_dir / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {result['took_s']:.0f} s, load {before['load']:.1f} before, {result['load_after']:.1f} after")
        tables.write(HERE / "results")
    print((HERE / "results" / "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
