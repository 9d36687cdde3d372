"""One import of torch and transformers for all stages of a run: a process that has them is forked for each of them.

    dvc -> python stages/base.py        imports them, and leaves a copy of itself behind, the server
    dvc -> python stages/train.py cot   asks the server for a fork, passes signals on to it, ends as it ends

Of four seconds that a small stage takes until its first update, three are these imports. A stage stays a process of
its own, with its command, its environment, its output and its end:

* what reaches the process that DVC started reaches the fork: a signal is passed on, and if that process is killed the
  kernel kills the fork;
* only what is installed is shared. Modules of this project are imported by every fork anew: the code that counts is
  the one in the work tree when a stage begins;
* the server ends with the run, `dvc` or `coconut repro`, as soon as the last fork has ended.

Where anything of this is not to be had, a stage starts as it always did. Linux only: elsewhere no file descriptor
stands for a process. The server has started no thread of its own and has not asked for a GPU when it forks.

Importing this module is cheap (no torch).
"""

import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from coconut.pipeline.fork_client import FORK, PASSED_ON, PREFIX, address_of, is_fork, owner
from coconut.pipeline.gpus import processes_of

PRELOADED = ("torch", "transformers.modeling_utils", "transformers.models.auto")
_LARGEST_REQUEST = 1 << 18
_REQUEST_S = 10.0
_Clients = dict[int, tuple[int, socket.socket]]
"""The number of each fork, and who waits for it, by the file descriptor of the fork."""


# --- the server -----------------------------------------------------------------------------


def serves(runtime: Mapping[str, object]) -> bool:
    """Say whether stages share a server; `runtime` is the section of `params.yaml`.

    Processes that share a stage are started by torch's agent and import for themselves.
    """
    has_descriptors = sys.platform == "linux" and hasattr(os, "pidfd_open")
    is_alone = processes_of(runtime) == 1 and runtime.get("launcher", "none") in ("", "none", None)
    return has_descriptors and is_alone and runtime.get("fork_server", True) is True


def leave_server(modules: Sequence[str] = PRELOADED) -> None:
    """Import what all stages share, and leave a copy of this process behind that serves the stages to come.

    Does nothing for a process that no `dvc` has started.
    """
    if sys.platform != "linux" or not os.environ.get("DVC_STAGE") or is_fork():
        return
    try:
        owning = os.pidfd_open(owner())
        listener = _listen(address_of(owner()))
    except OSError:  # Another stage was first; an old kernel; a folder that holds no sockets, as on some networks.
        return
    for name in modules:
        importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        _serve(listener, owning)
    else:
        listener.close()
        os.close(owning)


def _listen(address: Path) -> socket.socket:
    for other in address.parent.glob(f"{PREFIX}*"):
        if not _is_answered(other):  # Its server was killed.
            other.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o077)
    try:
        listener.bind(str(address))
    finally:
        os.umask(mask)
    listener.listen()
    return listener


def _is_answered(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(address))
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class _Request:
    arguments: list[str]
    path: list[str]
    folder: str
    environment: dict[str, str]
    ignored: list[int]
    streams: tuple[int, int, int]
    lifeline: int


