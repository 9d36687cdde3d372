"""A night: `dvc repro -k`, run again while that may help."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

from coconut.files import amount, digest_file, explain
from coconut.pipeline.branches import Branches
from coconut.pipeline.dvc_file import read_pipeline
from coconut.pipeline.dvc_lock import describe_holder, repair
from coconut.pipeline.journal import Journal
from coconut.pipeline.record import keep_copy_or_say
from coconut.pipeline.repro import gpus_of
from coconut.pipeline.repro_log import Outcome, ReproLog, describe_exit, in_our_words
from coconut.pipeline.resume import resume_dir
from coconut.pipeline.signals import GRACE_S, die_with_parent
from coconut.pipeline.states import last_update
from coconut.pipeline.status import stage_rows, with_ancestors

LONGEST_PAUSE_S = 600.0
_FULL_BYTES = 1_000_000
"""A disk with less room than this is full: not even DVC's own records fit."""


@dataclass(frozen=True)
class Patience:
    """When to try again."""

    num_tries: int
    """Tries in a row that bring no progress. Not counted are those that failed of what waiting may cure."""
    pause_s: float
    """Before the second try; doubled while tries bring no progress, up to `LONGEST_PAUSE_S`."""


@dataclass(frozen=True)
class Try:
    """The outcome of one `dvc repro -k`."""

    exit_code: int
    errors: dict[str, str] = field(default_factory=dict)
    """What failed and would fail again; empty if there is hope."""
    waits_for: str = ""
    """What waiting may cure: a full disk, a lock that a living process holds."""


