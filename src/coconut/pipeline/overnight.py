"""`coconut overnight`: run the whole pipeline unattended, and say in the morning what happened.

One owner per repository. It clears what a killed `dvc` left locked, runs `dvc repro -k`, and runs it
again with growing pauses while that brings progress; training goes on from its last saved state. A
stage that fails twice with the same error of its own is not tried again. What waiting may cure is waited for
as long as it takes, with pauses of at most ten minutes: a full disk, a folder in use, another living `dvc`.

SIGTERM, SIGINT and SIGHUP are passed on, so that the trainer saves its state and everything ends within 30 s.
A terminal that is closed counts as SIGHUP, also where `make` stands between; `nohup make overnight &` goes on.
After a night that did not bring everything up to date, a page of what there is is written.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from coconut.files import try_lock
from coconut.layout import OUTPUTS_DIR
from coconut.pipeline.dvc_file import read_pipeline
from coconut.pipeline.journal import Journal, hang_up_with_terminal
from coconut.pipeline.night import Night, Patience
from coconut.pipeline.prune import prune
from coconut.pipeline.record import refuse_merge
from coconut.pipeline.repro import fitting_jobs
from coconut.pipeline.signals import STOP_SIGNALS, unblock

_JOURNAL_DIR = OUTPUTS_DIR / "overnight"


def run(
    root: Path, targets: Sequence[str] = (), *, num_tries: int = 6, pause_s: float = 10.0, jobs: int | None = 1
) -> int:
    """Run `dvc repro -k` through the night, and sum up.

    Args:
        root: the repository's top folder.
        targets: pipeline stages to bring up to date, with all they need; all if empty.
        num_tries: tries in a row that may bring no progress.
        pause_s: seconds before the second try, doubled while tries bring no progress.
        jobs: stages at once; None for as many as the machine has room for.

    Returns:
        0 when everything is up to date, 1 when something failed, 128 + the signal that ended it.

    Raises:
        ValueError: `dvc.yaml`, `dvc.lock` or `params.yaml` holds a mistake, or a night is under way here.
        OSError: the journal's folder cannot be made, or no process can be started.
    """
    read_pipeline(root)
    refuse_merge(root)
    with _owned(root):
        journal = Journal(root / _JOURNAL_DIR / f"{datetime.now():%Y-%m-%d_%H-%M-%S}.log")
        night = Night(root, targets, journal, jobs or fitting_jobs(root))
        for number in (*STOP_SIGNALS, signal.SIGALRM):
            # What was ignored (`nohup`) stays ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, night.stop)
        unblock()
        hang_up_with_terminal()
        try:
            exit_code = night.run(Patience(num_tries, pause_s))
            if exit_code != 0:
                night.write_report()
            return exit_code
        finally:  # Whatever ended the night: what it brought is worth knowing.
            night.journal.write("\n" + night.summary())


def run_prune(root: Path) -> int:
    """Delete the resume states that nothing would continue, and say which; 0.

    Raises:
        ValueError: `dvc.yaml` or `params.yaml` holds a mistake, or a night is under way here.
        OSError: a state cannot be deleted.
    """
    read_pipeline(root)
    with _owned(root):
        prune(root, lambda sentence: sys.stdout.write(f"{sentence}\n"))
    return 0


@contextlib.contextmanager
def _owned(root: Path) -> Iterator[None]:
    """Be the only overnight run of this repository.

    Raises:
        ValueError: somebody else is.
    """
    path = root / _JOURNAL_DIR / "lock"
    lock = try_lock(path)
    if lock is None:
        holder = path.read_text(encoding="utf-8", errors="replace").strip()
        raise ValueError(
            f"{path}: an overnight run is under way, pid {holder or 'unknown'};"
            " `coconut status` shows where it is; wait for it, or end it with SIGTERM"
        )
    with lock:
        # Only for the message above: on a full disk the lock is held without it.
        with contextlib.suppress(OSError):
            lock.truncate(0)
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())
        yield
