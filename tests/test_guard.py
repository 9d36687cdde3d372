import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coconut.pipeline import signals as guard

LOOP = """
import sys, time
from coconut.pipeline.signals import stop_on_signals
with stop_on_signals({grace_s}) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saving", stop.signal.name, flush=True)
    {after}
    raise stop.preempted()
"""


def start(code: str, **options) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def loop(after: str = "pass", grace_s: int = guard.GRACE_S) -> str:
    return LOOP.format(after=after, grace_s=grace_s)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_stop_signal_lets_the_loop_save_and_ends_with_the_shells_exit_code(name, code):
    process = start(loop())
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == (f"saving {name}\n", "", code)


def test_a_second_interrupt_ends_the_process_at_once():
    process = start(loop("time.sleep(60)"))
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving SIGINT\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err


def test_a_second_sigterm_does_not_disturb_the_saving():
    process = start(loop("time.sleep(0.5); print('saved', flush=True)"))
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("saving SIGTERM\nsaved\n", 143)


def test_a_loop_that_hangs_is_ended_by_the_kernel_after_the_grace():
    process = start(loop("time.sleep(60)", grace_s=1))
    process.send_signal(signal.SIGTERM)
    begin = time.time()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGALRM
    assert time.time() - begin < 5


def test_a_signal_ignored_by_nohup_stays_ignored():
    process = start(loop(), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out == "saving SIGTERM\n"


def block_all_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def test_a_signal_that_was_blocked_before_is_heeded():
    process = start(loop(), preexec_fn=block_all_signals)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("saving SIGTERM\n", 143)


def test_handlers_are_put_back_and_the_alarm_is_off_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with guard.stop_on_signals() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.alarm(0) == 0


def test_a_block_that_changes_nothing_is_interrupted():
    def go_on(stop: guard.Stop, number: signal.Signals | None) -> str:
        try:
            with stop.interrupting():
                if number is not None:
                    signal.raise_signal(number)
                return "went on"
        except guard.Interrupted:
            return "interrupted"

    with guard.stop_on_signals() as stop:
        assert go_on(stop, None) == "went on"
        assert go_on(stop, signal.SIGTERM) == "interrupted"
        assert stop.signal == signal.SIGTERM
        assert go_on(stop, None) == "interrupted", "the request came before"
        signal.raise_signal(signal.SIGTERM)  # Callbacks of such a block, and a second time: noted only.


CHILD = """
from coconut.pipeline.signals import die_with_parent
import sys, time, os
{before}
die_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""
# Starts the child in its own session and process group, as dvc does, and waits for it.
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can signal the death of a parent")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(pid: int) -> bool:
    deadline = time.time() + 5
    while is_running(pid) and time.time() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


@linux_only
@pytest.mark.parametrize("setup", [None, block_all_signals], ids=["", "blocked"])
def test_the_child_dies_with_its_parent(setup):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD.format(before="")], stdout=subprocess.PIPE, text=True, preexec_fn=setup
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait(5)
    assert wait_until_gone(child)


@linux_only
def test_a_stage_whose_dvc_died_before_it_could_ask_ends_by_itself(tmp_path):
    log = tmp_path / "log"
    # The child waits until its parent is gone, then asks: too late for the kernel's signal.
    child = CHILD.format(before="while os.getppid() == int(sys.argv[1]): time.sleep(0.01)\nprint('late', flush=True)")
    code = (
        "import os, subprocess, sys\n"
        f"command = [sys.executable, '-c', {child!r}, str(os.getpid())]\n"
        f"child = subprocess.Popen(command, stdout=open({str(log)!r}, 'w'))\n"
        "print(child.pid)"
    )
    environment = {**os.environ, "DVC_STAGE": "train@cot"}
    parent = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, start_new_session=True, stdout=subprocess.PIPE
    )
    pid = int(parent.stdout)
    ended = wait_until_gone(pid)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended
    assert log.read_text() == "late\n"


@linux_only
def test_a_stage_started_by_hand_or_by_a_living_dvc_goes_on(monkeypatch):
    assert not guard._is_orphan()
    monkeypatch.setenv("DVC_STAGE", "train@cot")
    assert not guard._is_orphan()


def test_guard_is_imported_without_torch():
    code = "import sys, coconut.pipeline.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
