"""`coconut status`: what runs, how far it is, what is done, what waits, and what failed.

Reads only files that others write (`dvc.yaml`, `dvc.lock`, `.resume`, the stages' events) and takes none of DVC's
locks, so that it works while `dvc repro` runs.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from coconut.pipeline.dvc_file import Stage, canonical, lookup, read_mapping, read_pipeline
from coconut.pipeline.dvc_lock import paths_being_written
from coconut.pipeline.events import Run, last_run
from coconut.pipeline.processes import is_alive, is_suspended
from coconut.pipeline.progress import Progress, folders_in_use, newest_progress, read_progress
from coconut.pipeline.record import Record, md5_as_dvc, read_records


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    state: str
    """done, running, suspended, failed, interrupted, to do or waiting."""
    detail: str = ""


def stage_rows(root: Path) -> list[Row]:
    """Judge every stage of `dvc.yaml`, in its order; then name what is trained outside of the work tree."""
    stages = read_pipeline(root)
    records = read_records(root)
    written = paths_being_written(root)
    in_use = folders_in_use(root)
    rows: dict[str, Row] = {}
    for stage in _parents_first(stages):
        if {(root / out).resolve() for out in stage.outs} & written.keys():
            rows[stage.name] = _judge_running(stage.name, in_use.pop(stage.name, None), root)
        else:
            missing = [name for name in sorted(parents_of(stage, stages)) if rows[name].state != "done"]
            rows[stage.name] = _judge(stage.name, missing, _changes(stage, records, stages, root), root)
    # `dvc exp run --temp` and the queue work elsewhere, but keep their states here.
    elsewhere = [Row(name, "running", f"experiment: {_describe_trainer(folder)}") for name, folder in in_use.items()]
    return [rows[name] for name in stages] + elsewhere


def _judge_running(name: str, folder: Path | None, root: Path) -> Row:
    run = last_run(name, root)
    if run is not None and not run.end and is_alive(run.pid, wrote_at=run.begun_at) and is_suspended(run.pid):
        return Row(name, "suspended", f"pid {run.pid} was stopped by a signal; `kill -CONT {run.pid}` lets it go on")
    return Row(name, "running", "" if folder is None else _describe_trainer(folder))


def _judge(name: str, missing: list[str], changes: list[str], root: Path) -> Row:
    if not missing and not changes:
        return Row(name, "done")
    run = last_run(name, root)
    if run is not None and run.end == "failed":
        return Row(name, "failed", run.message)
    if missing:
        return Row(name, "waiting", f"for {', '.join(missing)}")
    progress = newest_progress(name, root)
    if progress is not None and progress.update < progress.num_updates:
        return Row(name, "interrupted", _describe(progress))
    if _was_killed(run):
        return Row(name, "interrupted", "ended before it was done")
    return Row(name, "to do", ", ".join(changes))


def _was_killed(run: Run | None) -> bool:
    return run is not None and not run.end and not is_alive(run.pid, wrote_at=run.begun_at)


def parents_of(stage: Stage, stages: Mapping[str, Stage]) -> set[str]:
    """Name the stages whose outputs a stage reads."""
    return {
        other.name for other in stages.values() for out in other.outs for dep in stage.deps if _overlap(out, dep)
    } - {stage.name}


def with_ancestors(targets: Sequence[str], stages: Mapping[str, Stage]) -> set[str]:
    """Return the targets and all that they need.

    Raises:
        ValueError: a target is no stage.
    """
    wanted: set[str] = set()
    for target in targets:
        names = [name for name in stages if name == target or name.partition("@")[0] == target]
        if not names:
            raise ValueError(f"{target}: no stage of dvc.yaml; there are {', '.join(stages)}")
        wanted |= set(names)
    while more := {name for one in wanted for name in parents_of(stages[one], stages)} - wanted:
        wanted |= more
    return wanted


def _overlap(out: str, dep: str) -> bool:
    return Path(out).is_relative_to(dep) or Path(dep).is_relative_to(out)


def _parents_first(stages: Mapping[str, Stage]) -> Iterable[Stage]:
    left = dict(stages)
    while left:
        ready = [name for name in left if not parents_of(left[name], left)]
        if not ready:
            raise ValueError(f"dvc.yaml: a cycle among {', '.join(left)}; one must depend on none of the others")
        for name in ready:
            yield left[name]
        left = {name: stage for name, stage in left.items() if name not in ready}


def _changes(stage: Stage, records: Mapping[str, Record | None], stages: Mapping[str, Stage], root: Path) -> list[str]:
    """Return what differs from the record of the stage's last run in `dvc.lock`."""
    if stage.name not in records:
        return ["never ran"]
    record = records[stage.name]
    if record is None:
        return ["its record in dvc.lock is damaged"]
    changes = [] if record.cmd == stage.cmd else ["cmd changed"]
    params = read_mapping(root / "params.yaml")
    for key in stage.params:
        if key not in record.params or canonical(lookup(params, key)) != canonical(record.params[key]):
            changes.append(f"{key} changed")
    produced = {path: md5 for name in stages if (other := records.get(name)) for path, md5 in other.outs.items()}
    for dep in stage.deps:
        now = produced[dep] if dep in produced else md5_as_dvc(root / dep)
        if dep not in record.deps or record.deps[dep] != now:
            changes.append(f"{dep} changed")
    # In a fresh clone, whose dvc.lock is that of another run, nothing has gone.
    lacks = "is not here yet" if last_run(stage.name, root) is None else "is gone"
    return changes + [f"{out} {lacks}" for out in stage.outs if not (root / out).exists()]


def _describe_trainer(folder: Path) -> str:
    progress = read_progress(folder)
    # The folder may still hold what an earlier run wrote.
    if progress is None or not is_alive(progress.pid, wrote_at=progress.time):
        return "starting"
    suspended = "suspended by a signal, " if is_suspended(progress.pid) else ""
    return suspended + _describe(progress)


def _describe(progress: Progress) -> str:
    update, num_updates = progress.update, progress.num_updates
    parts = [f"update {update} of {num_updates} ({update / max(1, num_updates):.0%})", f"loss {progress.loss:.4f}"]
    if progress.eta_s is not None and is_alive(progress.pid, wrote_at=progress.time):
        parts.append(f"{clock(progress.eta_s)} left")
    if progress.resumed_from is not None:
        parts.append(f"resumed at update {progress.resumed_from}")
    return ", ".join([*parts, f"{clock(time.time() - progress.time)} ago"])


def clock(seconds: float) -> str:
    """Write a time as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def render(rows: list[Row]) -> str:
    """Lay the rows out as text, a summary line first."""
    counts = {state: sum(row.state == state for row in rows) for state in dict.fromkeys(row.state for row in rows)}
    width = max(len(row.stage) for row in rows)
    lines = [", ".join(f"{count} {state}" for state, count in counts.items()), ""]
    lines += [f"{row.stage:<{width}}  {row.state:<11}  {row.detail}".rstrip() for row in rows]
    return "\n".join(lines) + "\n"
