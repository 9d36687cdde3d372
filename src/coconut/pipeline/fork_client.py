"""A stage that has a fork of the run's server do its work; see `fork_server`.

Importing this module is cheap (no torch).
"""

import json
import os
import select
import signal
import socket
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from coconut.pipeline.signals import STOP_SIGNALS

OWNER = "COCONUT_RUN_PID"
"""The environment's name for the process whose end is a server's end, where that is not the stage's own `dvc`."""
FORK = "COCONUT_FORK"
"""The environment's name for a fork: its number, so that nobody takes what it inherits for itself."""
PREFIX = f"fork-server-{socket.gethostname()}-"
"""Of the names of this host's sockets: others may share the folder."""
PASSED_ON = (*STOP_SIGNALS, signal.SIGTSTP)
_DIR = Path(".dvc/tmp")
"""Relative: the address of a socket must be shorter than many a path."""
_ANSWER_S = 30.0
"""How long a server may take to answer: it may have to end its imports first."""


def hand_over() -> None:
    """Let the server of this run do what this process was started for, and end as its fork ends.

    Returns, having done nothing, where there is no server.
    """
    address = address_of(owner())
    if is_fork() or not address.exists():
        return
    with ExitStack() as opened:
        try:
            server = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            server.settimeout(_ANSWER_S)
            server.connect(str(address))
            lifeline, our_end = os.pipe()
            opened.callback(os.close, our_end)
            opened.callback(os.close, lifeline)
            socket.send_fds(server, [_describe_this()], [0, 1, 2, lifeline])
            _, (fork,), _, _ = socket.recv_fds(server, 16, 1, socket.MSG_CMSG_CLOEXEC)
        except (OSError, ValueError):
            return
        _pass_signals_on_to(fork)
        server.settimeout(None)
        status = b""
        with suppress(ConnectionError):
            status = server.recv(16)
        select.select([fork], [], [])  # Where the server was killed, its fork saves its state first.
    _end_like(int(status) if status else 1 << 8)


def is_fork() -> bool:
    """Say whether this process is a server's fork, which does the work itself."""
    return os.environ.get(FORK) == str(os.getpid())


def owner() -> int:
    """Return the number of the process that the server of this stage belongs to."""
    named = os.environ.get(OWNER, "")
    return int(named) if named.isdecimal() else os.getppid()


def address_of(owner: int) -> Path:
    """Return the address of a process's server."""
    return _DIR / f"{PREFIX}{owner}"


def _describe_this() -> bytes:
    ignored = [int(number) for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    return json.dumps([sys.argv, sys.path, str(Path.cwd()), dict(os.environ), ignored]).encode()


def _pass_signals_on_to(fork: int) -> None:
    def send(number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fork, number)

    def hear(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGTSTP:
            send(number)
            return
        send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        send(signal.SIGCONT)

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, hear)


def _end_like(status: int) -> NoReturn:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler.
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code if code >= 0 else 128 - code)
