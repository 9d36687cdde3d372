"""A stage that a server forks behaves as one that DVC has started: output, end, signals, death, code."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

import waiting
from coconut.pipeline.fork_client import OWNER
from project import ROOT, environment, make_project, run, stages_run
from waiting import is_at_work

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a file descriptor for a process"),
]

wait_for = partial(waiting.wait_for, seconds=30)

# Starts stages one after the other, as dvc does, and says their numbers and how they end.
DVC = """
import json, subprocess, sys
for line in sys.stdin:
    arguments, variables = json.loads(line)
    process = subprocess.Popen([sys.executable, *arguments], env=variables, stdin=subprocess.DEVNULL)
    print("#", process.pid, flush=True)
    print("#", process.wait(), flush=True)
"""
# A stage: it begins as ours do, and leaves a server that has imported a module which no stage needs.
STAGE = """
import os, signal, sys, time
sys.path.insert(0, os.environ["SOURCES"])
from coconut.pipeline.stage import begin
inputs = begin()
from coconut.pipeline.fork_server import leave_server
if "served" in sys.argv:
    leave_server(["colorsys"])
import coconut.pipeline.signals as signals
what = sys.argv[1]

def hear(number, frame):
    print("heard", number, flush=True)
    if number == signal.SIGTERM:
        sys.exit(17)

if what == "say":
    print(sys.argv, os.getcwd(), os.environ.get("WORD"), repr(sys.stdin.read()), __name__, __file__, os.getpgid(0) > 0)
    print("to stderr", file=sys.stderr)
elif what == "shared":
    print("colorsys" in sys.modules)
elif what == "code":
    print(getattr(signals, "EDITED", "as it was"))
elif what == "exit":
    sys.exit(3)
elif what == "words":
    sys.exit("in words")
elif what == "defect":
    def inner():
        raise LookupError("a defect")
    inner()
elif what == "interrupted":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)
elif what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "fault":
    import ctypes
    ctypes.string_at(0)
elif what == "exit handlers":
    import atexit, threading
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
elif what == "hear":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, hear)
    print("at work", os.getpid(), flush=True)
    while True:
        time.sleep(0.05)
elif what == "ignored":
    print([signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTSTP)])
elif what == "tick":
    print("at work", os.getpid(), flush=True)
    while True:
        time.sleep(0.05)
        print("tick", flush=True)
"""


class Dvc:
    """The process that starts stages, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".dvc/tmp").mkdir(parents=True, exist_ok=True)
        (folder / "stage.py").write_text(STAGE, encoding="utf-8")
        self.output = (folder / "output").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, "-c", DVC],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def start(self, *arguments: str, **variables: str) -> int:
        """Start a stage; return the number of its process."""
        assert self.process.stdin is not None
        all_variables = environment(self.folder) | {"DVC_STAGE": "x", "SOURCES": str(ROOT / "src")} | variables
        known = len(self._said())
        self.process.stdin.write(json.dumps([["stage.py", *arguments], all_variables]) + "\n")
        self.process.stdin.flush()
        return int(wait_for(lambda: self._said()[known : known + 1])[0])

    def end(self) -> int:
        """Wait for the end of the stage that runs; return how it ended."""
        wait_for(lambda: len(self._said()) % 2 == 0)
        return int(self._said()[-1])

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Run a stage; return how it ended and what it said."""
        before = len(self.text())
        self.start(*arguments, **variables)
        code = self.end()
        return code, "".join(
            line for line in self.text()[before:].splitlines(keepends=True) if not line.startswith("# ")
        )

    def text(self) -> str:
        return (self.folder / "output").read_text(encoding="utf-8")

    def at_work(self) -> psutil.Process:
        """Return the process that said last that it is at work."""
        said = wait_for(lambda: [line for line in self.text().splitlines() if "at work" in line])
        return psutil.Process(int(said[-1].split()[2]))

    def servers(self) -> list[psutil.Process]:
        """Return the servers that work in this folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.name() == "fork-server":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _said(self) -> list[str]:
        return [line[2:] for line in self.text().splitlines() if line.startswith("# ")]


@contextmanager
def started(folder: Path, *, served: bool = True) -> Iterator[Dvc]:
    folder.mkdir(exist_ok=True)
    dvc = Dvc(folder)
    try:
        if served:
            assert dvc.run("shared", "served") == (0, "True\n")
            wait_for(lambda: len(dvc.servers()) == 1)  # It takes its name once the stage goes on.
        yield dvc
    finally:
        servers = dvc.servers()
        dvc.process.kill()
        dvc.process.wait()
        dvc.output.close()
        wait_for(lambda: not any(map(is_at_work, servers)))


