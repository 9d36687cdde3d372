"""What a killed `dvc` leaves behind: stale entries in `.dvc/tmp/rwlock`, and a torn `rwlock` or `dvc.lock`.

DVC takes an entry of the rwlock for held while any process has its pid, even a zombie or a
stranger. Here a holder counts as alive only if it is the process that wrote the entry. Everything is
judged and changed under DVC's own guard, `rwlock.lock`.

`make repro` runs this as `coconut repair` before `dvc repro`, and `coconut overnight` before every try.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coconut.files import replace_file, wait_for_lock
from coconut.pipeline.processes import find_dvc, is_alive
from coconut.pipeline.record import repair_record

_RWLOCK = Path(".dvc/tmp/rwlock")
_GUARD_WAIT_S = 3.0

Entries = dict[str, dict[str, Any]]


def run(root: Path) -> int:
    """Repair what a killed dvc left, and print what was done: nothing, where nothing was.

    Returns:
        0: dvc can go on, or another dvc is at work, which is said too.

    Raises:
        OSError: the disk is full, or the files are somebody else's.
    """
    sys.stdout.writelines(f"{sentence}\n" for sentence in repair(root))
    if holder := describe_holder(root):
        sys.stdout.write(
            f"{holder}; `coconut status` shows how far it is. Where it blocks this run, wait for it or end it:"
            f" as long as it lives, {_RWLOCK} must stay, whatever DVC says\n"
        )
    return 0


def paths_being_written(root: Path) -> dict[Path, int]:
    """Outputs that a living `dvc` works on now, with its pid.

    Takes no lock; empty when the file is torn, or not ours to read.
    """
    try:
        entries = _read(root / _RWLOCK) or {}
    except OSError:
        return {}
    write = entries.get("write", {})
    return {Path(path): info["pid"] for path, info in write.items() if _is_held(info, root)}


def describe_holder(root: Path) -> str:
    """Say which other `dvc` is at work here; nothing if none is."""
    written = paths_being_written(root)
    if not written:
        return ""
    pids = ", ".join(map(str, sorted(set(written.values()))))
    return f"another dvc (pid {pids}) is at work on {', '.join(sorted(map(str, written)))}"


def repair(root: Path) -> list[str]:
    """Remove what a killed `dvc` left and no living one holds; say in sentences what was done.

    Raises:
        OSError: the disk is full, or the files are somebody else's. They are as they were.
    """
    if not (root / ".dvc/tmp").exists():
        return []
    guard = wait_for_lock(root / ".dvc/tmp/rwlock.lock", _GUARD_WAIT_S)
    if guard is None:
        return [f"{root / _RWLOCK}: a dvc command is writing it; left as it is"]
    with guard:
        return _clear_stale_entries(root) + repair_record(root)


def _clear_stale_entries(root: Path) -> list[str]:
    path = root / _RWLOCK
    entries = _read(path)
    if entries is None:
        return [_remove_torn(path, root)]
    kept, dropped = _sort_out(entries, root)
    if dropped:
        replace_file(path, json.dumps(kept))
    return [f"{path}: removed the locks of {holder}, which has ended" for holder in dropped]


def _remove_torn(path: Path, root: Path) -> str:
    living = find_dvc(root)
    if living is not None:
        return f"{path}: torn, but dvc runs here (pid {living}); left as it is"
    path.unlink()
    return f"{path}: torn by a kill, and no dvc runs here; removed"


def _read(path: Path) -> Entries | None:
    """Return the entries; none of them without a file, None when it is not what DVC writes."""
    try:
        entries = json.loads(path.read_bytes())
        for info in _infos(entries):
            if not isinstance(info["pid"], int) or info["pid"] < 0 or not isinstance(info["cmd"], str):
                return None
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return dict(entries)


def _infos(entries: Entries) -> Iterator[dict[str, Any]]:
    yield from entries.get("write", {}).values()
    for infos in entries.get("read", {}).values():
        yield from infos


def _sort_out(entries: Entries, root: Path) -> tuple[Entries, list[str]]:
    is_held = {json.dumps(info): _is_held(info, root) for info in _infos(entries)}
    write = {path: info for path, info in entries.get("write", {}).items() if is_held[json.dumps(info)]}
    read = {
        path: kept
        for path, infos in entries.get("read", {}).items()
        if (kept := [info for info in infos if is_held[json.dumps(info)]])
    }
    dropped = {f"pid {info['pid']} ({info['cmd']})" for info in _infos(entries) if not is_held[json.dumps(info)]}
    return {"write": write, "read": read}, sorted(dropped)


def _is_held(info: dict[str, Any], root: Path) -> bool:
    """Say whether the process that wrote the entry still runs: same pid, same arguments, not younger than the file."""
    with contextlib.suppress(OSError):
        # The first word is how it was called: `dvc`, or `.../dvc/__main__.py` for `python -m dvc`.
        arguments = info["cmd"].partition(" ")[2]
        return is_alive(info["pid"], wrote_at=(root / _RWLOCK).stat().st_mtime, arguments=arguments)
    return True  # The file cannot be looked at, so that nothing is known of its writer.