class Night:
    """Runs `dvc repro -k` until it succeeds, or until there is no sense in trying again."""

    def __init__(self, root: Path, targets: Sequence[str], journal: Journal, num_jobs: int = 1) -> None:
        self.root = root
        self.targets = targets
        self.journal = journal
        self.num_jobs = num_jobs
        self.num_tries = 0
        self.outcomes = {name: Outcome() for name in read_pipeline(root)}
        self.stopped_by: signal.Signals | None = None
        self._child: subprocess.Popen[str] | None = None
        self._branches: Branches | None = None
        self._started = time.monotonic()

    def run(self, patience: Patience) -> int:
        """Run to the end of the night.

        Returns:
            0 when everything is up to date, 1 when something failed, 128 + the signal that ended it.
        """
        tries_left, pause_s = patience.num_tries, patience.pause_s
        last = Try(0)
        while True:
            before, errors_before = self._progress(), last.errors
            last = self._try_once()
            if self.stopped_by or (last.exit_code == 0 and not self._is_to_ask_again(before)):
                break
            if last.exit_code == 0:
                continue
            if self._progress() != before:
                tries_left, pause_s = patience.num_tries, patience.pause_s
            elif not last.waits_for:
                tries_left -= 1
                if end := self._reason_to_end(patience, tries_left, last.errors, errors_before):
                    self.journal.say(end)
                    break
            what = f"waiting, for this may pass: {last.waits_for}; " if last.waits_for else ""
            self.journal.say(f"{what}trying again in {pause_s:.0f} s")
            self._sleep(pause_s)
            if self.stopped_by:
                break
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return 0 if last.exit_code == 0 else 128 + self.stopped_by if self.stopped_by else 1

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal: have the stage save and end; the second SIGINT, or the alarm, ends it at once."""
        is_urgent = number == signal.SIGALRM or (self.stopped_by is not None and number == signal.SIGINT)
        if self.stopped_by is None:
            self.stopped_by = signal.Signals(number)
            signal.alarm(GRACE_S + 2)  # The stage's own alarm comes first.
        self._signal_group(signal.SIGKILL if is_urgent else signal.SIGTERM)

    def write_report(self) -> None:
        """Have a page made of what there is: the stage `report` does not run after a failure.

        After a signal the alarm that `stop` has set ends it in time.
        """
        if self._run_child([sys.executable, "-m", "coconut", "report"], self.journal.write, outlives_stop=True):
            self.journal.say("no page was written; `coconut report` says why")

    def summary(self) -> str:
        """Lay out what happened as a table."""
        duration = timedelta(seconds=round(time.monotonic() - self._started))
        width = max(len(name) for name in self.outcomes)
        lines = [f"Summary: {duration}, {self.num_tries} {'try' if self.num_tries == 1 else 'tries'}", ""]
        for name, outcome in self.outcomes.items():
            took = str(timedelta(seconds=round(outcome.seconds))) if outcome.seconds else ""
            lines.append(f"{name:<{width}}  {outcome.result:<9}  {took:>8}  {outcome.reason}".rstrip())
        return "\n".join([*lines, "", f"Everything `dvc repro` and the stages said: {self.journal.path}"])

    @staticmethod
    def _reason_to_end(
        patience: Patience, tries_left: int, errors: dict[str, str], errors_before: dict[str, str]
    ) -> str:
        """Say why a try that brought no progress was the last one; nothing if it was not."""
        if errors and errors == errors_before:
            return "the same errors as before, and nothing else to do: no further try"
        return "" if tries_left > 0 else f"{patience.num_tries} tries in a row brought no progress: no further try"

    def _is_to_ask_again(self, before: object) -> bool:
        """Say whether something is not up to date although dvc ended well: files were changed while it ran.

        dvc has the last word: where it found nothing to do, it is not asked again.
        """
        if self._progress() == before:
            return False
        try:
            stages = read_pipeline(self.root)
            wanted = with_ancestors(self.targets or list(stages), stages)
            left = [row.stage for row in stage_rows(self.root) if row.stage in wanted and row.state != "done"]
        except (ValueError, OSError) as error:
            self.journal.say(f"dvc ended well, but {explain(error)}: asking it again")
            return True
        if left:
            self.journal.say(f"dvc ended well, but these are not up to date: {', '.join(left)}: asking it again")
        return bool(left)

    def _try_once(self) -> Try:
        self._repair()
        self.num_tries += 1
        # While a stage's command runs, dvc holds no repository lock; if we took it then, that dvc could
        # not get it back after the command and would fail.
        if holder := describe_holder(self.root):
            return Try(1, waits_for=holder)
        log = ReproLog(self.outcomes, self.root)
        exit_code = self._repro(log)
        log.close(exit_code, stopped_by=self.stopped_by)
        self.outcomes = {name: outcome.then(log.outcomes[name]) for name, outcome in self.outcomes.items()}
        if exit_code < 0:
            self.journal.say(f"dvc {describe_exit(exit_code)}")
        free = shutil.disk_usage(self.root).free
        is_full = f"only {amount(free)} are free on the disk" if free < _FULL_BYTES else ""
        return Try(exit_code, log.own_errors(), log.what_can_pass() or is_full)

    def _repair(self) -> None:
        try:
            for sentence in repair(self.root):
                self.journal.say(sentence)
        except OSError as error:
            self.journal.say(
                f"{explain(error)}: what a killed dvc may have left is not repaired; dvc may refuse to run"
            )

    def _keep_copy(self) -> None:
        keep_copy_or_say(self.root, self.journal.say)

    def _repro(self, log: ReproLog) -> int:
        def hear(line: str) -> None:
            if "you can manually remove" in line and (holder := describe_holder(self.root)):
                line = f"({holder}: its lock must stay, and the night waits for it)"
            if (said := in_our_words(line)) or not line:
                self.journal.write(said)
            if log.read(line):
                self._keep_copy()

        if self.num_jobs > 1:
            return self._run_branches(log)
        return self._run_child([sys.executable, "-m", "dvc", "repro", "--keep-going", *self.targets], hear)

    def _run_branches(self, log: ReproLog) -> int:
        self._branches = branches = Branches(
            self.root,
            self.num_jobs,
            self.journal.write,
            self.targets,
            keeps_going=True,
            gpus=gpus_of(self.root),
            on_stage=self._keep_copy,
        )
        branches.stopped_by = self.stopped_by
        exit_code = branches.run()
        log.take_in(branches.log)
        self._branches = None
        return exit_code

    def _run_child(self, command: list[str], hear: Callable[[str], None], *, outlives_stop: bool = False) -> int:
        """Run a command in a process group of its own, which gets our signals; return its exit code."""
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
        ) as child:
            self._child = child
            if self.stopped_by and not outlives_stop:  # The signal came before there was anybody to pass it on to.
                self._signal_group(signal.SIGTERM)
            assert child.stdout is not None
            # Ends when the last process that holds the pipe has ended: a trainer may outlive dvc while it saves.
            for line in child.stdout:
                hear(line.rstrip("\n"))
        self._signal_group(signal.SIGKILL)
        self._child = None
        return child.returncode

    def _signal_group(self, number: signal.Signals) -> None:
        if self._branches is not None:
            self._branches.send(number, self.stopped_by or number)
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)

    def _progress(self) -> object:
        """Something that differs after a try that finished a stage, or brought its training forward."""
        finished = ""
        with contextlib.suppress(OSError):  # There is none before the first stage has ended.
            finished = digest_file(self.root / "dvc.lock")
        folders = resume_dir(self.root).glob("*")
        return finished, {folder.name: last_update(folder) for folder in folders}

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stopped_by:
            time.sleep(0.1)
