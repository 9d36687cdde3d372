"""The frame of a pipeline stage's process: what comes before its slow imports, these, and then its work.

Importing this module is cheap (no torch).
"""

import argparse
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

from loguru import logger

from coconut.files import can_pass
from coconut.logs import log_sinks
from coconut.pipeline.events import recording
from coconut.pipeline.failures import describe
from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.signals import (
    BATCH_TOO_LARGE,
    GRACE_S,
    LOST_RANK,
    STOP_SIGNALS,
    Preempted,
    die_with_parent,
    end_forks_at_once,
    end_in_any_case,
    is_worker,
)
from coconut.ranks import BatchTooLargeError, is_lost_rank

Work = Callable[..., None]
"""What a stage does."""
_CAUSE_S = 2.0
"""What a process that was left alone waits, so that the one that failed is found first."""


def run_script(
    load: Callable[[], Work], kind: str, *, of_entry: bool = False, is_shared: bool = False, guards_itself: bool = False
) -> None:
    """Run a script of `stages/`: read the stage's inputs, import what it needs, and do its work.

    Args:
        load: imports what the stage needs, and returns its work. In a function, so that nothing slow is imported
            before `begin`; in the script, where `stage_code` finds it.
        kind: the stage's name in `dvc.yaml`, without the entry's.
        of_entry: whether the command names an entry; the work takes it, and the inputs (None if they were not read).
        is_shared: whether several processes may share the stage; see `launch`.
        guards_itself: whether the work itself refuses inputs that changed meanwhile, before it writes.
    """
    gc.disable()  # A quarter of the imports' time would go into looking for garbage where there is none.
    inputs = begin()
    if is_shared and inputs is not None:
        from coconut.pipeline.launch import share_out

        if (agent := share_out()) is not None:
            gc.enable()
            run_stage(agent, inputs.stage)
            return
    name, work = kind, load()
    gc.freeze()  # What was imported stays, and need not be looked at again.
    gc.enable()
    if of_entry:
        name, entry = _read_entry(kind)
        work = partial(work, entry, inputs)
    run_stage(work, name, inputs=None if guards_itself else inputs)


def _read_entry(kind: str) -> tuple[str, str]:
    """Return the stage's name and its entry, which the command names."""
    from coconut.config.schema import BASE

    parser = argparse.ArgumentParser()
    parser.add_argument("entry", help="a key of `curriculum` in params.yaml; for evaluate and probe, or base")
    entry = parser.parse_args().entry
    return f"{kind}_base" if entry == BASE else f"{kind}@{entry}", entry


def run_stage(main: Callable[[], None], name: str, *, inputs: StageInputs | None = None) -> None:
    """Run a pipeline stage's `main` as a process: set up the logs and the events, and end with an exit code.

    Where the stage has digested its `inputs`, it fails if they changed while it ran: DVC would record
    the new ones for the old result.

    What a user can cure (`ValueError`, `OSError`, no memory, a model or a GPU that fails) becomes one message and
    exit code 1; its traceback goes to the log file only. Anything else is a defect of ours and keeps its traceback.
    """
    if is_worker():
        _run_worker(main, name, inputs)
        return
    with log_sinks(name), recording(name):
        logger.bind(event="begun").debug("{} begun", name)
        try:
            _run(main, inputs)
        except Exception as error:
            message = describe(error)
            failed = logger.bind(event="failed", can_pass=can_pass(error))
            if message is None:
                failed.debug("{}: {}: {}", name, type(error).__name__, error)
                raise
            logger.opt(exception=True).debug("{} failed", name)
            failed.error("{}: {}", name, message)
            sys.exit(1)
        except BaseException as end:
            logger.bind(event="stopped").debug("{} stopped: {!r}", name, end)
            raise
        logger.bind(event="ended").debug("{} ended", name)


def _run(main: Callable[[], None], inputs: StageInputs | None) -> None:
    if inputs is not None:
        inputs.refuse_newer_code()
    main()
    if inputs is not None:
        inputs.refuse_if_changed()


def _run_worker(main: Callable[[], None], name: str, inputs: StageInputs | None) -> None:
    """Run one of the several processes of a stage: how it ends is told to the process that started it."""
    with log_sinks(name), recording(name):
        try:
            _run(main, inputs)
        except BatchTooLargeError as error:
            logger.opt(exception=True).debug("{}: {}", name, error)
            _leave_record(str(error), can_pass=True)
            sys.exit(BATCH_TOO_LARGE)
        except Exception as error:
            logger.opt(exception=True).debug("{} failed", name)
            if is_lost_rank(error):
                time.sleep(_CAUSE_S)
                sys.exit(LOST_RANK)
            message = describe(error)
            _leave_record(message or f"{type(error).__name__}: {error}", can_pass=can_pass(error))
            if message is None:
                raise
            sys.exit(1)
        finally:
            # It ends as it is. The agent, or the kernel after the agent's end, may tell it so once more.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def _leave_record(message: str, *, can_pass: bool) -> None:
    """Leave the reason of a failure where torch's elastic agent looks for it."""
    record = {"message": message, "timestamp": int(time.time()), "is_described": True, "can_pass": can_pass}
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(path).write_text(json.dumps(record), encoding="utf-8")


def begin() -> StageInputs | None:
    """End with the `dvc` that started this process, and read what the stage depends on as it is now.

    First of all: the imports that follow take seconds, in which `dvc` may be killed or a module edited.

    SIGTERM, by which the end of `dvc` is told, ends it in order: what it has started or half written, worker
    processes above all, must not stay. After `GRACE_S` seconds the kernel ends it in any case. (`train` saves its
    state then; see `signals.stop_on_signals`.)

    Returns:
        None where `dvc.yaml` or what it names cannot be read, of which `main` says what is wrong, or where no
        stage has this command: a script that is run by hand in another way.
    """
    signal.signal(signal.SIGTERM, _end)
    end_forks_at_once()
    die_with_parent()
    if is_worker():
        end_in_any_case()
    try:
        return StageInputs.of_command(["python", *sys.argv])
    except (ValueError, OSError):
        return None


def _end(number: int, _frame: FrameType | None) -> None:
    # Python swallows what is raised while it collects an object, and what hangs in a library hears of nothing.
    signal.alarm(GRACE_S)
    raise Preempted(128 + number)
