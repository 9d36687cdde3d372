"""The machine around a pipeline stage: log sinks, devices, threads, and how a stage fails."""

import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from coconut.config import RuntimeConfig
from coconut.layout import LOG_DIR

if TYPE_CHECKING:
    from accelerate import Accelerator

    from coconut.training.fingerprint import StageInputs

_LINE = "{time:HH:mm:ss} | {level: <7} | {message}"
_DATED_LINE = "{time:YYYY-MM-DD HH:mm:ss} | {level: <7} | {message}"

_CURES = {
    number: cure
    for numbers, cure in (
        ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room on its disk and run `dvc repro` again"),
        ((errno.EACCES, errno.EPERM, errno.EROFS), "mend the permissions and run `dvc repro` again"),
        (
            (errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
            "move away what stands there, or in place of a folder above it",
        ),
        ((errno.ENOENT,), "`dvc repro` makes what the pipeline itself has to make"),
        ((errno.ENAMETOOLONG,), "take a shorter name"),
    )
    for number in numbers
}
"""What to do about an error of the system, by its number."""


def run_stage(main: Callable[..., None], name: str, /, *arguments: str, inputs: "StageInputs | None" = None) -> None:
    """Run a pipeline stage's `main` as a process: set up the logs, and end with an exit code.

    Where the stage has digested its `inputs`, it fails if they changed while it ran: DVC would record
    the new ones for the old result.

    A user's mistake (`ValueError`, `OSError`) becomes one message and exit code 1; its traceback
    goes to the log file only. Anything else is a defect of ours and keeps its traceback.
    """
    with log_sinks(name):
        try:
            main(*arguments)
            if inputs is not None:
                inputs.refuse_if_changed()
        except (ValueError, OSError) as error:
            logger.opt(exception=True).debug("{} failed", name)
            logger.error("{}: {}", name, explain(error))
            sys.exit(1)


def explain(error: Exception) -> str:
    """Say what an error means to a user; the system's own ones, which name a path at best, get a cure.

    >>> explain(FileExistsError(17, "File exists", "outputs/report"))
    'outputs/report: File exists; move away what stands there, or in place of a folder above it'
    >>> explain(ValueError("a sentence of ours"))
    'a sentence of ours'
    """
    if not isinstance(error, OSError) or error.errno not in _CURES:
        return str(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}; {_CURES[error.errno]}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in an error of the system that names none, as that of a disk which fills up while it is written.

    Raises:
        OSError: what was raised within, with its place.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def log_sinks(name: str) -> Iterator[None]:
    """Log to the terminal, beside any progress bar, and to `outputs/logs/<name>.log`."""
    # Imported here: tqdm is needed by processes that show progress, and they all log.
    from tqdm import tqdm

    logger.remove()
    logger.add(lambda line: tqdm.write(line, file=sys.stderr, end=""), format=_LINE, level="INFO", colorize=False)
    try:
        LOG_DIR.mkdir(parents=True, exist_ok=True)
        log_path = LOG_DIR / f"{name.replace('@', '-')}.log"
        # diagnose=False: values of variables may hold data, and do not belong into a log.
        logger.add(log_path, format=_DATED_LINE, level="DEBUG", diagnose=False)
    except OSError as error:
        logger.warning("{}: no log file: {}", LOG_DIR, error)
    yield
    logger.complete()


def shows_progress() -> bool:
    """Whether somebody watches: a terminal gets a bar, anything else one log line per interval."""
    return sys.stderr.isatty()


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
