"""Processes that others have started: which of them live, which are suspended, which are a `dvc`."""

import re
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_CLOCK_SLACK_S = 60.0
"""Clocks may be set; a process that started this much after it is said to have written cannot be the writer."""
_MODULE_OPTION = re.compile(r"-[bBdEiIOPqsSuvx]*m(.*)")
_OPTIONS_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")


def is_alive(pid: int, *, wrote_at: float, arguments: str | None = None) -> bool:
    """Say whether the process that wrote something still runs, and its number is not another one's by now.

    Args:
        pid: its number.
        wrote_at: when it wrote, in seconds of the epoch.
        arguments: its command line without the program's name, if known.
    """
    try:
        process = psutil.Process(pid)
        if process.create_time() > wrote_at + _CLOCK_SLACK_S:
            return False
        # A zombie has no arguments any more, and psutil says so by NoSuchProcess.
        return " ".join(process.cmdline()).endswith(arguments or "") and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except (psutil.AccessDenied, OSError):
        return True  # Another user's process has this number, and nothing more can be known.


def is_suspended(pid: int) -> bool:
    """Say whether a process was stopped by SIGSTOP, Ctrl-Z or a debugger, and goes on only when it is told to."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except (psutil.Error, OSError, ValueError, OverflowError):
        return False


def find_dvc(root: Path) -> int | None:
    """The number of a `dvc` process that works in this repository."""
    return next((process.pid for process in psutil.process_iter() if _is_dvc_in(process, root)), None)


def _is_dvc_in(process: psutil.Process, root: Path) -> bool:
    try:
        return (
            _runs_dvc(process.cmdline())
            and process.status() != psutil.STATUS_ZOMBIE
            and Path(process.cwd()).is_relative_to(root.resolve())
        )
    except (psutil.Error, OSError):
        return False


def _runs_dvc(words: list[str]) -> bool:
    """Say whether a command line is that of `dvc`, and not of what merely names it.

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
    """Say whether an interpreter with these arguments runs `dvc`."""
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
