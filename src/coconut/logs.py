"""Log sinks and progress."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loguru import logger

from coconut.files import explain
from coconut.layout import LOG_DIR

_LINE = "{time:HH:mm:ss} | {level: <7} | {message}"
_DATED_LINE = "{time:YYYY-MM-DD HH:mm:ss} | {level: <7} | {message}"


@contextmanager
def log_sinks(name: str) -> Iterator[None]:
    """Log to the terminal, without breaking a progress bar, and to `outputs/logs/<name>.log`.

    Of several processes that share a stage, the first one speaks for all, and each has a file of its own.
    """
    logger.remove()
    if rank() == 0:
        logger.add(_write_to_terminal, format=_LINE, level="INFO", colorize=False)
    # diagnose=False: values of variables may hold data, and do not belong into a log.
    suffix = f".process-{rank()}" if rank() else ""
    sink = _LogFile(LOG_DIR / f"{name.replace('@', '-')}{suffix}.log")
    logger.add(sink.write, format=_DATED_LINE, level="DEBUG", diagnose=False)
    yield
    logger.complete()


class _LogFile:
    """A log file that a full disk cannot turn into the stage's trouble: one warning, and it goes on when it can."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_failed = False

    def write(self, line: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line)
        except OSError as error:
            if not self.has_failed:
                self.has_failed = True
                # Not through the logger: this is called by it.
                _write_to_terminal(f"WARNING: {self.path}: the log file lacks lines from here on: {explain(error)}\n")


def _write_to_terminal(line: str) -> None:
    # Imported here: tqdm is needed by processes that show progress, and they all log.
    from tqdm import tqdm

    # The terminal may be closed, or a full disk may hold what was redirected: the stage goes on.
    with suppress(OSError, ValueError):
        tqdm.write(line, file=sys.stderr, end="")


def shows_progress() -> bool:
    """Say whether somebody watches: a terminal gets a bar, anything else one log line per interval."""
    return rank() == 0 and sys.stderr.isatty()


def rank() -> int:
    """Return the number of this process among those that share its stage."""
    return int(os.environ.get("RANK", "0"))
