"""`make overnight`: run the whole pipeline unattended, and say in the morning what happened.

One owner per repository. It clears what a killed `dvc` left locked, runs `dvc repro -k`, and runs it
again with growing pauses while that leads anywhere; training goes on from its last saved state. A
stage that fails twice with the same error of its own is not tried again, unless waiting may help: a
full disk, a folder in use. SIGTERM, SIGINT and SIGHUP
are passed on, so that the trainer saves its state and everything ends within 30 s.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import TextIO

from coconut.layout import OUTPUTS_DIR
from coconut.pipeline.dvc_file import read_pipeline
from coconut.pipeline.dvc_lock import keep_record, mend, paths_being_written
from coconut.pipeline.inputs import fingerprint
from coconut.pipeline.repro_log import Outcome, ReproLog, describe_exit
from coconut.pipeline.resume import last_update, resume_dir, try_lock
from coconut.pipeline.signals import GRACE_S, STOP_SIGNALS, die_with_parent, unblock
from coconut.pipeline.status import stage_rows

JOURNAL_DIR = OUTPUTS_DIR / "overnight"
LONGEST_PAUSE_S = 600.0


class Journal:
    """Writes to the terminal and to the night's file. Neither may end the night: both can go away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sinks: list[TextIO] = [sys.stdout, path.open("w", encoding="utf-8", errors="replace")]

    def write(self, line: str) -> None:
        for sink in self._sinks:
            # The terminal was closed, or the disk is full: the training is worth more than its report.
            with contextlib.suppress(OSError):
                sink.write(line + "\n")
                sink.flush()

    def say(self, message: str) -> None:
        """Write a line of our own, told from dvc's by its start."""
        self.write(f"overnight {datetime.now():%H:%M:%S} | {message}")


@dataclass(frozen=True)
class Patience:
    """When to try again."""

    num_tries: int
    """Tries in a row that lead nowhere."""
    pause_s: float
    """Before the second try; doubled while tries lead nowhere."""


