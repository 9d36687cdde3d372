"""What the processes of a stage leave as JSON lines in `outputs/logs/<stage>.events.jsonl`.

An event is a log record that is bound to a name: `begun`, `resumed`, `ended`, `stopped` or `failed`. `coconut
overnight` and `coconut status` read them. An event that is lost, to a full disk say, costs a line of what they say.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from coconut.layout import LOG_DIR
from coconut.logs import rank
from coconut.pipeline.signals import AGENT, is_worker

if TYPE_CHECKING:
    from loguru import Message

_TAIL_BYTES = 64_000
"""Of a file, as much as is read: many times what one process writes."""
_LONGEST_MESSAGE = 4_000
_ENDS = ("ended", "stopped", "failed")


@dataclass(frozen=True)
class Run:
    """One process of a stage, by its events."""

    pid: int
    begun_at: float
    """Seconds of the epoch."""
    resumed_at: int | None = None
    """Update that a training was continued from."""
    end: str = ""
    """`ended`, `stopped` (it was asked to), `failed`; nothing while it runs, and of one that was killed."""
    message: str = ""
    """What it said last: why it failed."""
    can_pass: bool = False
    """Whether waiting may help: the disk is full, somebody else holds a lock."""


@contextmanager
def recording(stage: str) -> Iterator[None]:
    """Write the events of this process down; with several processes on one stage, those of the first one."""
    if rank() != 0:
        yield
        return
    path = events_path(stage)

    def write(message: "Message") -> None:
        record = message.record
        text = record["message"][:_LONGEST_MESSAGE]
        event = {"stage": stage, "pid": _pid_of_stage(), "time": time.time(), "message": text}
        # The first line break ends what a full disk cut off before.
        line = f"\n{json.dumps(event | record['extra'], default=str)}\n".encode()
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)

    sink = logger.add(write, level="DEBUG", filter=lambda record: "event" in record["extra"])
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # Whoever else sets up the logs may have removed it.
            logger.remove(sink)


def _pid_of_stage() -> int:
    """Return the number of the process that DVC started, which is another one where several share the stage."""
    return int(os.environ[AGENT]) if is_worker() else os.getpid()


def events_path(stage: str, root: Path = Path()) -> Path:
    """Return where the events of a stage are."""
    return root / LOG_DIR / f"{stage.replace('@', '-')}.events.jsonl"


def last_run(stage: str, root: Path) -> Run | None:
    """The process that began last; None if none did, as far as can be read."""
    run: Run | None = None
    for event in _read(events_path(stage, root)):
        if event["event"] == "begun":
            run = Run(event["pid"], event["time"])
        elif run is not None and event["pid"] == run.pid:
            run = _after(run, event)
    return run


def _after(run: Run, event: dict[str, Any]) -> Run:
    """Return what is known of a process after one more of its events."""
    if event["event"] in _ENDS:
        is_passing = event.get("can_pass") is True
        return Run(run.pid, run.begun_at, run.resumed_at, event["event"], event["message"], is_passing)
    update = event.get("update")
    return Run(run.pid, run.begun_at, update if isinstance(update, int) else None)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, without lines that are not whole."""
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if _is_sound(event):
                yield event


def _is_sound(event: Any) -> bool:
    return (
        isinstance(event, dict)
        and all(isinstance(event.get(key), str) for key in ("event", "message"))
        and isinstance(event.get("pid"), int)
        and 0 < event["pid"] < 2**31
        and isinstance(event.get("time"), (int, float))
        and 0 < event["time"] < 1e12
    )
