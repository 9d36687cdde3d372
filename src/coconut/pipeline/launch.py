"""One stage in several processes, on one host or on many.

    dvc -> stages/train.py = torch's elastic agent -> N x "python stages/train.py latent_1"
    dvc -> stages/train.py -> "srun ..." or "coconut submit ..." -> one agent per host -> N processes each

The process that DVC starts becomes the agent: it starts the others with the same command, tells them of signals,
ends them together, and says which of them failed and why. So `cmd` in `dvc.yaml` stays what it is, and with one
process nothing of this happens.

Importing this module is cheap (no torch).
"""

import errno
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from loguru import logger

from coconut.files import replace_file, system_error
from coconut.pipeline.dvc_file import read_mapping
from coconut.pipeline.gpus import processes_of
from coconut.pipeline.resume import resume_dir
from coconut.pipeline.signals import AGENT, BATCH_TOO_LARGE, LOST_RANK, STOP_SIGNALS, die_with_parent

RUN_ID = "COCONUT_RUN_ID"
"""The environment's name for a run on several hosts; where it is set, this process is one of its hosts."""
_SHUTDOWN_S = 22
"""What the processes have between the signal and their end: less than the 25 s of `GRACE_S` and a machine's 30 s."""
_START_S = 300
"""How long hosts wait for each other at the start."""
_ASKED_TO_STOP = tuple(128 + number for number in STOP_SIGNALS)


def share_out() -> Callable[[], None] | None:
    """Return what runs this very command in as many processes as `runtime` asks for, in place of the stage's own work.

    None in those processes, and where one process is asked for.
    """
    runtime = _runtime()
    if "LOCAL_RANK" in os.environ or runtime is None:
        return None
    launcher = runtime.get("launcher")
    if isinstance(launcher, str) and launcher not in ("", "none") and RUN_ID not in os.environ:
        return partial(_run_through, launcher)
    count = processes_of(runtime)
    return partial(_run_in_processes, count) if count > 1 or RUN_ID in os.environ else None


def _runtime() -> dict[str, Any] | None:
    """Read the section `runtime`; None where there is none. The stage itself says what is wrong with the file."""
    with suppress(ValueError, OSError):
        runtime = read_mapping(Path("params.yaml")).get("runtime")
        return runtime if isinstance(runtime, dict) else None
    return None


# --- many hosts -----------------------------------------------------------------------------


def _run_through(launcher: str) -> None:
    """Run this command through the site's launcher, which starts it once on every host; wait for its end."""
    run_id = f"{socket.gethostname()}-{os.getpid()}-{time.time():.0f}"
    # On another host the parent is not dvc.
    environment = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"} | {RUN_ID: run_id}
    command = [*shlex.split(launcher), sys.executable, *sys.argv]
    try:
        process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
    except OSError as error:
        raise ValueError(
            f"runtime.launcher: {command[0]} cannot be started ({error.strerror}), wanted a program such as"
            " `srun --ntasks-per-node=1`; none runs the stage on this host"
        ) from error
    stopped_by: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        stopped_by.append(number)
        process.send_signal(signal.SIGTERM)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    exit_code = process.wait()
    for path in _endpoint_file(run_id).parent.glob(f"{run_id}-*"):
        path.unlink(missing_ok=True)
    if stopped_by:
        sys.exit(128 + stopped_by[0])
    if exit_code in _ASKED_TO_STOP:
        sys.exit(exit_code)
    if exit_code != 0:
        raise ValueError(
            f"`{launcher}` ended with exit code {exit_code}; what failed is said above by the host on which it did"
        )


# --- one host -------------------------------------------------------------------------------


