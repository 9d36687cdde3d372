"""`make status`: what runs, how far it is, what is done, what waits, and what failed.

Reads only files that others write (`dvc.yaml`, `dvc.lock`, `.resume`, logs) and takes none of DVC's
locks, so that it works beside a running `dvc repro`.
"""

import argparse
import fcntl
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from coconut.layout import LOG_DIR
from coconut.pipeline.dvc_file import Stage, canonical, lookup, read_pipeline
from coconut.pipeline.dvc_lock import paths_being_written
from coconut.pipeline.resume import resume_dir

_COUNTS = ("update", "num_updates", "resumed_from", "pid")
_AMOUNTS = ("loss", "eta_s", "time")
_OPTIONAL = ("resumed_from", "eta_s")
"""What `ResumeStore.write_progress` writes, in the units of that."""

_LOG_LINE = re.compile(r"[-0-9: ]+ \| (\w+) +\| (.*)")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    state: str
    """done, running, failed, interrupted, to do or waiting."""
    detail: str = ""


def stage_rows(root: Path) -> list[Row]:
    """Judge every stage of `dvc.yaml`, in its order; then name what is trained outside of the work tree."""
    stages = read_pipeline(root)
    records = _read_records(root)
    written = paths_being_written(root)
    in_use = _folders_in_use(root)
    rows: dict[str, Row] = {}
    for stage in _parents_first(stages):
        if {(root / out).resolve() for out in stage.outs} & written:
            rows[stage.name] = Row(stage.name, "running", _describe_run(in_use.pop(stage.name, None)))
        else:
            missing = [name for name in sorted(_parents(stage, stages)) if rows[name].state != "done"]
            rows[stage.name] = _judge(stage.name, missing, _changes(stage, records, stages, root), root)
    # `dvc exp run --temp` and the queue work elsewhere, but keep their states here.
    elsewhere = [Row(name, "running", f"experiment: {_describe_run(path)}") for name, path in in_use.items()]
    return [rows[name] for name in stages] + elsewhere


def _judge(name: str, missing: list[str], changes: list[str], root: Path) -> Row:
    if not missing and not changes:
        return Row(name, "done")
    if error := _last_error(name, root):
        return Row(name, "failed", error)
    if missing:
        return Row(name, "waiting", f"for {', '.join(missing)}")
    progress = _newest_progress(name, root)
    if progress and progress["update"] < progress["num_updates"]:
        return Row(name, "interrupted", _describe(progress))
    return Row(name, "to do", ", ".join(changes))


def _parents(stage: Stage, stages: Mapping[str, Stage]) -> set[str]:
    return {
        other.name for other in stages.values() for out in other.outs for dep in stage.deps if _overlap(out, dep)
    } - {stage.name}


def _overlap(out: str, dep: str) -> bool:
    return Path(out).is_relative_to(dep) or Path(dep).is_relative_to(out)


def _parents_first(stages: Mapping[str, Stage]) -> Iterable[Stage]:
    left = dict(stages)
    while left:
        ready = [name for name in left if not _parents(left[name], left)]
        if not ready:
            raise ValueError(f"dvc.yaml: a cycle among {', '.join(left)}; one must depend on none of the others")
        for name in ready:
            yield left[name]
        left = {name: stage for name, stage in left.items() if name not in ready}


def _changes(stage: Stage, records: Mapping[str, Any], stages: Mapping[str, Stage], root: Path) -> list[str]:
    """What differs from the record of the stage's last run in `dvc.lock`."""
    record = records.get(stage.name)
    if record is None:
        return ["never ran"]
    if not record:
        return ["its record in dvc.lock is damaged"]
    changes = [] if record.get("cmd") == stage.cmd else ["cmd changed"]
    params = _read_mapping(root / "params.yaml", yaml.safe_load)
    recorded_params = record["params"]
    for key in stage.params:
        if key not in recorded_params or canonical(lookup(params, key)) != canonical(recorded_params[key]):
            changes.append(f"{key} changed")
    recorded = record["deps"]
    produced = {path: md5 for other in stages for path, md5 in records.get(other, {}).get("outs", {}).items()}
    for dep in stage.deps:
        now = produced[dep] if dep in produced else md5_as_dvc(root / dep)
        if dep not in recorded or recorded[dep] != now:
            changes.append(f"{dep} changed")
    return changes + [f"{out} is gone" for out in stage.outs if not (root / out).exists()]


def _read_records(root: Path) -> dict[str, dict[str, Any]]:
    """What `dvc.lock` holds of each stage, an empty record where it is damaged; no stages when it is torn."""
    stages = _read_mapping(root / "dvc.lock", yaml.safe_load).get("stages")
    return {name: _parse_record(body) for name, body in stages.items()} if isinstance(stages, dict) else {}


