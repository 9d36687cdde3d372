"""The GPUs that stages of this machine may use, found without torch."""

import os
from collections.abc import Mapping
from pathlib import Path


def list_gpus(runtime: Mapping[str, object]) -> list[str]:
    """Name the GPUs that stages may use: those that the environment names, or those that the driver lists.

    Args:
        runtime: the section `runtime` of `params.yaml`.
    """
    if runtime.get("device") == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    listed = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(listed.iterdir())] if listed.is_dir() else []


def processes_of(runtime: Mapping[str, object]) -> int:
    """Return in how many processes a stage runs on one host: `runtime.processes`, where `auto` is one per GPU."""
    asked = runtime.get("processes", "auto")
    if isinstance(asked, int) and asked > 0:
        return asked
    return max(1, len(list_gpus(runtime)))


def gpus_by_stage(runtime: Mapping[str, object]) -> list[str]:
    """Return what `CUDA_VISIBLE_DEVICES` is for each of the stages that run side by side; empty without a GPU.

    A stage takes one GPU, or as many as `runtime.processes` says.
    """
    gpus = list_gpus(runtime)
    size = processes_of(runtime) if runtime.get("processes", "auto") != "auto" else 1
    return [",".join(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]
