"""What one `dvc repro` did with each pipeline stage.

What a stage did itself stands in its events. DVC's lines are read for what DVC alone knows: which stage it runs now,
which it skips or restores, and what it complains of before and after a stage's command.
"""

import re
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from coconut.files import explain
from coconut.pipeline.events import Run, last_run

_LINE = re.compile(
    r"Running stage '(?P<running>[^']+)':"
    r"|(?:Stage )?'(?P<unchanged>[^']+)' didn't change, skipping"
    r"|Stage '(?P<restored>[^']+)' is cached - skipping run, checking out outputs"
    r"|(?:WARNING|ERROR): failed to run: .*, exited with (?P<exit>-?\d+)"
    r"|WARNING: Stages? (?P<skipped>.*) will be skipped due to this failure"
    r"|ERROR: failed to reproduce(?: stages:)? (?P<blamed>.*)"
    r"|WARNING: (?P<warning>.*)"
    r"|ERROR: (?P<error>.*)"
)
_SYSTEM_ERROR = re.compile(r"(?:unexpected error - )?\[Errno (\d+)\] ([^:]*)(?:: '([^']*)')?")
_LINKED = (
    "; a folder above it is a link to elsewhere, and DVC works on no output there: let the whole project lie on the"
    " other disk, or only DVC's cache (`dvc cache dir --local FOLDER`)"
)
_QUOTED = re.compile(r"'([^']+)'")
_CAN_PASS = re.compile(
    r"Unable to acquire lock|is busy, it is being blocked"
    r"|No space left on device|Disk quota exceeded|database or disk is full"
)
"""What DVC itself complains of, and what time, or somebody who makes room, can cure."""
_DONE = ("ran", "resumed", "restored")


@dataclass
class Outcome:
    """The outcome of one or more tries for one stage."""

    result: str = "not run"
    """ran, resumed, unchanged, restored (from DVC's run cache), failed, stopped or not run."""
    reason: str = ""
    seconds: float = 0.0
    exit_code: int = 0
    can_pass: bool = False
    """Whether it failed of something that waiting may cure."""

    @property
    def is_own_error(self) -> bool:
        """Say whether the stage failed by itself, not by a signal."""
        return self.result == "failed" and 0 < self.exit_code < 128

    @property
    def would_come_again(self) -> bool:
        """Say whether the same run would fail again, however long one waits."""
        return self.is_own_error and not self.can_pass

    def then(self, later: "Outcome") -> "Outcome":
        """Join with the outcome of a later try."""
        is_news = later.result != "unchanged" or self.result not in _DONE
        if later == Outcome() and self.result != "not run":
            is_news = False  # The later try never came to this stage.
        last = later if is_news else self
        return Outcome(last.result, last.reason, self.seconds + later.seconds, last.exit_code, last.can_pass)


