"""How the process of a pipeline stage begins, before its slow imports: `inputs = begin()`.

Importing this module is cheap (no torch).
"""

import signal
import sys
from types import FrameType

from coconut.training.fingerprint import StageInputs
from coconut.training.guard import Preempted, die_with_parent


def begin() -> StageInputs | None:
    """End with the `dvc` that started this process, and digest what the stage depends on as it is now.

    First of all: the imports that follow take seconds, in which `dvc` may be killed or a module edited.

    SIGTERM, by which the end of `dvc` is told, ends it in order: what it has started or half written, worker
    processes above all, must not stay. (`train` saves its state then; see `guard.stop_on_signals`.)

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
