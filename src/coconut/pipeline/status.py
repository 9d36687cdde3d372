"""`coconut status`: what runs, how far it is, what is done, what waits, and what failed.

Reads only files that others write (`dvc.yaml`, `dvc.lock`, `.resume`, the stages' events) and takes none of DVC's
locks, so that it works while `dvc repro` runs.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from coconut.config.strict import parse_yaml
from coconut.pipeline.dvc_file import Stage, as_mapping, canonical, lookup, read_mapping, read_pipeline, unroll
from coconut.pipeline.dvc_lock import paths_being_written
from coconut.pipeline.events import Run, last_run
from coconut.pipeline.processes import is_alive, is_suspended
from coconut.pipeline.progress import Progress, folders_in_use, progress_of, read_progress
from coconut.pipeline.record import (
    Record,
    damage_of,
    describe_damage,
    is_as_recorded,
    md5_as_dvc,
    md5_of,
    parse_records,
    read_records,
)


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
    records, damage = _of_stages(read_records(root), stages), damage_of(root)
    written = paths_being_written(root)
    in_use = folders_in_use(root)
    rows: dict[str, Row] = {}
    for stage in _parents_first(stages):
        if {(root / out).resolve() for out in stage.outs} & written.keys():
            rows[stage.name] = _judge_running(stage.name, in_use.pop(stage.name, None), root)
        else:
            missing = [name for name in sorted(parents_of(stage, stages)) if rows[name].state != "done"]
            rows[stage.name] = _judge(stage.name, missing, _changes_here(stage, records, damage, root), root)
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
    progress = progress_of(name, root)
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
    # As text: there are hundreds of thousands of pairs, and pathlib takes seconds for them.
    out, dep = (f"{path.rstrip('/')}/" for path in (out, dep))
    return out.startswith(dep) or dep.startswith(out)


def _parents_first(stages: Mapping[str, Stage]) -> Iterable[Stage]:
    left = dict(stages)
    while left:
        ready = [name for name in left if not parents_of(left[name], left)]
        if not ready:
            raise ValueError(f"dvc.yaml: a cycle among {', '.join(left)}; one must depend on none of the others")
        for name in ready:
            yield left[name]
        left = {name: stage for name, stage in left.items() if name not in ready}


def judge_revision(read_bytes: Callable[[str], bytes | None]) -> dict[str, str]:
    """Say by stage why what a revision holds of it is not of the revision's own params; empty where all of it is.

    Its `dvc.lock` is held against its params, against itself, and against the figures that git keeps. Which code and
    which raw data there were is not asked: an edited comment needs no run.

    Raises:
        ValueError: its `dvc.yaml`, or its `params.yaml`, is missing or holds a mistake.
    """
    texts = {name: read_bytes(name) for name in ("dvc.yaml", "params.yaml")}
    pipeline, params = (as_mapping(parse_yaml(text or b"", name), name) for name, text in texts.items())
    stages = unroll(pipeline, params)
    lock = read_bytes("dvc.lock")
    records, damage = _of_stages(parse_records(lock or b""), stages), "" if lock is None else describe_damage(lock)
    reasons: dict[str, str] = {}
    for stage in _parents_first(stages):
        record = records.get(stage.name) or Record("")
        asked = replace(stage, cmd=record.cmd, deps=tuple(dep for dep in stage.deps if dep in record.deps))
        own = _changes(asked, records, params, record.deps.get)
        own += [
            f"{out} is not what its run left"
            for out in stage.in_git
            if out in record.outs and (content := read_bytes(out)) is not None and md5_of(content) != record.outs[out]
        ]
        inherited = [reasons[name] for name in sorted(parents_of(stage, stages)) if name in reasons]
        if reason := (own and damage) or ", ".join(own) or next(iter(inherited), ""):
            reasons[stage.name] = reason
    return reasons


def _of_stages(records: Mapping[str, Record | None], stages: Mapping[str, Stage]) -> dict[str, Record | None]:
    """Leave out the records of stages that are no longer there, whose outputs others may have by now."""
    return {name: record for name, record in records.items() if name in stages}


def _changes_here(stage: Stage, records: Mapping[str, Record | None], damage: str, root: Path) -> list[str]:
    """Return what differs in the work tree from the record of the stage's last run, outputs included.

    Args:
        damage: of `dvc.lock`, if any: what it lacks, or seems to say otherwise, is not known then.
    """
    params = read_mapping(root / "params.yaml")
    changes = _changes(stage, records, params, lambda dep: md5_as_dvc(root / dep))
    # In a fresh clone, whose dvc.lock is that of another run, nothing has gone.
    lacks = "is not here yet" if last_run(stage.name, root) is None else "is gone"
    record = records.get(stage.name)
    for out in stage.outs:
        if record is not None and not (root / out).exists():
            changes.append(f"{out} {lacks}")
        elif record is not None and not is_as_recorded(root / out, record, out):
            changes.append(f"{out} is not what its run left")
    is_damaged = stage.name in records and record is None
    return [damage] if damage and changes and not is_damaged else changes


def _changes(
    stage: Stage,
    records: Mapping[str, Record | None],
    params: Mapping[str, Any],
    md5_of_dep: Callable[[str], str | None],
) -> list[str]:
    """Return what differs from the record of the stage's last run in `dvc.lock`, outputs aside."""
    if stage.name not in records:
        return ["never ran"]
    record = records[stage.name]
    if record is None:
        return ["its record in dvc.lock is damaged"]
    changes = [] if record.cmd == stage.cmd else ["cmd changed"]
    for key in stage.params:
        if key not in record.params or canonical(lookup(params, key)) != canonical(record.params[key]):
            changes.append(f"{key} changed")
    produced = {path: md5 for other in records.values() if other for path, md5 in other.outs.items()}
    for dep in stage.deps:
        now = produced[dep] if dep in produced else md5_of_dep(dep)
        if dep not in record.deps or record.deps[dep] != now:
            changes.append(f"{dep} changed")
    return changes


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
