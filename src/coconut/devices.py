"""The machine: device, precision, threads, memory."""

import os
import resource
import sys
from typing import TYPE_CHECKING

from loguru import logger

from coconut.config.schema import RuntimeConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (of the GPU's, if one was used)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def num_workers(asked: int | None) -> int:
    """Processes to use: as asked, or one per core this process may run on."""
    if asked is not None:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def build_accelerator(config: RuntimeConfig, precision: str) -> "Accelerator":
    """The device, the autocast and the processes of this run.

    Raises:
        ValueError: if a GPU is asked for where there is none.
    """
    # Imported here: stages that need no torch do not wait for it.
    import torch
    from accelerate import Accelerator

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device: found cuda, but torch sees no GPU here; use auto or cpu")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if precision == "bf16-weights":
        logger.warning(
            "precision bf16-weights: weights in bf16 lose Adam's small updates (at |w| = 0.02 the spacing is 1.2e-4);"
            " bf16 keeps them in fp32 and is as fast"
        )
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if precision == "bf16" else "no")
    if not accelerator.is_main_process:
        logger.remove()  # One process speaks for all.
    elif accelerator.num_processes > 1:
        logger.info("{} processes on {}", accelerator.num_processes, accelerator.device.type)
    return accelerator