class ReproLog:
    """Reads one `dvc repro`, line by line. Only names of our stages count: a model may print anything."""

    def __init__(self, stages: Iterable[str], root: Path) -> None:
        self.outcomes = {name: Outcome() for name in stages}
        self.dvc_error = ""
        """What `dvc` itself complained of last, stages aside."""
        self._root = root
        self._runs_before = {name: last_run(name, root) for name in self.outcomes}
        self._warning = ""
        self._running: str | None = None
        self._started = 0.0
        self._last_words = ""

    def read(self, line: str) -> bool:
        """Take in one line of output; say whether it is the start of a stage, where `dvc.lock` is at rest."""
        line = in_our_words(line)
        match = _LINE.fullmatch(line)
        kind = match.lastgroup if match else None
        text = match[kind] if match and kind else line.strip()
        if kind in ("running", "unchanged", "restored"):
            return text in self.outcomes and self._go_on(kind, text)
        if kind == "exit":
            self._fail(int(text))
        elif kind == "skipped":
            self._skip(_QUOTED.findall(text))
        elif kind == "blamed":
            self._blame(text)
        elif kind == "warning":
            self._warning = text
        elif kind == "error":
            self.dvc_error = text
        elif text and not text.startswith("> "):
            self._last_words = text
        return False

    def close(self, exit_code: int, *, stopped_by: signal.Signals | None = None) -> None:
        """`dvc` has ended, by itself or under its running stage."""
        if exit_code >= 0 and stopped_by is None:
            self._end_well()
        elif self._running is not None:
            reason = f"by {stopped_by.name}" if stopped_by else f"dvc {describe_exit(exit_code)}"
            self._end(Outcome("stopped", reason))
        for outcome in self.outcomes.values():
            if stopped_by and outcome.result == "failed" and not outcome.is_own_error:
                outcome.result, outcome.reason = "stopped", f"by {stopped_by.name}"

    def forget(self, names: Iterable[str]) -> None:
        """Take stages as if this `dvc` had not tried them, and its complaint as if it had made none."""
        self.outcomes |= {name: Outcome() for name in names}
        self.dvc_error = ""

    def take_in(self, later: "ReproLog") -> None:
        """Add what another `dvc` did with some of the stages."""
        for name, outcome in later.outcomes.items():
            self.outcomes[name] = self.outcomes[name].then(outcome)
        self.dvc_error = later.dvc_error or self.dvc_error

    def failures(self) -> dict[str, Outcome]:
        """The stages that failed."""
        return {name: outcome for name, outcome in self.outcomes.items() if outcome.result == "failed"}

    def what_can_pass(self) -> str:
        """The first complaint that waiting may cure; nothing if there is none."""
        reasons = [outcome.reason for outcome in self.failures().values() if outcome.can_pass]
        return next(iter(reasons), self.dvc_error if _CAN_PASS.search(self.dvc_error) else "")

    def own_errors(self) -> dict[str, str]:
        """Return what failed and why, if all of it would fail again; empty if any of it may pass next time."""
        failures = self.failures()
        if self.what_can_pass() or not all(outcome.would_come_again for outcome in failures.values()):
            return {}
        errors = {name: outcome.reason for name, outcome in failures.items()}
        return errors | ({"dvc": self.dvc_error} if self.dvc_error else {})

    def _go_on(self, kind: str, stage: str) -> bool:
        """`dvc` has come to a stage, so that the one before it has ended well."""
        self._end_well()
        if kind == "running":
            self._running, self._started, self._last_words = stage, time.monotonic(), ""
            return True
        self.outcomes[stage] = Outcome(kind, "from DVC's run cache" if kind == "restored" else "")
        return False

    def _run(self) -> Run | None:
        """The events of the stage that runs now; None if it left none, as one that is killed while it starts."""
        assert self._running is not None
        run = last_run(self._running, self._root)
        before = self._runs_before[self._running]
        is_new = run is not None and (before is None or (run.pid, run.begun_at) != (before.pid, before.begun_at))
        return run if is_new else None

    def _fail(self, exit_code: int) -> None:
        if self._running is None:
            return
        run = self._run()
        if run is not None and run.end == "failed":
            reason, can_pass = run.message, run.can_pass
        else:
            is_own = 0 < exit_code < 128
            reason, can_pass = (is_own and self._last_words) or describe_exit(exit_code), False
        self._end(Outcome("failed", reason, exit_code=exit_code, can_pass=can_pass))

    def _skip(self, names: Iterable[str]) -> None:
        failed = ", ".join(self.failures())
        for name in names:
            if name in self.outcomes:
                self.outcomes[name] = Outcome("not run", f"{failed} failed")

    def _blame(self, text: str) -> None:
        """Note the stages that failed before or after their command. Why stands behind their names, or in a warning."""
        self._end_well()
        reason = text.partition("': ")[2] or self._warning
        can_pass = bool(_CAN_PASS.search(reason))
        for name in _QUOTED.findall(text):
            if name in self.outcomes and self.outcomes[name].result != "failed":
                seconds = self.outcomes[name].seconds
                self.outcomes[name] = Outcome("failed", reason, seconds, 0 if can_pass else 1, can_pass)

    def _end_well(self) -> None:
        if self._running is not None:
            run = self._run()
            resumed_at = None if run is None else run.resumed_at
            self._end(Outcome("ran") if resumed_at is None else Outcome("resumed", f"at update {resumed_at}"))

    def _end(self, outcome: Outcome) -> None:
        if self._running is not None:
            outcome.seconds = time.monotonic() - self._started
            self.outcomes[self._running] = outcome
            self._running = None


def in_our_words(line: str) -> str:
    """Add the cure to what DVC complains of, and drop its invitation to its chat.

    >>> in_our_words("ERROR: unexpected error - [Errno 30] Read-only file system: '/x/.dvc/tmp/lock'")
    'ERROR: /x/.dvc/tmp/lock: Read-only file system; its disk is mounted read-only: mount it writable, or work in a folder on another disk'
    >>> in_our_words("Having any troubles? Hit us up at https://dvc.org/support"), in_our_words("epoch 1")
    ('', 'epoch 1')
    """  # noqa: E501
    if line.startswith("Having any troubles?"):
        return ""
    if not line.startswith("ERROR: "):
        return line
    if match := _SYSTEM_ERROR.search(line):
        line = line[: match.start()] + explain(OSError(int(match[1]), match[2], match[3])) + line[match.end() :]
    return line + (_LINKED if "is outside of git repository" in line else "")


def describe_exit(exit_code: int) -> str:
    """Say what an exit code means.

    >>> describe_exit(-9), describe_exit(143), describe_exit(2)
    ('ended by SIGKILL', 'ended by SIGTERM', 'exit code 2')
    """
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number in {one.value for one in signal.Signals}:
        return f"ended by {signal.Signals(number).name}"
    return f"exit code {exit_code}"
