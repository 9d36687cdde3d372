"""When the pipeline will be done, by the times that `coconut plan` has measured on this machine."""

import heapq
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from coconut.files import replace_file
from coconut.layout import LOG_DIR
from coconut.pipeline.dvc_file import Stage, read_pipeline
from coconut.pipeline.events import last_run
from coconut.pipeline.progress import newest_progress, progress_of
from coconut.pipeline.schedule import Schedule
from coconut.pipeline.status import Row, clock, render, stage_rows

_FILE = LOG_DIR / "plan.json"


@dataclass(frozen=True)
class Times:
    """What `coconut plan` found: seconds by stage, and how many stages were to run at once."""

    seconds: Mapping[str, float]
    jobs: int
    measured_at: float
    """Seconds of the epoch."""


def run_status(root: Path) -> int:
    """Print the table of stages and, where the times are known, when all of them will be done; 0.

    Raises:
        ValueError: `dvc.yaml` or `params.yaml` holds a mistake.
    """
    rows = stage_rows(root)
    sys.stdout.write(render(rows))
    times = read_times(root)
    if times is not None and any(row.state == "running" for row in rows):
        left = seconds_left(rows, times, root)
        measured = datetime.fromtimestamp(times.measured_at)
        sys.stdout.write(
            f"\nabout {clock(left)} left, until {hour(left)}, by `coconut plan` of {measured:%Y-%m-%d %H:%M}\n"
        )
    return 0


def seconds_left(rows: Iterable[Row], times: Times, root: Path) -> float:
    """Estimate the time until every stage is done; what is not known of a stage takes none."""
    left = {row.stage: row.state for row in rows if row.state not in ("done", "failed")}
    stages = read_pipeline(root)
    seconds = {name: times.seconds.get(name, 0.0) for name in left if name in stages}
    for name, state in left.items():
        if state in ("running", "suspended", "interrupted") and name in seconds:
            seconds[name] = _rest_of(name, seconds[name], root, is_running=state == "running")
    return simulate(stages, seconds, times.jobs)


def _rest_of(name: str, seconds: float, root: Path, *, is_running: bool) -> float:
    progress, run = (newest_progress if is_running else progress_of)(name, root), last_run(name, root)
    if is_running and run is not None and progress is not None and progress.time < run.begun_at:
        progress = None  # Of an earlier run.
    if progress is None:
        return max(0.0, seconds - (time.time() - run.begun_at)) if is_running and run is not None else seconds
    return seconds * (1 - progress.update / max(1, progress.num_updates))


def simulate(stages: Mapping[str, Stage], seconds: Mapping[str, float], jobs: int) -> float:
    """Return how long stages take together, where those that do not wait for each other run side by side.

    Args:
        stages: all of the pipeline.
        seconds: of each stage that is to run.
        jobs: stages at once.
    """
    schedule = Schedule(stages, seconds)
    now, running, number = 0.0, list[tuple[float, int, list[str]]](), 0
    while True:
        while len(running) < jobs and (bundle := schedule.next_bundle(jobs)):
            number += 1  # Stages that end together end in the order in which their processes started.
            heapq.heappush(running, (now + seconds[bundle[0]], number, bundle))
        if not running:
            return now
        now, place, (done, *rest) = heapq.heappop(running)
        schedule.finish([done])
        if rest:
            heapq.heappush(running, (now + seconds[rest[0]], place, rest))


def write_times(times: Times, root: Path) -> None:
    """Keep the times for `coconut status`.

    Raises:
        OSError: the file cannot be written.
    """
    (root / LOG_DIR).mkdir(parents=True, exist_ok=True)
    replace_file(root / _FILE, json.dumps(asdict(times), indent=2) + "\n")


def read_times(root: Path) -> Times | None:
    """Return the times that `coconut plan` found last; None if there are none, or they are damaged."""
    try:
        tree = json.loads((root / _FILE).read_bytes())
        seconds = {str(name): float(value) for name, value in tree["seconds"].items()}
        times = Times(seconds, int(tree["jobs"]), float(tree["measured_at"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    is_sound = times.jobs > 0 and 0 < times.measured_at < 1e12 and all(0 <= one < 1e9 for one in seconds.values())
    return times if is_sound else None


def hour(seconds_from_now: float) -> str:
    """Write the hour that is so far from now; with its day, if that is another one.

    >>> len(hour(0))
    5
    """
    now = datetime.now()
    then = now + timedelta(seconds=seconds_from_now)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%H:%M on %A, %Y-%m-%d}"
