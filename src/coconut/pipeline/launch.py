"""One stage in several processes, on one host or on many.

    dvc -> stages/train.py = torch's elastic agent -> N x "python stages/train.py latent_1"
    dvc -> stages/train.py -> "srun ..." -> one agent per host -> N processes each

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
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from coconut.files import system_error
from coconut.pipeline.dvc_file import read_mapping
from coconut.pipeline.gpus import processes_of
from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.signals import AGENT, STOP_SIGNALS, die_with_parent
from coconut.pipeline.stage import LOST_PEER, run_stage

_ENDPOINT, _RUN_ID = "COCONUT_RENDEZVOUS", "COCONUT_RUN_ID"
_SHUTDOWN_S = 22
"""What the processes have between the signal and their end: less than the 25 s of `GRACE_S` and a machine's 30 s."""
_START_S = 300
"""How long hosts wait for each other at the start."""
_ASKED_TO_STOP = tuple(128 + number for number in STOP_SIGNALS)


def share_out(inputs: StageInputs | None) -> None:
    """Run this very command in as many processes as `runtime` asks for, and end with their exit code.

    Returns, having done nothing, in those processes, and where one process is asked for.

    Args:
        inputs: of the stage; None where its script is run by hand in another way, and by itself.
    """
    if inputs is None or "LOCAL_RANK" in os.environ:
        return
    try:
        runtime = read_mapping(Path("params.yaml")).get("runtime")
    except (ValueError, OSError):
        return  # The stage itself says what is wrong with the file.
    if not isinstance(runtime, dict):
        return
    launcher = runtime.get("launcher")
    if isinstance(launcher, str) and launcher not in ("", "none") and _ENDPOINT not in os.environ:
        _run_and_exit(partial(_run_through, launcher), inputs.stage)
    count = processes_of(runtime)
    if count > 1 or _ENDPOINT in os.environ:
        _run_and_exit(partial(_run_in_processes, count), inputs.stage)


def _run_and_exit(main: "partial[None]", name: str) -> None:
    run_stage(main, name)
    sys.exit(0)


# --- many hosts -----------------------------------------------------------------------------


def _run_through(launcher: str) -> None:
    """Run this command through the site's launcher, which starts it once on every host; wait for its end."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    host = socket.gethostname()
    inherited = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
    environment = inherited | {_ENDPOINT: f"{host}:{port}", _RUN_ID: f"{host}-{os.getpid()}"}
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
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[AGENT] = str(os.getpid())
    num_hosts = int(os.environ.get("SLURM_NNODES", "1")) if _ENDPOINT in os.environ else 1
    # `signals_to_handle` names all that end a stage; one that is ignored stays so (`nohup`).
    heeded = [number.name for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    with tempfile.TemporaryDirectory(prefix="coconut-") as folder:
        config = LaunchConfig(
            min_nodes=num_hosts,
            max_nodes=num_hosts,
            nproc_per_node=count,
            run_id=os.environ.get(_RUN_ID, "stage"),
            rdzv_backend="c10d",
            rdzv_endpoint=os.environ.get(_ENDPOINT, "localhost:0"),
            rdzv_configs={"timeout": _START_S},
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=_SHUTDOWN_S,
            signals_to_handle=",".join(heeded),
        )
        try:
            elastic_launch(config, sys.executable)(*sys.argv)
        except SignalException as stop:
            sys.exit(128 + stop.sigval)
        except ChildFailedError as failed:
            _explain(failed.failures)


def _explain(failures: Mapping[int, Any]) -> None:
    """Say why processes failed; what one of them began, others may only have followed.

    Raises:
        ValueError: naming the process that failed first.
        SystemExit: with its exit code, where all of them were asked to stop.
    """
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    # A process that lost another one is not the cause.
    causes = {rank: code for rank, code in codes.items() if code != LOST_PEER and code not in _ASKED_TO_STOP}
    if not causes and any(code in _ASKED_TO_STOP for code in codes.values()):
        sys.exit(max(code for code in codes.values() if code in _ASKED_TO_STOP))
    rank = min(causes or codes, key=lambda one: (failures[one].timestamp, one))
    failure = failures[rank]
    record = failure.error_file_data if isinstance(failure.error_file_data, dict) else {}
    if record.get("is_described"):
        message = f"process {rank}: {failure.message}"
        raise system_error(errno.EAGAIN, message) if record.get("can_pass") is True else ValueError(message)
    if failure.exitcode < 0:
        how = f"was ended by {failure.signal_name()}"
    elif failure.exitcode == LOST_PEER:
        how = "lost the connection to a process of another host"
    else:
        how = f"ended with exit code {failure.exitcode}; its own words stand above"
    raise ValueError(f"process {rank} of {len(codes)} {how}; `dvc repro` continues from the last saved state")
