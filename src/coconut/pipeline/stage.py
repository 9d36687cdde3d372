"""How the process of a pipeline stage begins, before its slow imports: `inputs = begin()`.

Importing this module is cheap (no torch).
"""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from loguru import logger

from coconut.files import explain
from coconut.logs import log_sinks
from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.signals import Preempted, die_with_parent


def run_stage(main: Callable[..., None], name: str, /, *arguments: str, inputs: StageInputs | None = None) -> None:
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


def begin() -> StageInputs | None:
    """End with the `dvc` that started this process, and digest what the stage depends on as it is now.

    First of all: the imports that follow take seconds, in which `dvc` may be killed or a module edited.

    SIGTERM, by which the end of `dvc` is told, ends it in order: what it has started or half written, worker
    processes above all, must not stay. (`train` saves its state then; see `signals.stop_on_signals`.)

    Returns:
        None where `dvc.yaml` or what it names cannot be read, of which `main` says what is wrong, or where no
        stage has this command: a script that is run by hand in another way.
    """
    signal.signal(signal.SIGTERM, _end)
    die_with_parent()
    try:
        return StageInputs.of_command(["python", *sys.argv])
    except (ValueError, OSError):
        return None


def _end(number: int, _frame: FrameType | None) -> None:
    raise Preempted(128 + number)