def _serve(listener: socket.socket, owning: int) -> NoReturn:
    """Fork for every stage that asks, and tell it how the fork has ended, until the run has ended.

    Args:
        listener: where stages ask.
        owning: the file descriptor of the process whose end is that of the run.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # They are for the stages.
    os.setpgid(0, 0)  # One of several `dvc` may end with all its group.
    address = Path(listener.getsockname())
    _detach()
    clients: _Clients = {}
    while listener.fileno() >= 0 or clients:
        waiting = [*clients, *([listener.fileno(), owning] if listener.fileno() >= 0 else [])]
        for ready in select.select(waiting, [], [])[0]:
            if ready in clients:
                ended, client = clients.pop(ready)
                _, status = os.waitpid(ended, 0)
                os.close(ready)
                with client, suppress(OSError):
                    client.send(str(status).encode())
            elif ready == owning:
                address.unlink(missing_ok=True)
                listener.close()
            elif listener.fileno() >= 0 and (asked := _accept(listener)) is not None:
                client, request = asked
                number = _fork()
                if number == 0:
                    _let_go(clients, client, listener)
                    os.close(owning)
                    _work(request)
                _answer(number, client, request, clients)
    os._exit(0)


def _detach() -> None:
    """Hold nothing that somebody waits for the end of, and say what this process is."""
    with Path(os.devnull).open("r+b") as null:
        for stream in range(3):
            os.dup2(null.fileno(), stream)
    gc.collect()
    gc.freeze()  # The garbage collector's marks would copy every page that forks share.
    _name_process("fork-server")


def _name_process(name: str) -> None:
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name[:15], encoding="utf-8")


def _accept(listener: socket.socket) -> tuple[socket.socket, _Request] | None:
    """Return a stage that waits for an answer, and what it is to run; None if it does not wait, or asks wrongly."""
    try:
        client, _ = listener.accept()
    except OSError:
        return None
    request = _receive(client)
    if request is None:
        client.close()
        return None
    return client, request


def _receive(client: socket.socket) -> _Request | None:
    client.settimeout(_REQUEST_S)
    descriptors: list[int] = []
    try:
        message, descriptors, _, _ = socket.recv_fds(client, _LARGEST_REQUEST, 4, socket.MSG_CMSG_CLOEXEC)
        arguments, path, folder, environment, ignored = json.loads(message)
        stdin, stdout, stderr, lifeline = descriptors
        return _Request(arguments, path, folder, environment, ignored, (stdin, stdout, stderr), lifeline)
    except (OSError, ValueError, TypeError):
        for descriptor in descriptors:
            os.close(descriptor)
        return None


def _fork() -> int | None:
    """Fork; None if there is no memory, or no more processes: the stage starts by itself then."""
    try:
        return os.fork()
    except OSError:
        return None


def _answer(number: int | None, client: socket.socket, request: _Request, clients: _Clients) -> None:
    """Tell a stage of its fork, and note whom it belongs to; without one, end the conversation."""
    for descriptor in (*request.streams, request.lifeline):
        os.close(descriptor)
    if number is None:
        client.close()
        return
    fork = os.pidfd_open(number)
    clients[fork] = number, client
    with suppress(OSError):
        socket.send_fds(client, [b"fork"], [fork])


def _let_go(clients: _Clients, *others: socket.socket) -> None:
    """Close, in a fork, what is the server's."""
    for descriptor, (_, client) in clients.items():
        os.close(descriptor)
        client.close()
    for other in others:
        other.close()


# --- the fork -------------------------------------------------------------------------------


def _work(request: _Request) -> NoReturn:
    """Run a stage's script, as the interpreter would in a process that DVC has started itself."""
    _become(request)
    script = str(Path(request.arguments[0]).absolute())

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        own, is_below = trace, False  # The script's calls, below those of the server.
        while own is not None and not (is_below and own.tb_frame.f_code.co_filename == script):
            is_below = is_below or own.tb_frame.f_code is _work.__code__
            own = own.tb_next
        sys.__excepthook__(kind, error.with_traceback(own), own)

    sys.excepthook = show
    loader = SourceFileLoader("__main__", script)
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = script
    loader.exec_module(main)
    sys.exit(0)


def _become(request: _Request) -> None:
    os.setpgid(0, 0)  # The terminal's signals come once, passed on.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    _die_with(request.lifeline)
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request.folder)
    sys.argv[:], sys.path[:] = request.arguments, request.path
    os.environ.clear()
    os.environ.update(request.environment | {FORK: str(os.getpid())})
    for name in [name for name in sys.modules if name.partition(".")[0] == "coconut"]:
        del sys.modules[name]
    for handled in PASSED_ON:
        default: Any = signal.default_int_handler if handled == signal.SIGINT else signal.SIG_DFL
        signal.signal(handled, signal.SIG_IGN if handled in request.ignored else default)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    _name_process("-".join([Path(request.arguments[0]).stem, *request.arguments[1:]]))


def _die_with(lifeline: int) -> None:
    """Have the kernel kill this process when the other end of the pipe is closed, as it is when its owner dies."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        os.kill(os.getpid(), signal.SIGKILL)