def _run_in_processes(count: int) -> None:
    """Run this command in so many processes on this host, together with those of the other hosts if there are any.

    Raises:
        ValueError: saying which process failed, and why.
        SystemExit: if they were asked to stop.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it says of a failure, in its words, stands in ours below. (Importing torch sets the levels anew.)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    os.environ[AGENT] = str(os.getpid())
    is_one_of_many = RUN_ID in os.environ
    num_hosts, host = (
        int(os.environ.get(name, "0")) if is_one_of_many else 0 for name in ("SLURM_NNODES", "SLURM_NODEID")
    )
    # `signals_to_handle` names all that end a stage; one that is ignored stays so (`nohup`).
    heeded = [number.name for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    with tempfile.TemporaryDirectory(prefix="coconut-") as folder:
        config = LaunchConfig(
            min_nodes=max(1, num_hosts),
            max_nodes=max(1, num_hosts),
            nproc_per_node=count,
            run_id=_run_id() if is_one_of_many else "stage",
            rdzv_backend="c10d",
            rdzv_endpoint=_find_endpoint(host) if is_one_of_many else "localhost:0",
            rdzv_configs={"timeout": _START_S, "is_host": host == 0},
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=_SHUTDOWN_S,
            signals_to_handle=",".join(heeded),
        )
        try:
            while True:
                try:
                    elastic_launch(config, sys.executable)(*sys.argv)
                    return
                except ChildFailedError as failed:
                    # Other hosts would have to begin again too: there the next `dvc repro` does it.
                    if is_one_of_many or not _can_begin_again(failed.failures):
                        _explain(failed.failures)
        except SignalException as stop:
            sys.exit(128 + stop.sigval)


def _find_endpoint(host: int) -> str:
    """Agree on where the hosts meet, through a file: the first of them chooses.

    Raises:
        OSError: the file of the first host does not come, as where the hosts do not share the folder.
    """
    path = _endpoint_file(_run_id())
    if host == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            endpoint = f"{socket.gethostname()}:{probe.getsockname()[1]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, endpoint)
        return endpoint
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with suppress(OSError):
            return path.read_text(encoding="utf-8")
        time.sleep(0.1)
    raise OSError(
        f"{path}: not there after {_START_S} s, wanted the address that the first host writes; all hosts must share"
        " the repository's folder"
    )


def _run_id() -> str:
    """Return the name of this run on several hosts; a job that was requeued is another run."""
    return f"{os.environ[RUN_ID]}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _endpoint_file(run_id: str) -> Path:
    return resume_dir() / "hosts" / run_id


def _can_begin_again(failures: Mapping[int, Any]) -> bool:
    """Say, here and in the log, whether processes failed only since one of them had too little memory for its rows."""
    causes = _causes(failures)
    if set(causes.values()) != {BATCH_TOO_LARGE}:
        return False
    rank = min(causes)
    logger.warning("process {}: {}, from the last saved state on", rank, failures[rank].message)
    return True


def _causes(failures: Mapping[int, Any]) -> dict[int, int]:
    """Return the exit codes by rank, without those of processes that another one took along."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    return {rank: code for rank, code in codes.items() if code != LOST_RANK and code not in _ASKED_TO_STOP}


def _explain(failures: Mapping[int, Any]) -> None:
    """Say why processes failed; what one of them began, others may only have followed.

    Raises:
        ValueError: naming the process that failed first.
        SystemExit: with its exit code, where all of them were asked to stop.
    """
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    causes = _causes(failures)
    if not causes and any(code in _ASKED_TO_STOP for code in codes.values()):
        sys.exit(max(code for code in codes.values() if code in _ASKED_TO_STOP))
    rank = min(causes or codes, key=lambda one: (failures[one].timestamp, one))
    failure = failures[rank]
    record = failure.error_file_data if isinstance(failure.error_file_data, dict) else {}
    if record.get("is_described"):
        message = f"process {rank}: {failure.message}"
        if failure.exitcode == BATCH_TOO_LARGE:
            message += "; `dvc repro` continues from the last saved state"
        raise system_error(errno.EAGAIN, message) if record.get("can_pass") is True else ValueError(message)
    if failure.exitcode < 0:
        how = f"was ended by {failure.signal_name()}"
    elif failure.exitcode == LOST_RANK:
        how = "lost the connection to a process of another host"
    else:
        how = f"ended with exit code {failure.exitcode}; its own words stand above"
    raise ValueError(f"process {rank} of {len(codes)} {how}; `dvc repro` continues from the last saved state")