@pytest.fixture
def dvc(tmp_path: Path) -> Iterator[Dvc]:
    with started(tmp_path / "served") as one:
        yield one


@pytest.mark.parametrize(
    "what",
    ["say", "exit", "words", "defect", "interrupted", "killed", "fault", "exit handlers", "ignored"],
)
def test_output_and_end_are_those_of_a_process_of_its_own(what: str, tmp_path: Path) -> None:
    found = []
    for served in (False, True):
        with started(tmp_path / "folder", served=served) as dvc:
            found.append(dvc.run(what, "an argument with ä", WORD="a\nb"))
            assert dvc.run("shared") == (0, f"{served}\n")
    assert found[0] == found[1]
    assert found[0] != (0, "")


def test_a_fork_takes_our_modules_from_the_work_tree(dvc: Dvc, tmp_path: Path) -> None:
    """An edited module is what counts, and the one of another folder's code where the stage runs there."""
    assert dvc.run("code") == (0, "as it was\n")
    other = tmp_path / "src"
    shutil.copytree(ROOT / "src", other, ignore=shutil.ignore_patterns("__pycache__"))
    module = other / "coconut/pipeline/signals.py"
    module.write_text(module.read_text(encoding="utf-8") + "EDITED = 'edited'\n", encoding="utf-8")
    assert dvc.run("code", SOURCES=str(other)) == (0, "edited\n")
    assert dvc.run("code") == (0, "as it was\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_comes_once(dvc: Dvc, number: signal.Signals) -> None:
    stage = dvc.start("hear")
    fork = dvc.at_work()
    assert fork.pid != stage
    for count in (1, 2):
        os.kill(stage, number)
        wait_for(lambda count=count: dvc.text().count("heard") >= count)
        time.sleep(0.2)  # In which a second one would come.
        assert dvc.text().count(f"heard {int(number)}\n") == count == dvc.text().count("heard")
    os.kill(stage, signal.SIGTERM)
    assert dvc.end() == 17
    assert not is_at_work(fork)


def test_a_group_that_is_told_to_end_takes_its_fork_along(dvc: Dvc) -> None:
    dvc.start("hear")
    processes = [dvc.at_work(), *dvc.servers()]
    os.killpg(dvc.process.pid, signal.SIGTERM)
    wait_for(lambda: not any(map(is_at_work, processes)), seconds=5)
    assert "heard 15" in dvc.text()


def test_a_fork_dies_with_the_process_that_dvc_started(dvc: Dvc) -> None:
    stage = dvc.start("tick")
    fork = dvc.at_work()
    os.kill(stage, signal.SIGKILL)
    assert dvc.end() == -signal.SIGKILL
    wait_for(lambda: not is_at_work(fork), seconds=2)
    assert dvc.run("shared") == (0, "True\n")


def test_a_fork_that_is_killed_ends_the_process_that_dvc_started(dvc: Dvc) -> None:
    dvc.start("tick")
    dvc.at_work().kill()
    assert dvc.end() == -signal.SIGKILL
    assert dvc.run("shared") == (0, "True\n")


def test_a_stopped_stage_does_not_work(dvc: Dvc) -> None:
    stage = dvc.start("tick")
    fork = dvc.at_work()
    os.kill(stage, signal.SIGTSTP)
    wait_for(lambda: fork.status() == psutil.STATUS_STOPPED == psutil.Process(stage).status())
    os.kill(stage, signal.SIGCONT)
    ticks = dvc.text().count("tick")
    wait_for(lambda: dvc.text().count("tick") > ticks)


@pytest.mark.parametrize("work", [False, True])
def test_a_server_ends_with_its_dvc(dvc: Dvc, work: bool) -> None:
    processes = dvc.servers()
    if work:
        dvc.start("hear")
        processes.append(dvc.at_work())
    dvc.process.kill()
    dvc.process.wait()
    wait_for(lambda: not any(map(is_at_work, processes)), seconds=5)
    assert list((dvc.folder / ".dvc/tmp").iterdir()) == []
    assert dvc.text().count("heard 15") == work, "a stage must be able to save its state"


def test_a_server_that_is_killed_is_replaced(dvc: Dvc) -> None:
    dvc.start("hear")
    fork = dvc.at_work()
    (server,) = dvc.servers()
    server.kill()
    assert dvc.end() == 1
    assert not is_at_work(fork)
    assert "heard 15" in dvc.text()
    assert dvc.run("shared") == (0, "False\n")
    assert dvc.run("shared", "served") == (0, "True\n")
    assert dvc.run("shared") == (0, "True\n")


def test_a_server_that_hangs_costs_no_stage(dvc: Dvc) -> None:
    (server,) = dvc.servers()
    server.suspend()
    stage = dvc.start("shared")
    time.sleep(0.5)
    server.kill()
    assert dvc.end() == 0
    assert dvc.text().splitlines()[-2:] == ["False", "# 0"]
    assert psutil.pid_exists(stage) is False


def test_requests_that_are_no_requests_change_nothing(dvc: Dvc, monkeypatch: pytest.MonkeyPatch) -> None:
    (address,) = (dvc.folder / ".dvc/tmp").iterdir()
    assert stat.S_IMODE(address.stat().st_mode) & 0o077 == 0, "others must not have a process of ours run their code"
    monkeypatch.chdir(address.parent)  # An absolute path may be too long for a socket.
    (server,) = dvc.servers()
    num_open = server.num_fds()
    for message in (b"", b"[]", b"{", b"[1, 2, 3, 4, 5]", b"\xff" * 1000):
        for descriptors in ([], [0, 1]):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(address.name)
                if message:
                    socket.send_fds(client, [message], descriptors)
    assert dvc.run("shared") == (0, "True\n")
    wait_for(lambda: server.num_fds() == num_open)  # What came along was closed.


def test_an_environment_too_large_for_a_message_is_no_obstacle(dvc: Dvc) -> None:
    large = {f"LARGE_{number}": "x" * 100_000 for number in range(8)}
    assert dvc.run("shared", **large) == (0, "False\n")
    assert dvc.run("shared") == (0, "True\n")


def test_stages_of_several_dvc_share_the_server_of_their_run(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with started(folder, served=False) as one:
        owner = subprocess.Popen(["sleep", "60"])
        run_pid = {OWNER: str(owner.pid)}
        assert one.run("shared", "served", **run_pid) == (0, "True\n")
        other = subprocess.run(
            [sys.executable, "stage.py", "shared"],
            cwd=folder,
            env=environment(folder) | {"DVC_STAGE": "x", "SOURCES": str(ROOT / "src")} | run_pid,
            capture_output=True,
            text=True,
            check=True,
        )
        assert other.stdout == "True\n"
        (server,) = one.servers()
        os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        assert is_at_work(server)
        owner.kill()
        owner.wait()
        wait_for(lambda: not is_at_work(server), seconds=5)


def test_no_server_is_left_by_a_stage_that_is_run_by_hand(tmp_path: Path) -> None:
    with started(tmp_path / "folder", served=False) as dvc:
        assert dvc.run("shared", "served", DVC_STAGE="") == (0, "False\n")
        assert dvc.servers() == []


def test_what_a_server_imports_asks_for_no_gpu() -> None:
    """CUDA cannot be used in a fork of a process that has used it."""
    code = (
        "import importlib, torch\nfrom coconut.pipeline.fork_server import PRELOADED\n"
        "def refuse(*_, **__):\n    raise RuntimeError('it asked for a GPU')\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'get_device_capability'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "for name in PRELOADED:\n    importlib.import_module(name)\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(ROOT), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_pipeline_gives_the_same_bytes_with_and_without(tmp_path: Path) -> None:
    locks = []
    for is_served in (False, True):
        project = make_project(tmp_path / str(is_served), {"runtime.fork_server": is_served})
        done = run(project, "dvc", "repro")
        assert len(stages_run(done)) > 10
        lock = yaml.safe_load((project / "dvc.lock").read_bytes())["stages"]
        locks.append(
            {
                out["path"]: out["md5"]
                for stage in lock.values()
                for out in stage.get("outs", [])
                if out["path"].endswith(
                    ("checkpoint", ".safetensors", "updates.csv", "predictions.jsonl", "thoughts.csv")
                )
            }
        )
        assert not list((project / ".dvc/tmp").glob("fork-server-*"))
    assert locks[0] == locks[1]


def test_the_first_stage_that_computes_leaves_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path / "project")
    owner = subprocess.Popen(["sleep", "600"])
    monkeypatch.setenv(OWNER, str(owner.pid))
    try:
        run(project, "dvc", "repro", "preprocess")
        assert not list((project / ".dvc/tmp").glob("fork-server-*")), "what imports no torch leaves none"
        run(project, "dvc", "repro", "base")
        assert len(list((project / ".dvc/tmp").glob("fork-server-*"))) == 1
    finally:
        owner.kill()
        owner.wait()
    wait_for(lambda: not list((project / ".dvc/tmp").glob("fork-server-*")))
