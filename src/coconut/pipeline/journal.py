"""The night's journal: what `dvc repro` and the night itself say, on the terminal and in a file."""

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import TextIO

_LOOK_EVERY_S = 1.0


class Journal:
    """Writes to the terminal and to the night's file. Neither may end the night: both can go away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sinks: list[TextIO] = [sys.stdout]
        with contextlib.suppress(OSError):
            self._sinks.append(path.open("w", encoding="utf-8", errors="replace"))

    def write(self, line: str) -> None:
        for sink in self._sinks:
            # The terminal was closed, or the disk is full: the training is worth more than its report.
            with contextlib.suppress(OSError):
                sink.write(line + "\n")
                sink.flush()

    def say(self, message: str) -> None:
        """Write a line of our own, told from dvc's by its start."""
        self.write(f"overnight {datetime.now():%H:%M:%S} | {message}")


def hang_up_with_terminal() -> None:
    """Send this process SIGHUP when the terminal that it writes to is closed.

    The kernel tells the terminal's first process only. If that is `make`, which waits for its children, the night
    would hear nothing and go on unseen.
    """
    if sys.stdout.isatty():
        threading.Thread(target=_watch_terminal, args=(sys.stdout.fileno(),), daemon=True).start()


def _watch_terminal(descriptor: int) -> None:
    while os.isatty(descriptor):  # No longer, once it has hung up.
        time.sleep(_LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGHUP)
