"""Deletes the resume states that nothing in the work tree would continue."""

from collections.abc import Callable
from pathlib import Path

from coconut.files import amount, remove, size_of, try_lock
from coconut.pipeline.inputs import fingerprint
from coconut.pipeline.resume import resume_dir
from coconut.pipeline.status import stage_rows


def prune(root: Path, say: Callable[[str], object]) -> None:
    """Keep the states of unfinished stages with the present parameters, code and data, and those in use."""
    needed = _needed_folders(root)
    for folder in sorted(resume_dir(root).glob(f"*-{16 * '[0-9a-f]'}")):
        stage = folder.name[:-17]
        if folder.name in needed or f"{stage}-" in needed:
            continue
        lock = try_lock(folder / "lock") if folder.is_dir() else None
        if folder.is_dir() and lock is None:
            say(f"{folder}: in use, kept")
            continue
        num_bytes = size_of(folder)
        remove(folder)
        if lock is not None:
            lock.close()
        say(f"{folder}: removed, {amount(num_bytes)}")


def _needed_folders(root: Path) -> set[str]:
    """Names of folders to keep; `<stage>-`, all of them, where inputs are missing so that none is known to be old."""
    needed = set()
    for row in stage_rows(root):
        if row.state == "done":
            continue
        try:
            needed.add(f"{row.stage}-{fingerprint(row.stage, root)[:16]}")
        except FileNotFoundError:
            needed.add(f"{row.stage}-")
    return needed