class Night:
    """Runs `dvc repro -k` until it succeeds, or until there is no sense in trying again."""

    def __init__(self, root: Path, targets: Sequence[str], journal: Journal) -> None:
        self.root = root
        self.targets = targets
        self.journal = journal
        self.num_tries = 0
        self.outcomes = {name: Outcome() for name in read_pipeline(root)}
        self.stopped_by: signal.Signals | None = None
        self._dvc: subprocess.Popen[str] | None = None
        self._started = time.monotonic()

    def run(self, patience: Patience) -> int:
        """Run to the end of the night.

        Returns:
            0 when everything is up to date, 1 when something failed, 128 + the signal that ended it.
        """
        tries_left, pause_s = patience.num_tries, patience.pause_s
        failures: dict[str, str] = {}
        while True:
            before, failed_before = self._progress(), failures
            exit_code, failures = self._try_once()
            if exit_code == 0 or self.stopped_by:
                break
            if self._progress() != before:
                tries_left, pause_s = patience.num_tries, patience.pause_s
            elif failures and failures == failed_before:
                self.journal.say("the same errors as before, and nothing else to do: no further try")
                break
            tries_left -= 1
            if tries_left <= 0:
                self.journal.say(f"{patience.num_tries} tries in a row led nowhere: no further try")
                break
            self.journal.say(f"trying again in {pause_s:.0f} s")
            self._sleep(pause_s)
            if self.stopped_by:
                break
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return 0 if exit_code == 0 else 128 + self.stopped_by if self.stopped_by else 1

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal: have the stage save and end; the second SIGINT, or the alarm, ends it at once."""
        is_urgent = number == signal.SIGALRM or (self.stopped_by is not None and number == signal.SIGINT)
        if self.stopped_by is None:
            self.stopped_by = signal.Signals(number)
            signal.alarm(GRACE_S + 2)  # The stage's own alarm comes first.
        self._signal_group(signal.SIGKILL if is_urgent else signal.SIGTERM)

    def summary(self) -> str:
        """Lay out what happened as a table."""
        duration = timedelta(seconds=round(time.monotonic() - self._started))
        width = max(len(name) for name in self.outcomes)
        lines = [f"Summary: {duration}, {self.num_tries} {'try' if self.num_tries == 1 else 'tries'}", ""]
        for name, outcome in self.outcomes.items():
            took = str(timedelta(seconds=round(outcome.seconds))) if outcome.seconds else ""
            lines.append(f"{name:<{width}}  {outcome.result:<9}  {took:>8}  {outcome.reason}".rstrip())
        return "\n".join([*lines, "", f"Everything `dvc repro` and the stages said: {self.journal.path}"])

    def _try_once(self) -> tuple[int, dict[str, str]]:
        """Run `dvc repro -k` once.

        Returns:
            (exit code, the errors that would come again; empty if there is hope).
        """
        self._mend()
        self.num_tries += 1
        # While a stage's command runs, dvc holds no repository lock; if we took it then, that dvc could
        # not get it back after the command and would fail.
        if at_work := sorted(map(str, paths_being_written(self.root))):
            self.journal.say(f"another dvc is at work, on {', '.join(at_work)}")
            return 1, {}
        log = ReproLog(self.outcomes)
        exit_code = self._repro(log)
        log.close(exit_code, stopped_by=self.stopped_by)
        self.outcomes = {name: outcome.then(log.outcomes[name]) for name, outcome in self.outcomes.items()}
        if exit_code < 0:
            self.journal.say(f"dvc {describe_exit(exit_code)}")
        return exit_code, log.own_errors()

    def _mend(self) -> None:
        try:
            for sentence in mend(self.root):
                self.journal.say(sentence)
        except OSError as error:
            self.journal.say(f"{error}: what a killed dvc may have left is not mended; going on, dvc may refuse to")

    def _keep_record(self) -> None:
        try:
            keep_record(self.root)
        except OSError as error:
            # The copy only saves time after a kill: the stages are worth more.
            self.journal.say(f"{error}: no copy of dvc.lock was kept, the one before it stays; make room on the disk")

    def _repro(self, log: ReproLog) -> int:
        command = [sys.executable, "-m", "dvc", "repro", "--keep-going", *self.targets]
        bin_dir = str(Path(sys.executable).parent)  # Stages run `python`: it must be this one.
        environment = os.environ | {"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # A group of its own, to be signalled as one.
            preexec_fn=die_with_parent,
        ) as dvc:
            self._dvc = dvc
            if self.stopped_by:  # The signal came before there was anybody to pass it on to.
                self._signal_group(signal.SIGTERM)
            assert dvc.stdout is not None
            # Ends when the last process that holds the pipe has ended: a trainer may outlive dvc while it saves.
            for line in dvc.stdout:
                self.journal.write(line.rstrip("\n"))
                if log.read(line.rstrip("\n")):
                    self._keep_record()
        self._signal_group(signal.SIGKILL)
        self._dvc = None
        return dvc.returncode

    def _signal_group(self, number: signal.Signals) -> None:
        if self._dvc is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._dvc.pid, number)

    def _progress(self) -> object:
        """Something that differs after a try that finished a stage, or brought its training forward."""
        finished = ""
        with contextlib.suppress(OSError):  # There is none before the first stage has ended.
            finished = hashlib.sha256((self.root / "dvc.lock").read_bytes()).hexdigest()
        folders = resume_dir(self.root).glob("*")
        return finished, {folder.name: last_update(folder) for folder in folders}

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stopped_by:
            time.sleep(0.1)


def prune(root: Path, journal: Journal) -> None:
    """Delete the resume states that nothing in the work tree would continue.

    Kept are those of unfinished stages with the present parameters, code and data, and those in use.
    """
    needed = _needed_folders(root)
    for folder in sorted(resume_dir(root).glob(f"*-{16 * '[0-9a-f]'}")):
        stage = folder.name[:-17]
        if folder.name in needed or f"{stage}-" in needed:
            continue
        lock = try_lock(folder)
        if lock is None:
            journal.say(f"{folder}: in use, kept")
            continue
        with lock:
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
            journal.say(f"{folder}: removed, {num_bytes / 1e6:.1f} MB")


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


@contextlib.contextmanager
def owned(root: Path) -> Iterator[None]:
    """Be the only overnight run of this repository.

    Raises:
        ValueError: somebody else is.
    """
    folder = root / JOURNAL_DIR
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"{folder / 'lock'}: an overnight run is under way, pid {lock.read().strip() or 'unknown'};"
                " `python -m coconut.pipeline.status` shows where it is; wait for it, or end it with SIGTERM"
            ) from None
        lock.truncate(0)
        # Only for the message above: on a full disk the lock is held without it. Past the buffer, which
        # would try once more, and fail, when the night is over.
        with contextlib.suppress(OSError):
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())
        yield


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m coconut.pipeline.overnight",
        description="Run `dvc repro` unattended: clear locks that a killed dvc left, go on with what does not depend on"
        " a failed stage, try again while that leads anywhere, and end with a summary of what ran and what failed."
        " SIGTERM, SIGINT and SIGHUP end it within 30 s, the state of the training saved.",
        epilog="Exit code: 0 everything is up to date, 1 something failed, 128 + n ended by signal n.",
    )
    parser.add_argument(
        "targets", nargs="*", help="pipeline stages to bring up to date, with all they need (default: all)"
    )
    parser.add_argument("--tries", type=int, default=6, help="tries in a row that lead nowhere (default: %(default)s)")
    parser.add_argument(
        "--pause-s",
        type=float,
        default=10.0,
        help="seconds before the second try, doubled while tries lead nowhere (default: %(default)s)",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="run nothing; delete the resume states of other parameters, code or data, and of finished stages",
    )
    return parser.parse_args()


def main() -> int:
    """Own the repository for the night, run, and sum up."""
    arguments = _parse_arguments()
    root = Path()
    try:
        read_pipeline(root)
        with owned(root):
            journal = Journal(root / JOURNAL_DIR / f"{datetime.now():%Y-%m-%d_%H-%M-%S}.log")
            if arguments.prune:
                prune(root, journal)
                return 0
            night = Night(root, arguments.targets, journal)
            for number in (*STOP_SIGNALS, signal.SIGALRM):
                # What was ignored (`nohup`) stays ignored.
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, night.stop)
            unblock()
            try:
                return night.run(Patience(arguments.tries, arguments.pause_s))
            finally:  # Whatever ended the night: what it brought is worth knowing.
                journal.write("\n" + night.summary())
    except (ValueError, OSError) as error:
        sys.stderr.write(f"overnight: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
