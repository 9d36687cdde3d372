"""`coconut plan`: which stages would run and why, their times on this machine, the hour of the end, memory and disk."""

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coconut.config.params import load_params
from coconut.config.schema import Params
from coconut.devices import free_memory
from coconut.files import amount
from coconut.layout import ENCODED_DIR, checkpoint_dir
from coconut.pipeline.dvc_file import read_pipeline
from coconut.pipeline.forecast import Times, hour, simulate, write_times
from coconut.pipeline.record import damage_of
from coconut.pipeline.repro import fitting_jobs
from coconut.pipeline.status import Row, clock, stage_rows
from coconut.report.tables import Table

if TYPE_CHECKING:
    from coconut.planning.trial import EntryTimes

_DVC_S = 0.9
"""What DVC takes around a stage: it hashes what the stage read and wrote, and writes its record."""
_OTHERS_S = {"report": 4.0, "encode": 3.0, "preprocess": 2.0}
"""Stages that take seconds on the embedded data, and of which nothing is known before they have run."""
_COPIES = 3
"""Weights and two moments, in the outputs of an entry and in a resume state of it."""


def run(root: Path, *, jobs: int | None = None, measures: bool = True) -> int:
    """Print the plan; 1 if what is planned does not fit into memory or onto the disk, else 0.

    Args:
        jobs: stages at once; None for as many as the machine has room for.
        measures: whether to measure; without, only what would run is said.

    Raises:
        ValueError: `dvc.yaml` or `params.yaml` holds a mistake, or an entry cannot be trained.
    """
    params = load_params(root / "params.yaml")
    rows = [row for row in stage_rows(root) if row.state != "done"]
    if not rows:
        _print("Everything is up to date: `dvc repro` would run nothing.")
        return 0
    if measures and not _is_ready(rows):
        _print("The data and the model are not there yet: after `dvc repro encode` the plan can measure. Until then:\n")
        measures = False
    jobs = jobs or fitting_jobs(root)
    times = _measure(params, rows) if measures else {}
    seconds = _seconds_by_stage(rows, times)
    table = Table(_HEADERS, [_line(row, params, times, seconds) for row in rows], num_text_columns=2)
    _print(table.to_text() + "\n")
    if damage := damage_of(root):
        _print(f"{damage}.\n")
    if not measures:
        return 0
    total = simulate(read_pipeline(root), seconds, jobs)
    write_times(Times(seconds, jobs, time.time()), root)
    at_once = f"{jobs} stages at once" if jobs > 1 else "one stage at a time"
    _print(f"About {clock(total)} with {at_once}: begun now, it ends at {hour(total)}.")
    return _check_room(root, rows, times, jobs)


_HEADERS = ("stage", "why", "rows", "updates", "ms/update", "time")


def _line(row: Row, params: Params, times: "Mapping[str, EntryTimes]", seconds: Mapping[str, float]) -> list[str]:
    kind, _, name = row.stage.partition("@")
    took = clock(seconds[row.stage]) if times else ""
    why = row.state if row.state == "failed" else row.detail or row.state
    if kind != "train" or name not in times:
        return [row.stage, _short(why), "", "", "", took]
    entry, found = params.curriculum[name], times[name]
    num_rows = f"{entry.train.batch_size * found.num_updates:,}"
    milliseconds = f"{1e3 * found.seconds_per_update:.1f}"
    return [row.stage, _short(why), num_rows, f"{found.num_updates:,}", milliseconds, took]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_ready(rows: Sequence[Row]) -> bool:
    """Say whether what the measurements need is there, and of the present parameters."""
    to_run = {row.stage for row in rows}
    return not to_run & {"preprocess", "base", "encode"} and ENCODED_DIR.is_dir() and checkpoint_dir("base").is_dir()


def _measure(params: Params, rows: Sequence[Row]) -> "dict[str, EntryTimes]":
    names = dict.fromkeys(row.stage.partition("@")[2] for row in rows if "@" in row.stage)
    entries = [params.curriculum[name] for name in names if name in params.curriculum]
    from coconut.planning.trial import measure  # Here, because importing torch takes seconds.

    return measure(params, entries, _say)


def _seconds_by_stage(rows: Sequence[Row], times: "Mapping[str, EntryTimes]") -> dict[str, float]:
    if not times:
        return dict.fromkeys((row.stage for row in rows), 0.0)
    starts = {kind: start_s(f"stages/{kind}.py") for kind in ("train", "evaluate", "probe")}
    typical = next(iter(times.values()))
    seconds = {}
    for row in rows:
        kind, _, name = row.stage.partition("@")
        kind = kind.removesuffix("_base")
        found = times.get(name, typical)
        work = {"train": found.training, "evaluate": found.evaluation, "probe": found.probing}.get(kind)
        work = _OTHERS_S.get(kind, 0.5) if work is None else work
        seconds[row.stage] = _DVC_S + starts.get(kind, 1.0) + work
    return seconds


def _check_room(root: Path, rows: Sequence[Row], times: "Mapping[str, EntryTimes]", jobs: int) -> int:
    """Say what the stages need of memory and disk, and whether it is there."""
    peak_mb = max(found.peak_mb for found in times.values()) * jobs
    memory_mb = free_memory_mb()
    _print(f"Memory: about {peak_mb / 1e3:.1f} GB at its peak, of {memory_mb / 1e3:.1f} GB that are free.")
    trained = [times[name] for row in rows for kind, _, name in [row.stage.partition("@")] if kind == "train"]
    # Outputs lie in the work tree and, copied or linked, in DVC's cache; a state stays until `coconut prune`, and
    # a training has two more, one of them while it is written.
    num_bytes = sum(3 * _COPIES * found.num_bytes for found in trained)
    num_bytes += jobs * 2 * _COPIES * max((found.num_bytes for found in trained), default=0)
    free = shutil.disk_usage(root).free
    _print(f"Disk: at most {amount(num_bytes)}, of {amount(free)} that are free.")
    problems = []
    if peak_mb > memory_mb:
        cure = "fewer --jobs, a lower runtime.micro_batch" if jobs > 1 else "a lower runtime.micro_batch"
        problems.append(f"the memory does not suffice: {cure}, runtime.checkpoint_activations, or end other programs")
    if num_bytes > free:
        problems.append("the disk does not suffice: `coconut prune`, `dvc gc -w`, or make room")
    for problem in problems:
        _print(f"WARNING: {problem}")
    return 1 if problems else 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def start_s(script: str) -> float:
    """Return what a stage's process takes until its work begins: the imports, for the most part."""
    start = time.monotonic()
    subprocess.run(
        [sys.executable, script, "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    )
    return time.monotonic() - start


def free_memory_mb() -> float:
    """Return the memory that is free for the stages; on a GPU, the GPU's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / 1e6
    return free_memory() / 1e6
