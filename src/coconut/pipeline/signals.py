"""How a training process ends: with its parent, when asked to, never with a full disk at the last moment.

Importing this module is cheap (no torch), so that a stage can call `die_with_parent` first of all.
"""

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

GRACE_S = 25
"""Time between the request to stop and the end. A preempted machine gives 30 s."""

AGENT = "COCONUT_AGENT"
"""The environment's name for the process that has started the several processes of a stage; see `launch`."""
LOST_RANK = 75
"""The exit code of a process that another one of its stage has left alone: it is not the cause."""
BATCH_TOO_LARGE = 76
"""The exit code of a process whose memory ran out where all of them must begin again."""
_PR_SET_PDEATHSIG = 1
_WATCH_S = 0.5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Preempted(SystemExit):
    """The process was asked to stop; its exit code is the shell's, 128 + the signal's number."""


class Interrupted(BaseException):
    """A signal has asked this process to end, inside of `Stop.interrupting`."""


class Stop:
    """Knows, within `stop_on_signals`, whether a signal has asked this process to end."""

    def __init__(self, grace_s: int) -> None:
        self.signal: signal.Signals | None = None
        self._grace_s = grace_s
        self._interrupts = False
        self._is_polled = False

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a request to stop end this block by `Interrupted`: for what is long and changes nothing.

        Raises:
            Interrupted: at once, if the request came before.
        """
        self._interrupts = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    @contextmanager
    def polled(self) -> Iterator[None]:
        """Let a request to stop end this block at the next `poll`, for what must not end just anywhere."""
        self._is_polled = True
        try:
            yield
        finally:
            self._is_polled = False

    def poll(self) -> None:
        """Raise `Interrupted` within `polled`, if the request has come."""
        if self._is_polled and self.requested:
            raise Interrupted

    def note(self, number: int) -> None:
        """Take the request of a signal: what the handler does."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.signal = signal.Signals(number)
            signal.alarm(self._grace_s)
            if self._interrupts:
                raise Interrupted

    def preempted(self) -> Preempted:
        """Make the exception to raise, once the state is saved: `raise stop.preempted()`.

        Where several processes share a stage, the request may have come to another one of them: SIGTERM stands for it.
        """
        return Preempted(128 + (self.signal or signal.SIGTERM))


@contextmanager
def stop_on_signals(grace_s: int = GRACE_S) -> Iterator[Stop]:
    """Turn SIGTERM, SIGHUP and SIGINT into `stop.requested`, to be polled between updates.

    From the request on the process has `grace_s` seconds, then the kernel ends it: an update or a
    disk that hangs must not outlive the machine's own deadline. A second SIGINT ends it at once.
    A signal that was ignored before (`nohup`) stays ignored.
    """
    stop = Stop(grace_s)

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.note(number)

    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heeded}
    unblock()
    try:
        yield stop
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def unblock() -> None:
    """Let the signals that this project relies on reach this process, and those that it will start.

    A process inherits what is blocked, and some supervisors start theirs with SIGTERM blocked: a trainer
    would outlive its `dvc`, and a preempted machine would take the update since the last save with it.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, signal.SIGALRM))


def die_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends, so that no orphan keeps the GPU.

    Call it first, before the slow imports. Only Linux can do this; elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    unblock()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if _is_orphan():
        raise Preempted(128 + signal.SIGTERM)


def end_forks_at_once() -> None:
    """Have SIGTERM end every fork of this process by itself, from its first moment on, whatever the handler here.

    A pool of processes ends its workers by SIGTERM and waits for them without a limit. Python forgets a signal that
    comes while a fork begins, and swallows what a handler raises in the hooks that a fork runs first: a worker
    that was asked to end then would never end, nor would this process.
    """
    if not hasattr(os, "register_at_fork"):
        return
    masks = threading.local()

    def hold() -> None:
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))

    def let_go() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def begin_fork() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        let_go()

    os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=begin_fork)


def is_worker() -> bool:
    """Say whether this process is one of several that an agent has started for one stage."""
    return os.environ.get(AGENT, "").isdigit() and "LOCAL_RANK" in os.environ


def end_in_any_case() -> None:
    """Start a thread that ends this process `GRACE_S` seconds after a stop signal or the end of its parent.

    For a process that waits for others in a library's own code: Python's handlers, and with them the alarm of
    `stop_on_signals`, do not run there, and a rank that hangs would keep it for ever.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, os.getppid()), daemon=True).start()


def _watch(reader: int, parent: int) -> None:
    deadline: float | None = None
    while deadline is None or time.monotonic() < deadline:
        is_told = bool(select.select([reader], [], [], _WATCH_S)[0]) and any(
            number in STOP_SIGNALS for number in os.read(reader, 1024)
        )
        if deadline is None and (is_told or os.getppid() != parent):
            deadline = time.monotonic() + GRACE_S
    os._exit(128 + signal.SIGTERM)


def _is_orphan() -> bool:
    """Say whether the `dvc` that started this process ended before `die_with_parent` was called.

    Orphans go to a process that reaps them: it does not run dvc, and it is process 1 or belongs to
    another session, which no shell between `dvc` and its stage does.
    """
    parent = os.getppid()
    if is_worker():
        return parent != int(os.environ[AGENT])
    if "DVC_STAGE" not in os.environ:
        return False
    try:
        runs_dvc = b"dvc" in Path(f"/proc/{parent}/cmdline").read_bytes()
        is_reaper = parent == 1 or os.getsid(parent) != os.getsid(0)
    except OSError:
        return False  # It ended just now, so that its signal is on its way; or /proc is not ours to read.
    return is_reaper and not runs_dvc
