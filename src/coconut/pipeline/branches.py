"""Branches of the pipeline side by side: several `dvc repro --single-item`, each with stages that wait for no other.

A curriculum is a tree. What its branches share is brought up to date first; then every free place takes the stage from
which the most others hang, in a `dvc` of its own. DVC's own locks keep them apart where they write records, and are
waited for. At the end a plain `dvc repro` does what is left, the report mostly, and has the last word on what is up to
date: what is decided here saves time and cannot change a result.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coconut.pipeline.dvc_file import Stage, read_pipeline
from coconut.pipeline.fork_client import OWNER
from coconut.pipeline.repro_log import Outcome, ReproLog
from coconut.pipeline.signals import die_with_parent
from coconut.pipeline.status import parents_of, stage_rows, with_ancestors

Hear = Callable[[str], None]
_RETRY_S = 1.0
_DONE = ("ran", "resumed", "restored", "unchanged")
_MOST_RETRIES = 60
"""Of a bundle that failed of a lock: DVC holds them for seconds."""


class Plan:
    """Which stages are left, which are ready, and which go together into one process."""

    def __init__(self, stages: Mapping[str, Stage], left: Iterable[str]) -> None:
        self._parents = {name: parents_of(stage, stages) for name, stage in stages.items()}
        self._order = {name: place for place, name in enumerate(stages)}
        self.left = set(left)
        """Neither done nor given out."""
        self.running: set[str] = set()
        self.blocked: set[str] = set()
        """Failed, or below one that failed."""

    def ready(self) -> list[str]:
        """Return the stages that wait for nothing, those first from which the longest chains hang."""
        found = self._ready_among(self.left)
        return sorted(found, key=lambda name: (-self._height(name), self._order[name]))

    def has_branches(self) -> bool:
        """Say whether, sooner or later, two stages will wait for nothing at once."""
        left = set(self.left)
        while ready := self._ready_among(left):
            if len(ready) > 1:
                return True
            left -= set(ready)
        return False

    def _ready_among(self, left: set[str]) -> list[str]:
        open_ = left | self.running | self.blocked
        return [name for name in left if not self._parents[name] & open_]

    def next_bundle(self, num_places: int) -> list[str]:
        """Take the next stages for one process out of those that are left; empty if none is ready.

        A chain stays together. Where it forks, stages that nothing waits for but a join go along only if the other
        places have enough to do without them.

        Args:
            num_places: processes at once.
        """
        ready = self.ready()
        if not ready:
            return []
        bundle, others = [ready[0]], len(ready) - 1
        while True:
            freed = self._freed_by(bundle)
            tails = [name for name in freed if not self._frees_more(name, bundle)]
            if len(freed) == 1:
                bundle += freed
            elif tails and others >= num_places - 1:
                bundle += tails
            else:
                break
        self.left -= set(bundle)
        self.running |= set(bundle)
        return bundle

    def take_back(self, names: Iterable[str]) -> None:
        """Put stages back that were given out and did not run."""
        self.running -= set(names)
        self.left |= set(names) - self.blocked

    def finish(self, names: Iterable[str]) -> None:
        """Count stages as up to date."""
        self.running -= set(names)

    def fail(self, name: str) -> list[str]:
        """Count a stage as failed; return the stages that are left out because of it, in order."""
        self.running.discard(name)
        self.blocked.add(name)
        hit = {name}
        while more := {one for one in self._parents if self._parents[one] & hit} - hit:
            hit |= more
        self.left -= hit
        self.blocked |= hit
        return sorted(hit - {name}, key=self._order.__getitem__)

    def _freed_by(self, bundle: Sequence[str]) -> list[str]:
        """Return the stages that wait for nothing once the bundle is done, without those that do not wait for it."""
        open_ = (self.left | self.running | self.blocked) - set(bundle)
        return [
            name
            for name in self._order
            if name in self.left and name not in bundle
            and self._parents[name] & set(bundle) and not self._parents[name] & open_
        ]  # fmt: skip

    def _frees_more(self, name: str, bundle: Sequence[str]) -> bool:
        return any(name in self._parents[one] for one in self._freed_by([*bundle, name]))

    def _height(self, name: str) -> int:
        children = [one for one in self.left if name in self._parents[one]]
        return 1 + max((self._height(one) for one in children), default=0)


@dataclass
class _Child:
    process: "subprocess.Popen[str]"
    bundle: list[str]
    log: ReproLog
    place: int


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
        plan = Plan(stages, [name for name in stages if name in wanted and states.get(name) != "done"])
        exit_code = self._run_branches(plan) if self.num_places > 1 else 0
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

    def _run_branches(self, plan: Plan) -> int:
        exit_code = 0
        while True:
            may_start = not self.stopped_by and (exit_code == 0 or self.keeps_going)
            # One chain alone is left to the plain `dvc repro` at the end.
            has_work = plan.has_branches() or bool(plan.ready() and (self._children or exit_code))
            if may_start and has_work:
                self._fill(plan)
            elif not self._children:
                return exit_code
            exit_code = self._hear_once(plan) or exit_code

    def _fill(self, plan: Plan) -> None:
        """Start a process on every free place for which there is something to do."""
        for place in sorted(set(range(self.num_places)) - {child.place for child in self._children}):
            if time.monotonic() >= self._not_before and (bundle := plan.next_bundle(self.num_places)):
                self._children.append(self._start(["--single-item", *bundle], bundle, place))

    def _hear_once(self, plan: Plan | None) -> int | None:
        """Take in one line, if one comes soon; return the exit code of a process that has ended."""
        try:
            child, line = self._lines.get(timeout=0.2)
        except queue.Empty:
            return None
        if line is None:
            return self._end(child, plan)
        self.hear(line)
        if child.log.read(line):
            self.on_stage()
        return None

    def _start(self, arguments: Sequence[str], bundle: list[str], place: int) -> _Child:
        # Stages run `python`: it must be this one. Start processes from the main thread only: the kernel ends a
        # child with the thread that started it.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, OWNER: str(os.getpid())}
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

    def _end(self, child: _Child, plan: Plan | None) -> int:
        """Take in what a process did; return its exit code, 0 where it is to be tried again."""
        exit_code = child.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.log.close(exit_code, stopped_by=self.stopped_by)
        self._children.remove(child)
        if plan is None:
            self.log.take_in(child.log)
            return exit_code
        done = [name for name in child.bundle if child.log.outcomes[name].result in _DONE]
        plan.finish(done)
        rest = [name for name in child.bundle if name not in done]
        if exit_code != 0 and rest and self._is_to_retry(child.log, rest[0]):
            plan.take_back(rest)
            return 0
        self.log.take_in(child.log)
        for name in child.log.failures() or (rest[:1] if exit_code != 0 else []):
            for other in plan.fail(name):
                self.log.outcomes[other] = Outcome("not run", f"{name} failed")
        plan.take_back(set(rest) - plan.blocked)
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
