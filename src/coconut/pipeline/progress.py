"""How far a training is, as its trainer writes it for others to read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.files import is_locked
from coconut.pipeline.inputs import fingerprint
from coconut.pipeline.resume import ResumeStore, resume_dir

_COUNTS = ("update", "num_updates", "pid")
_AMOUNTS = ("loss", "time")
_LARGEST_COUNT = 2**31
_LARGEST_AMOUNT = 1e12


@dataclass(frozen=True)
class Progress:
    """The content of a file that `ResumeStore.write_progress` writes."""

    update: int
    num_updates: int
    loss: float
    time: float
    """When it was written, in seconds of the epoch."""
    pid: int
    eta_s: float | None
    resumed_from: int | None


def read_progress(folder: Path) -> Progress | None:
    """Return what a trainer wrote into its resume folder; None when nothing is there, or it is damaged."""
    try:
        tree = json.loads((folder / "progress.json").read_bytes()) if (folder / "progress.json").is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(tree, dict):
        return None
    eta_s, resumed_from = tree.get("eta_s"), tree.get("resumed_from")
    counts = [*(tree.get(name) for name in _COUNTS), resumed_from or 0]
    amounts = [*(tree.get(name) for name in _AMOUNTS), eta_s or 0]
    # The bounds: what the system takes for a process, and what `timedelta` takes for seconds.
    is_sound = all(_is_number(count, int, _LARGEST_COUNT) for count in counts) and all(
        _is_number(amount, (int, float), _LARGEST_AMOUNT) for amount in amounts
    )
    if not is_sound:
        return None
    return Progress(**{name: tree[name] for name in (*_COUNTS, *_AMOUNTS)}, eta_s=eta_s, resumed_from=resumed_from)


def newest_progress(stage: str, root: Path) -> Progress | None:
    """Return what a trainer of `stage` wrote last, whatever its parameters; None if none did."""
    reports = [report for folder in _resume_folders(stage, root) if (report := read_progress(folder)) is not None]
    return max(reports, key=lambda report: report.time, default=None)


def progress_of(stage: str, root: Path) -> Progress | None:
    """Return what a trainer of `stage` with the present parameters, code and data wrote last; None if none did."""
    if not _resume_folders(stage, root):
        return None  # Without reading its inputs, which may be large.
    try:
        return read_progress(ResumeStore.folder_of(stage, fingerprint(stage, root), root))
    except (OSError, ValueError):
        return None  # An input is missing, so that no trainer had it.


def folders_in_use(root: Path) -> dict[str, Path]:
    """The resume folder that a trainer holds at this moment, by stage."""
    return {folder.name[:-17]: folder for folder in _resume_folders("*", root) if is_locked(folder / "lock")}


def _resume_folders(stage: str, root: Path) -> list[Path]:
    return sorted(resume_dir(root).glob(f"{stage}-{16 * '[0-9a-f]'}"))


def _is_number(value: Any, kind: Any, bound: float) -> bool:
    return isinstance(value, kind) and bool(-bound < value < bound)
