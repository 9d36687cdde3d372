"""Branches of the pipeline side by side: several `dvc repro --single-item`, each with stages that wait for no other.

Every free place takes what `schedule` gives it, in a `dvc` of its own. DVC's own locks keep them apart where they write
records, and are waited for. At the end a plain `dvc repro` does what is left, the report mostly, and has the last word
on what is up to date: what is decided here saves time and cannot change a result.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coconut.pipeline.dvc_file import read_pipeline
from coconut.pipeline.repro_log import Outcome, ReproLog, in_our_words
from coconut.pipeline.schedule import Schedule
from coconut.pipeline.signals import die_with_parent
from coconut.pipeline.status import stage_rows, with_ancestors

Hear = Callable[[str], None]
_RETRY_S = 1.0
_DONE = ("ran", "resumed", "restored", "unchanged")
_MOST_RETRIES = 60
"""Of a bundle that failed of a lock: DVC holds them for seconds."""


@dataclass
class _Child:
    process: "subprocess.Popen[str]"
    bundle: list[str]
    log: ReproLog
    place: int

    def done(self) -> list[str]:
        """Return the stages that are up to date by now; what waits for them need not wait for the others."""
        return [name for name in self.bundle if self.log.outcomes[name].result in _DONE]


@dataclass
class Branches:
    """Runs what is not up to date, several stages at once."""

    root: Path
    num_places: int
    hear: Hear
    """Told every line that is said."""
    targets: Sequence[str] = ()
    keeps_going: bool = False
    """Whether stages that do not depend on a failed one still run."""
    gpus: Sequence[str] = ()
    """One for each place, if any."""
    on_stage: Callable[[], None] = lambda: None
    """Called when a stage starts."""
    stopped_by: signal.Signals | None = None

    def __post_init__(self) -> None:
        self.log = ReproLog(read_pipeline(self.root), self.root)
        """What became of every stage."""
        self._children: list[_Child] = []
        self._lines: queue.Queue[tuple[_Child, str | None]] = queue.Queue()
        self._retries: dict[str, int] = {}
        self._not_before = 0.0

    def run(self) -> int:
        """Run the branches, then the plain `dvc repro`.

        Returns:
            0, or the exit code of a `dvc` that failed.

        Raises:
            ValueError: `dvc.yaml` or `params.yaml` holds a mistake, or a target is no stage.
        """
        stages = read_pipeline(self.root)
        wanted = with_ancestors(self.targets or list(stages), stages)
        states = {row.stage: row.state for row in stage_rows(self.root)}
        schedule = Schedule(stages, [name for name in stages if name in wanted and states.get(name) != "done"])
        exit_code = self._run_branches(schedule) if self.num_places > 1 else 0
        # After a failure `dvc repro` would try the same stage again.
        return exit_code or (1 if self.stopped_by else self._run_rest())

    def send(self, number: signal.Signals, cause: signal.Signals) -> None:
        """Send every process a signal; nothing new is started from then on.

        Args:
            cause: the signal that this process got.
        """
        self.stopped_by = self.stopped_by or cause
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, number)

    def _run_branches(self, schedule: Schedule) -> int:
        exit_code = 0
        while True:
            may_start = not self.stopped_by and (exit_code == 0 or self.keeps_going)
            # One chain alone is left to the plain `dvc repro` at the end.
            has_work = schedule.has_branches() or bool(schedule.ready() and (self._children or exit_code))
            if may_start and has_work:
                self._fill(schedule)
            elif not self._children:
                return exit_code
            exit_code = self._hear_once(schedule) or exit_code

    def _fill(self, schedule: Schedule) -> None:
        """Start a process on every free place for which there is something to do."""
        for place in sorted(set(range(self.num_places)) - {child.place for child in self._children}):
            if time.monotonic() >= self._not_before and (bundle := schedule.next_bundle(self.num_places)):
                self._children.append(self._start(["--single-item", *bundle], bundle, place))

    def _hear_once(self, schedule: Schedule | None) -> int | None:
        """Take in one line, if one comes soon; return the exit code of a process that has ended."""
        try:
            child, line = self._lines.get(timeout=0.2)
        except queue.Empty:
            return None
        if line is None:
            return self._end(child, schedule)
        if (said := in_our_words(line)) or not line:
            self.hear(said)
        if child.log.read(line):
            self.on_stage()
        if schedule is not None:
            schedule.finish(child.done())
        return None

    def _start(self, arguments: Sequence[str], bundle: list[str], place: int) -> _Child:
        # Stages run `python`: it must be this one. Start processes from the main thread only: the kernel ends a
        # child with the thread that started it.
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *arguments],
            cwd=self.root,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        child = _Child(process, bundle, ReproLog(bundle, self.root), place)
        threading.Thread(target=self._listen, args=(child,), daemon=True).start()
        if self.stopped_by:  # The signal came before there was anybody to pass it on to.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        return child

    def _listen(self, child: _Child) -> None:
        assert child.process.stdout is not None
        # Ends when the last process that holds the pipe has ended: a trainer may outlive dvc while it saves.
        for line in child.process.stdout:
            self._lines.put((child, line.rstrip("\n")))
        self._lines.put((child, None))

    def _end(self, child: _Child, schedule: Schedule | None) -> int:
        """Take in what a process did; return its exit code, 0 where it is to be tried again."""
        exit_code = child.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.log.close(exit_code, stopped_by=self.stopped_by)
        self._children.remove(child)
        if schedule is None:
            self.log.take_in(child.log)
            return exit_code
        done = child.done()
        schedule.finish(done)
        rest = [name for name in child.bundle if name not in done]
        if exit_code != 0 and rest and self._is_to_retry(child.log, rest[0]):
            schedule.take_back(rest)
            child.log.forget(rest)
            self.log.take_in(child.log)
            return 0
        self.log.take_in(child.log)
        for name in child.log.failures() or (rest[:1] if exit_code != 0 else []):
            for other in schedule.fail(name):
                self.log.outcomes[other] = Outcome("not run", f"{name} failed")
        schedule.take_back(set(rest) - schedule.blocked)
        return exit_code

    def _is_to_retry(self, log: ReproLog, first: str) -> bool:
        """Say whether a process ended because another held one of DVC's locks for longer than it waits."""
        reason = log.what_can_pass()
        if self.stopped_by or not ("acquire lock" in reason or "is busy" in reason):
            return False
        self._retries[first] = self._retries.get(first, 0) + 1
        self._not_before = time.monotonic() + _RETRY_S
        return self._retries[first] <= _MOST_RETRIES

    def _run_rest(self) -> int:
        """Run the plain `dvc repro`, which also says what is up to date."""
        stages = list(read_pipeline(self.root))
        arguments = [*(["--keep-going"] if self.keeps_going else []), *self.targets]
        self._children.append(self._start(arguments, stages, 0))
        while (exit_code := self._hear_once(None)) is None:
            pass
        return exit_code
