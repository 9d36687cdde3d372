"""What a killed `dvc` leaves behind: entries in `.dvc/tmp/rwlock`, and a torn `rwlock` or `dvc.lock`.

DVC takes an entry of the rwlock for held while any process has its pid, even a zombie or a
stranger. Here a holder counts as alive only if it is the process that wrote the entry. Everything is
judged and changed under DVC's own guard, `rwlock.lock`.

DVC writes both files in place, so a kill can tear them. With a torn `dvc.lock` it refuses to work or,
where what is left happens to be YAML, runs finished stages again. So a copy is kept of the last whole
one; what it lacks DVC takes from its run cache, in seconds.
"""

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

_RWLOCK = Path(".dvc/tmp/rwlock")
_WHOLE_RECORD = Path(".dvc/tmp/dvc.lock.whole")
_GUARD_WAIT_S = 3.0
_CLOCK_SLACK_S = 60.0
"""A process that started this much after the file was last written cannot be the writer."""

_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")

Entries = dict[str, dict[str, Any]]


def paths_being_written(root: Path) -> set[Path]:
    """Outputs that a living `dvc` works on now. Takes no lock; empty when the file is torn."""
    entries = _read(root / _RWLOCK) or {}
    write = entries.get("write", {})
    return {Path(path) for path, info in write.items() if _is_alive(info, root)}


def mend(root: Path) -> list[str]:
    """Remove what a killed `dvc` left and no living one holds; say in sentences what was done."""
    if not (root / ".dvc/tmp").exists():
        return []
    with _guard(root) as is_ours:
        if not is_ours:
            return [f"{root / _RWLOCK}: a dvc command is writing it; left as it is"]
        return _clear_stale_entries(root) + _replace_torn_record(root)


def _clear_stale_entries(root: Path) -> list[str]:
    path = root / _RWLOCK
    entries = _read(path)
    if entries is None:
        return [_remove_torn(path, root)]
    kept, dropped = _sort_out(entries, root)
    if dropped:
        temporary = path.with_name("rwlock.tmp")
        temporary.write_text(json.dumps(kept), encoding="utf-8")
        temporary.replace(path)
    return [f"{path}: removed the locks of {holder}, which is no more" for holder in dropped]


def keep_record(root: Path) -> None:
    """Keep a copy of `dvc.lock`, unless it is torn or being written."""
    path, copy = root / "dvc.lock", root / _WHOLE_RECORD
    content = path.read_bytes() if path.exists() else b""
    if is_whole_record(content):
        temporary = copy.with_suffix(".tmp")
        temporary.write_bytes(content)
        temporary.replace(copy)


def _replace_torn_record(root: Path) -> list[str]:
    path, aside, copy = root / "dvc.lock", root / ".dvc/tmp/dvc.lock.torn", root / _WHOLE_RECORD
    if not path.exists() or is_whole_record(path.read_bytes()) or _find_dvc_here(root) is not None:
        return []
    path.replace(aside)
    if copy.exists():
        copy.replace(path)
    return [f"{path}: torn by a kill; moved to {aside}, the last whole one is back, the rest is in DVC's run cache"]


def is_whole_record(content: bytes) -> bool:
    """Whether a `dvc.lock` is as DVC writes it, down to its last byte.

    One with the marks of a merge counts as whole: what it should hold only its owner can say.
    """
    if b"<<<<<<<" in content:
        return True
    try:
        stages = yaml.safe_load(content)["stages"].values()
        files = [file for stage in stages for key in ("deps", "outs") for file in stage.get(key, [])]
        is_complete = all(stage["cmd"] for stage in stages) and all(_MD5.fullmatch(file["md5"]) for file in files)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
        return False
    return is_complete and content.endswith(b"\n")


def _remove_torn(path: Path, root: Path) -> str:
    living = _find_dvc_here(root)
    if living is not None:
        return f"{path}: torn, but dvc runs here (pid {living}); left as it is"
    path.unlink()
    return f"{path}: torn by a kill, and no dvc runs here; removed"


def _read(path: Path) -> Entries | None:
    """Return the entries; none of them without a file, None when it is not what DVC writes."""
    try:
        entries = json.loads(path.read_bytes())
        for info in _infos(entries):
            if not isinstance(info["pid"], int) or not isinstance(info["cmd"], str):
                return None
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return dict(entries)


def _infos(entries: Entries) -> Iterator[dict[str, Any]]:
    yield from entries.get("write", {}).values()
    for infos in entries.get("read", {}).values():
        yield from infos


def _sort_out(entries: Entries, root: Path) -> tuple[Entries, list[str]]:
    alive = {json.dumps(info): _is_alive(info, root) for info in _infos(entries)}
    write = {path: info for path, info in entries.get("write", {}).items() if alive[json.dumps(info)]}
    read = {
        path: kept
        for path, infos in entries.get("read", {}).items()
        if (kept := [info for info in infos if alive[json.dumps(info)]])
    }
    dead = sorted({f"pid {info['pid']} ({info['cmd']})" for info in _infos(entries) if not alive[json.dumps(info)]})
    return {"write": write, "read": read}, dead


def _is_alive(info: dict[str, Any], root: Path) -> bool:
    """Whether the process that wrote the entry still runs: same pid, same arguments, not younger than the file."""
    try:
        process = psutil.Process(info["pid"])
        written = (root / _RWLOCK).stat().st_mtime
        if process.create_time() > written + _CLOCK_SLACK_S:
            return False
        # The first word is how it was called: `dvc`, or `.../dvc/__main__.py` for `python -m dvc`.
        arguments = info["cmd"].partition(" ")[2]
        return " ".join(process.cmdline()).endswith(arguments)
    except psutil.NoSuchProcess:
        return False  # Or a zombie: it has no arguments any more, and psutil says so by this error.
    except (psutil.AccessDenied, OSError):
        return True  # Not ours to judge: somebody else's process has this pid.


def _find_dvc_here(root: Path) -> int | None:
    return next((process.pid for process in psutil.process_iter() if _is_dvc_here(process, root)), None)


def _is_dvc_here(process: psutil.Process, root: Path) -> bool:
    try:
        runs_dvc = any("dvc" in word for word in process.cmdline()[:3])
        return (
            runs_dvc and process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(root.resolve())
        )
    except (psutil.Error, OSError):
        return False


@contextlib.contextmanager
def _guard(root: Path) -> Iterator[bool]:
    """Hold the lock that `dvc` holds while it edits the file; False if that could not be had in time."""
    deadline = time.monotonic() + _GUARD_WAIT_S
    with (root / ".dvc/tmp/rwlock.lock").open("a") as guard:
        while True:
            try:
                fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                yield False
            else:
                yield True
            return
