"""What a killed `dvc` leaves behind: entries in `.dvc/tmp/rwlock`, and a torn `rwlock` or `dvc.lock`.

DVC takes an entry of the rwlock for held while any process has its pid, even a zombie or a
stranger. Here a holder counts as alive only if it is the process that wrote the entry. Everything is
judged and changed under DVC's own guard, `rwlock.lock`.

DVC writes both files in place, so a kill can tear them. With a torn `dvc.lock` it refuses to work or,
where what is left happens to be YAML, runs finished stages again. So a copy is kept of the last whole
one; what it lacks DVC takes from its run cache, in seconds.

`make repro` calls this before `dvc repro`, and `make overnight` before every try; by hand it is
`python -m coconut.pipeline.dvc_lock`.
"""

import argparse
import contextlib
import fcntl
import json
import re
import sys
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
_MODULE_OPTION = re.compile(r"-[bBdEiIOPqsSuvx]*m(.*)")
_OPTIONS_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")

Entries = dict[str, dict[str, Any]]


def paths_being_written(root: Path) -> set[Path]:
    """Outputs that a living `dvc` works on now. Takes no lock; empty when the file is torn, or not ours to read."""
    try:
        entries = _read(root / _RWLOCK) or {}
    except OSError:
        return set()
    write = entries.get("write", {})
    return {Path(path) for path, info in write.items() if _is_alive(info, root)}


def mend(root: Path) -> list[str]:
    """Remove what a killed `dvc` left and no living one holds; say in sentences what was done.

    Raises:
        OSError: the disk is full, or the files are somebody else's. They are as they were.
    """
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
        _replace(path, json.dumps(kept).encode())
    return [f"{path}: removed the locks of {holder}, which is no more" for holder in dropped]


def keep_record(root: Path) -> None:
    """Keep a copy of `dvc.lock`, unless it is torn or being written.

    Raises:
        OSError: the disk is full, say. The copy before it is as it was.
    """
    path, copy = root / "dvc.lock", root / _WHOLE_RECORD
    content = path.read_bytes() if path.exists() else b""
    if is_whole_record(content):
        _replace(copy, content)


def _replace(path: Path, content: bytes) -> None:
    """Put `content` in place of a file, all of it or nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        # What a full disk took of it would only take up room there.
        with contextlib.suppress(OSError):
            temporary.unlink()
        # Writing to a full disk is an error that names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace_torn_record(root: Path) -> list[str]:
    path, aside, copy = root / "dvc.lock", root / ".dvc/tmp/dvc.lock.torn", root / _WHOLE_RECORD
    if not path.exists() or is_whole_record(path.read_bytes()) or _find_dvc_here(root) is not None:
        return []
    path.replace(aside)
    back = "there is no copy of a whole one"
    # A copy that went to the disk as the power failed can be torn, too.
    if copy.exists() and is_whole_record(copy.read_bytes()):
        copy.replace(path)
        back = "the last whole one is back"
    return [f"{path}: torn by a kill; moved to {aside}, {back}, the rest is in DVC's run cache"]


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
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError):
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
            if not isinstance(info["pid"], int) or info["pid"] < 0 or not isinstance(info["cmd"], str):
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
        return (
            _runs_dvc(process.cmdline())
            and process.status() != psutil.STATUS_ZOMBIE
            and Path(process.cwd()).is_relative_to(root.resolve())
        )
    except (psutil.Error, OSError):
        return False


def _runs_dvc(words: list[str]) -> bool:
    """Whether a command line is that of `dvc`, and not of what merely names it.

    >>> [_runs_dvc(line.split()) for line in ("dvc repro", "python3 -u /x/bin/dvc repro", "python -m dvc repro")]
    [True, True, True]
    >>> [_runs_dvc(line.split()) for line in ("tail -f dvc.yaml", "vim dvc", "/dvc/bin/python stage.py dvc")]
    [False, False, False]
    """
    program, *rest = words or [""]
    if Path(program).name == "dvc":
        return True
    return Path(program).name.lower().startswith(("python", "pypy")) and _is_script_dvc(rest)


def _is_script_dvc(words: list[str]) -> bool:
    """Whether an interpreter with these arguments runs `dvc`."""
    rest = iter(words)
    for word in rest:
        if match := _MODULE_OPTION.fullmatch(word):
            return (match[1] or next(rest, "")) == "dvc"
        if word in _OPTIONS_WITH_VALUE:
            next(rest, None)
        elif word == "-c" or not word.startswith("-"):
            # `python -m dvc` may be called by its file, too.
            return Path(word).name == "dvc" or Path(word).parts[-2:] == ("dvc", "__main__.py")
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


def main() -> int:
    """Mend, and say what was done: nothing, where nothing was."""
    parser = argparse.ArgumentParser(
        prog="python -m coconut.pipeline.dvc_lock",
        description="Mend what a killed `dvc` left behind: locks of processes that are no more, and a torn rwlock or"
        " dvc.lock. What a living dvc holds stays as it is. Says what it did, or nothing.",
        epilog="Exit code: 0 dvc can go on, or another dvc is at work; 1 the files cannot be changed.",
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the repository's top folder (default: this one)")
    root = parser.parse_args().root
    try:
        sys.stdout.writelines(f"{sentence}\n" for sentence in mend(root))
    except OSError as error:
        sys.stderr.write(
            f"dvc_lock: {error}: what a killed dvc left in {root / '.dvc/tmp'} is not mended;"
            " make room on the disk, or mend the permissions, and start again\n"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
