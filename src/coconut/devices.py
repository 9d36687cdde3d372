"""The machine: device, precision, threads, memory."""

import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]
from loguru import logger

from coconut.config.messages import first_line
from coconut.config.schema import RuntimeConfig
from coconut.ranks import PATIENCE, Ranks, host_group

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import dtype

_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
"""By any of which an x86 processor multiplies in bf16, as torch names them."""
_KEPT = {-3: 32 << 20, -1: 64 << 20}
"""Of glibc's `M_MMAP_THRESHOLD` and `M_TRIM_THRESHOLD`, in bytes: the most that it would take by itself, in time."""
_USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (of the GPU's, if one was used)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


class Stopwatch:
    """Wall and CPU seconds since it was made, on top of those of earlier sessions.

    CPU time far below what the threads could have used in the wall time means that the process waited: the
    machine was busy with something else, or the disk was.
    """

    def __init__(self, *, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._start = time.monotonic() - seconds
        self._cpu_start = time.process_time() - cpu_seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def cpu_seconds(self) -> float:
        """Return the CPU time of this process, all its threads together."""
        return time.process_time() - self._cpu_start


def machine_load() -> float:
    """The load average of the last minute per core; above 1, processes wait for a core."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether smaller batches may help: torch's own error for it, or the text of a driver or a library."""
    import torch

    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "Cannot allocate memory")
    is_ours = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return is_ours or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def explain_failure(error: BaseException) -> str:
    """Say in one line what an error within the model means, with a cure."""
    reason = first_line(error)
    if is_out_of_memory(error):
        return (
            f"out of memory with one row at a time ({reason}); take a smaller model, shorter examples,"
            " runtime.checkpoint_activations: true or precision bf16, or free memory, and run `dvc repro` again"
        )
    return (
        f"{type(error).__name__}: {reason}; the traceback stands in outputs/logs. If the rows are as you mean them, the"
        " model cannot be used this way: try runtime.device: cpu, or another model"
    )


def num_workers(asked: int | None) -> int:
    """Processes to use: as asked, or one per core this process may run on."""
    return usable_cores() if asked is None else asked


def usable_cores(system: Path = Path("/")) -> int:
    """Return how many cores this process may use, by its affinity and by the limits of its container.

    Args:
        system: the folder that holds `proc` and `sys`.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    for group in _control_groups("cpu", system):
        quota, period = [*_numbers(group / "cpu.max"), 0.0, 0.0][:2]
        if not quota:
            quota, period = (next(_numbers(group / f"cpu.cfs_{name}_us"), 0.0) for name in ("quota", "period"))
        if quota > 0 and period > 0:
            num_cores = min(num_cores, max(1, int(quota / period)))
    return num_cores


def free_memory(system: Path = Path("/")) -> int:
    """Return the bytes of memory that are free for this process, on the machine and within its container."""
    free = int(psutil.virtual_memory().available)
    for group in _control_groups("memory", system):
        limit = _first(group, "memory.max", "memory.limit_in_bytes")
        used = _first(group, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free = min(free, max(0, int(limit - used + _file_cache(group))))
    return free


def total_memory(system: Path = Path("/")) -> int:
    """Return the bytes of memory of the machine, or of what its container may use of them."""
    limits = (_first(group, "memory.max", "memory.limit_in_bytes") for group in _control_groups("memory", system))
    return int(min([psutil.virtual_memory().total, *(limit for limit in limits if limit is not None)]))


def _control_groups(controller: str, system: Path) -> list[Path]:
    """List the folders of the control groups that this process is in, of both versions, and of those above them."""
    folders = []
    try:
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []  # Not Linux.
    mount = system / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        tops = [mount / controllers, mount / controller] if controllers else [mount, mount / "unified"]
        inner = Path(path.lstrip("/"))
        # A container may see its own group as the top one, whatever the path says.
        folders += [top / part for top in tops for part in (inner, *inner.parents)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _numbers(path: Path) -> Iterator[float]:
    """Yield the numbers that a file begins with; none where there is no such file, or it says `max`."""
    with suppress(OSError, ValueError):
        yield from [float(word) for word in path.read_text(encoding="utf-8").split()]


def _first(group: Path, *names: str) -> float | None:
    return next((number for name in names for number in _numbers(group / name)), None)


def _file_cache(group: Path) -> int:
    """Return the bytes of a group that hold files, which the kernel gives up when memory is short."""
    with suppress(OSError, ValueError):
        words = (group / "memory.stat").read_text(encoding="utf-8").split()
        facts = dict(zip(words[::2], words[1::2], strict=False))
        return int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))
    return 0


def check_device(config: RuntimeConfig) -> None:
    """Raise a ValueError if a GPU is asked for where there is none."""
    if config.device != "cuda":
        return
    import torch  # Here, because importing it takes seconds.

    if not torch.cuda.is_available():
        raise ValueError("runtime.device: found cuda, but torch sees no GPU here; use auto or cpu")


def evaluation_precision(config: RuntimeConfig, precision: str) -> str:
    """Return the precision to evaluate in: float32 in place of bf16 on an x86 processor without instructions for it.

    Such a processor converts every number, and takes longer than in float32. Training is in what was asked for.
    """
    import torch

    found = torch.cpu.get_capabilities()
    is_slow = found.get("architecture") == "x86_64" and not any(found.get(name) for name in _BF16_INSTRUCTIONS)
    if precision != "bf16" or not is_slow or (config.device != "cpu" and torch.cuda.is_available()):
        return precision
    logger.warning("evaluate.precision: fp32 is taken, as this processor computes bf16 more slowly")
    return "fp32"


def build_accelerator(config: RuntimeConfig, precision: str) -> "Accelerator":
    """The device, the autocast and the processes of this run.

    Raises:
        ValueError: if a GPU is asked for where there is none.
    """
    # Imported here: stages that need no torch do not wait for it.
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    check_device(config)
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if precision == "bf16-weights":
        logger.warning(
            "precision bf16-weights: weights in bf16 lose Adam's small updates (at |w| = 0.02 the spacing is 1.2e-4);"
            " bf16 keeps them in fp32 and is as fast"
        )
    # Off unless it is asked for, so that fp32 means the same on every GPU.
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    _compute_deterministically(config.deterministic)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.num_processes > 1:
        host_group()
    # After the library, which sets the threads of a CPU's processes by itself.
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif accelerator.num_processes > 1:
        torch.set_num_threads(max(1, num_workers(None) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if on_cpu and torch.get_num_threads() == 1:
        _keep_freed_memory()
    if accelerator.is_main_process and accelerator.num_processes > 1:
        logger.info("{} processes on {}", accelerator.num_processes, accelerator.device.type)
    return accelerator


def _compute_deterministically(is_asked: bool) -> None:
    """Let torch take only algorithms whose sums have a fixed order; it raises where there is none."""
    import torch

    if is_asked:  # cuBLAS reads it when it is used first.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_asked)


def _keep_freed_memory() -> None:
    """Have glibc keep memory that is freed for what comes next, instead of returning it to the kernel; 64 MB at most.

    The kernel clears every page that it gives out again, and a single thread waits for it: for a twentieth of the
    default's updates. Several threads wait for each other longer than for that, and gain nothing.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return
    with suppress(OSError, AttributeError):  # Another C library.
        mallopt = ctypes.CDLL(None).mallopt
        for option, num_bytes in _KEPT.items():
            mallopt(option, num_bytes)


def is_shared() -> bool:
    """Say whether this process is one of several that share a stage."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def ranks_of(accelerator: "Accelerator") -> Ranks:
    """Return the processes of this run, as this one sees them."""
    return Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)


def compute_dtype_of(accelerator: "Accelerator") -> "dtype | None":
    """Return the precision that autocast multiplies in; None where weights are multiplied as they are."""
    import torch

    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
