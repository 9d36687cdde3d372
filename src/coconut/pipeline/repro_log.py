"""What the output of `dvc repro` says of each pipeline stage."""

import re
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

_STARTED = re.compile(r"Running stage '([^']+)':")
_UNCHANGED = re.compile(r"(?:Stage )?'([^']+)' didn't change, skipping")
_RESTORED = re.compile(r"Stage '([^']+)' is cached - skipping run, checking out outputs")
_FAILED = re.compile(r"(?:WARNING|ERROR): failed to run: .*, exited with (-?\d+)")
_SKIPPED = re.compile(r"WARNING: Stages? (.*) will be skipped due to this failure")
_NOT_REPRODUCED = re.compile(r"ERROR: failed to reproduce(?: stages:)? (.*)")
_DVC_WARNING = re.compile(r"WARNING: (.*)")
_DVC_ERROR = re.compile(r"ERROR: (.*)")
_BUSY = re.compile(r".*(Unable to acquire lock|is busy, it is being blocked).*")
# What time, or somebody who makes room, can cure; the words are those of the system, of DVC, and of
# `ResumeStore` and `check_free_space`.
_MAY_PASS = re.compile(
    r"Unable to acquire lock|is busy, it is being blocked|in use by another trainer for the last"
    r"|No space left on device|Disk quota exceeded|MB free on its disk|MB free\)"
)
_STAGE_ERROR = re.compile(r"[0-9: ]+ \| ERROR +\| (.*)")
_RESUMED = re.compile(r"[0-9: ]+ \| INFO +\| [^ ]+: resumed at update (\d+) .*")
_DONE = ("ran", "resumed", "restored")


@dataclass
class Outcome:
    """What one or more tries brought for one stage."""

    result: str = "not run"
    """ran, resumed, unchanged, restored (from DVC's run cache), failed, stopped or not run."""
    reason: str = ""
    seconds: float = 0.0
    exit_code: int = 0

    @property
    def is_own_error(self) -> bool:
        """Whether the stage failed by itself, not by a signal."""
        return self.result == "failed" and 0 < self.exit_code < 128

    @property
    def would_come_again(self) -> bool:
        """Whether the same run would fail again, however long one waits."""
        return self.is_own_error and not _MAY_PASS.search(self.reason)

    def then(self, later: "Outcome") -> "Outcome":
        """Join with the outcome of a later try."""
        is_news = later.result != "unchanged" or self.result not in _DONE
        if later == Outcome() and self.result != "not run":
            is_news = False  # The later try never came to this stage.
        last = later if is_news else self
        return Outcome(last.result, last.reason, self.seconds + later.seconds, last.exit_code)


class ReproLog:
    """Reads one `dvc repro`, line by line. Only names of our stages count: a model may print anything."""

    def __init__(self, stages: Iterable[str]) -> None:
        self.outcomes = {name: Outcome() for name in stages}
        self.dvc_error = ""
        """What `dvc` itself complained of last, stages aside."""
        self._warning = ""
        self._running: str | None = None
        self._started = 0.0
        self._resumed_at: str | None = None
        self._last_words = ""

    def read(self, line: str) -> bool:
        """Take in one line of output; say whether it is the start of a stage, where `dvc.lock` is at rest."""
        if name := self._named(_STARTED, line):
            self._end_well()
            self._running, self._started = name, time.monotonic()
            self._resumed_at, self._last_words = None, ""
            return True
        if name := self._named(_UNCHANGED, line):
            self._end_well()
            self.outcomes[name] = Outcome("unchanged")
        elif name := self._named(_RESTORED, line):
            self._end_well()
            self.outcomes[name] = Outcome("restored", "from DVC's run cache")
        elif match := _FAILED.fullmatch(line):
            self._fail(int(match[1]))
        elif match := _SKIPPED.fullmatch(line):
            self._skip(re.findall(r"'([^']+)'", match[1]))
        elif match := _NOT_REPRODUCED.fullmatch(line):
            self._blame(re.findall(r"'([^']+)'", match[1]))
        elif match := _DVC_WARNING.fullmatch(line):
            self._warning = match[1]
        elif match := _DVC_ERROR.fullmatch(line):
            self.dvc_error = match[1]
        else:
            self._hear(line)
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

    def failures(self) -> dict[str, Outcome]:
        """The stages that failed."""
        return {name: outcome for name, outcome in self.outcomes.items() if outcome.result == "failed"}

    def own_errors(self) -> dict[str, str]:
        """What failed and why, if all of it would fail again; empty if any of it may pass next time."""
        failures = self.failures()
        if _MAY_PASS.search(self.dvc_error) or not all(outcome.would_come_again for outcome in failures.values()):
            return {}
        errors = {name: outcome.reason for name, outcome in failures.items()}
        return errors | ({"dvc": self.dvc_error} if self.dvc_error else {})

    def _named(self, pattern: re.Pattern[str], line: str) -> str | None:
        match = pattern.fullmatch(line)
        return match[1] if match and match[1] in self.outcomes else None

    def _hear(self, line: str) -> None:
        if match := _RESUMED.fullmatch(line):
            self._resumed_at = match[1]
        elif match := _STAGE_ERROR.fullmatch(line):
            self._last_words = match[1]
        elif line.strip() and not line.startswith("> "):
            self._last_words = line.strip()

    def _fail(self, exit_code: int) -> None:
        is_own = 0 < exit_code < 128
        reason = self._last_words if is_own and self._last_words else describe_exit(exit_code)
        self._end(Outcome("failed", reason, exit_code=exit_code))

    def _skip(self, names: Iterable[str]) -> None:
        failed = ", ".join(self.failures())
        for name in names:
            if name in self.outcomes:
                self.outcomes[name] = Outcome("not run", f"{failed} failed")

    def _blame(self, names: Iterable[str]) -> None:
        """Note the stages that failed before or after their command: dvc says why in a warning."""
        self._end_well()
        for name in names:
            if name in self.outcomes and self.outcomes[name].result != "failed":
                seconds, exit_code = self.outcomes[name].seconds, 0 if _BUSY.fullmatch(self._warning) else 1
                self.outcomes[name] = Outcome("failed", self._warning, seconds, exit_code)

    def _end_well(self) -> None:
        if self._resumed_at is not None:
            self._end(Outcome("resumed", f"at update {self._resumed_at}"))
        else:
            self._end(Outcome("ran"))

    def _end(self, outcome: Outcome) -> None:
        if self._running is not None:
            outcome.seconds = time.monotonic() - self._started
            self.outcomes[self._running] = outcome
            self._running = None


def describe_exit(exit_code: int) -> str:
    """Say what an exit code means.

    >>> describe_exit(-9), describe_exit(143), describe_exit(2)
    ('ended by SIGKILL', 'ended by SIGTERM', 'exit code 2')
    """
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number in {one.value for one in signal.Signals}:
        return f"ended by {signal.Signals(number).name}"
    return f"exit code {exit_code}"
