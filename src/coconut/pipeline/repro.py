"""`coconut repro`: `dvc repro`, with the branches of the pipeline side by side where the machine has room for it.

First it repairs what a killed `dvc` left, and at every stage it keeps a copy of `dvc.lock`, as the night does.
"""

import json
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

from coconut.devices import free_memory, usable_cores
from coconut.layout import OUTPUTS_DIR
from coconut.pipeline.branches import Branches
from coconut.pipeline.dvc_file import read_mapping
from coconut.pipeline.dvc_lock import repair
from coconut.pipeline.gpus import gpus_by_stage, processes_of
from coconut.pipeline.record import keep_copy_or_say, refuse_merge
from coconut.pipeline.signals import GRACE_S, STOP_SIGNALS, unblock

_STAGE_BYTES = 1_200_000_000
"""What a stage with a small model takes, torch included; more where an earlier run took more."""
_SLACK = 1.3


def run(root: Path, targets: Sequence[str] = (), *, jobs: int | None = None, keeps_going: bool = False) -> int:
    """Bring the pipeline up to date.

    Args:
        root: the repository's top folder.
        targets: pipeline stages, with all they need; all if empty.
        jobs: stages at once; None for as many as the machine has room for. One is the plain `dvc repro`.
        keeps_going: whether stages that do not depend on a failed one still run.

    Returns:
        The exit code of `dvc`, or 128 + the signal that ended it.

    Raises:
        ValueError: `dvc.yaml`, `dvc.lock` or `params.yaml` holds a mistake, or a target is no stage.
        OSError: what a killed dvc left cannot be repaired.
    """
    jobs = jobs or fitting_jobs(root)
    keep = partial(keep_copy_or_say, root, _print)
    branches = Branches(root, jobs, _print, targets, keeps_going=keeps_going, gpus=gpus_of(root), on_stage=keep)
    for sentence in repair(root):
        _print(sentence)
    refuse_merge(root)
    keep()

    def stop(number: int, _frame: FrameType | None) -> None:
        is_urgent = number == signal.SIGALRM or (branches.stopped_by is not None and number == signal.SIGINT)
        signal.alarm(GRACE_S + 2)  # The stages' own alarm comes first.
        branches.send(signal.SIGKILL if is_urgent else signal.SIGTERM, signal.Signals(number))

    for number in (*STOP_SIGNALS, signal.SIGALRM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    unblock()
    exit_code = branches.run()
    keep()
    for name, outcome in branches.log.outcomes.items():
        if outcome.result in ("failed", "stopped"):
            _print(f"{name}: {outcome.result}: {outcome.reason}")
    return 128 + branches.stopped_by if branches.stopped_by else exit_code


def fitting_jobs(root: Path) -> int:
    """Return how many stages the machine has room for at once, by its GPUs, cores and free memory."""
    if gpus := gpus_of(root):
        return len(gpus)
    runtime = runtime_of(root)
    threads = runtime.get("threads")
    if not isinstance(threads, int) or threads < 1:
        return 1  # One stage takes all cores.
    room = int(free_memory() / (_SLACK * max(_STAGE_BYTES, _largest_peak(root))))
    num_processes = processes_of(runtime)
    return max(1, min(usable_cores() // (threads * num_processes), room // num_processes))


def gpus_of(root: Path) -> list[str]:
    """Return the GPUs of each of the stages that run side by side; see `gpus_by_stage`."""
    return gpus_by_stage(runtime_of(root))


def runtime_of(root: Path) -> dict[str, object]:
    """Read the section `runtime` of `params.yaml`; empty if it is none."""
    runtime = read_mapping(root / "params.yaml").get("runtime")
    return runtime if isinstance(runtime, dict) else {}


def _largest_peak(root: Path) -> float:
    """Return the most memory that a stage of an earlier run took, in bytes."""
    peaks = [0.0]
    for path in (root / OUTPUTS_DIR).glob("*/costs.json"):
        with suppress(OSError, ValueError, TypeError, AttributeError):
            peaks.append(1e6 * float(json.loads(path.read_bytes()).get("peak_memory_mb") or 0))
    return max(peaks)


def _print(line: str) -> None:
    # The terminal was closed: the training is worth more than its report.
    with suppress(OSError):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