def _parse_record(body: Any) -> dict[str, Any]:
    """The command, the parameters, and the MD5 by path; nothing when it is not what DVC writes."""
    try:
        files = {key: {file["path"]: file.get("md5") for file in body.get(key, [])} for key in ("deps", "outs")}
        params = dict(body.get("params", {}).get("params.yaml", {}))
        return {"cmd": body["cmd"], "params": params, **files}
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}


def md5_as_dvc(path: Path) -> str | None:
    """MD5 of a file, or of a folder's list of files, as in `dvc.lock`; None when there is nothing we may read."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc"]
        entries = [{"md5": md5_as_dvc(file), "relpath": file.relative_to(path).as_posix()} for file in files]
        text = json.dumps(sorted(entries, key=lambda entry: str(entry["relpath"])), sort_keys=True)
        return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except (FileNotFoundError, PermissionError):
        return None


def _folders_in_use(root: Path) -> dict[str, Path]:
    """The resume folder that a trainer holds at this moment, by stage."""
    return {folder.name[:-17]: folder for folder in _resume_folders("*", root) if _is_held(folder / "lock")}


def _is_held(path: Path) -> bool:
    """Whether a trainer holds the lock; not, as far as we know, where we may not even read it.

    A shared lock, for a moment: it needs no right to write, unlike `try_lock`, and is refused only by a trainer's.
    """
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _resume_folders(stage: str, root: Path) -> list[Path]:
    return sorted(resume_dir(root).glob(f"{stage}-{16 * '[0-9a-f]'}"))


def _newest_progress(stage: str, root: Path) -> dict[str, Any]:
    """What a trainer of `stage` wrote last, whatever its parameters; nothing if none did."""
    reports = [_read_progress(folder) for folder in _resume_folders(stage, root)]
    return max(filter(None, reports), key=lambda report: float(report["time"]), default={})


def _describe_run(folder: Path | None) -> str:
    if folder is None:
        return ""
    progress = _read_progress(folder)
    # The folder may still hold what an earlier run wrote.
    return _describe(progress) if progress and psutil.pid_exists(progress["pid"]) else "starting"


def _read_progress(folder: Path) -> dict[str, Any]:
    """What a trainer wrote of itself; nothing when that is damaged."""
    progress = _read_mapping(folder / "progress.json", json.loads)
    given = progress | {name: 0 for name in _OPTIONAL if progress.get(name, 0) is None}
    # The bounds: what the system takes for a process, and what `timedelta` takes for seconds.
    is_sound = all(_is_number(given.get(name), int, 2**31) for name in _COUNTS) and all(
        _is_number(given.get(name), (int, float), 1e12) for name in _AMOUNTS
    )
    return progress if is_sound else {}


def _is_number(value: Any, kind: Any, bound: float) -> bool:
    return isinstance(value, kind) and bool(-bound < value < bound)


def _describe(progress: Mapping[str, Any]) -> str:
    update, num_updates = progress["update"], progress["num_updates"]
    parts = [f"update {update} of {num_updates} ({update / max(1, num_updates):.0%})", f"loss {progress['loss']:.4f}"]
    if progress["eta_s"] is not None and psutil.pid_exists(progress["pid"]):
        parts.append(f"{_clock(progress['eta_s'])} left")
    if progress["resumed_from"] is not None:
        parts.append(f"resumed at update {progress['resumed_from']}")
    return ", ".join([*parts, f"{_clock(time.time() - progress['time'])} ago"])


def _last_error(stage: str, root: Path) -> str | None:
    """The error that the stage's log ends with; None if something was logged after it."""
    path = root / LOG_DIR / f"{stage.replace('@', '-')}.log"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    entries = [match for line in lines if (match := _LOG_LINE.fullmatch(line))]
    if entries and entries[-1][1] == "ERROR":
        return entries[-1][2]
    return None


def _read_mapping(path: Path, parse: Any) -> dict[str, Any]:
    """What a file holds; nothing when it is not there, or is being written at this moment."""
    try:
        tree = parse(path.read_bytes())
    except (OSError, ValueError, OverflowError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def render(rows: list[Row]) -> str:
    """Lay the rows out as text, a summary line first."""
    counts = {state: sum(row.state == state for row in rows) for state in dict.fromkeys(row.state for row in rows)}
    width = max(len(row.stage) for row in rows)
    lines = [", ".join(f"{count} {state}" for state, count in counts.items()), ""]
    lines += [f"{row.stage:<{width}}  {row.state:<11}  {row.detail}".rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m coconut.pipeline.status",
        description="Say which pipeline stage runs and how far it is, what is done, what waits and what failed."
        " Takes no lock: it works while `dvc repro` runs.",
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the repository's top folder (default: this one)")
    try:
        sys.stdout.write(render(stage_rows(parser.parse_args().root)))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"status: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
