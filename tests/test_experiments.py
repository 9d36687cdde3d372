"""`dvc exp run`, `--temp` and the queue: a killed trainer is continued, wherever its work tree was."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import standin
from coconut.pipeline.states import last_update

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the pipeline's guards are Linux only"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The repository after a straight run, committed."""
    root = standin.make_repository(tmp_path_factory.mktemp("finished") / "repository")
    assert standin.run(root, "dvc", "repro").returncode == 0
    for command in (["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "done"]):
        subprocess.run(["git", *command], cwd=root, env=standin.environment(), check=True)
    return root


@pytest.fixture
def root(finished, tmp_path) -> Iterator[Path]:
    # Without the states of the straight run: here a state is one of the experiment's.
    root = Path(shutil.copytree(finished, tmp_path / "repository", ignore=shutil.ignore_patterns(".resume")))
    yield root
    for process in psutil.process_iter():  # Queue workers; only those of this repository.
        try:
            if Path(process.cwd()).is_relative_to(root):
                process.kill()
        except (psutil.Error, OSError):
            continue


NUM_UPDATES = 200
CHANGE = ("-S", f"curriculum.cot.num_updates={NUM_UPDATES}")


def update_of(root: Path) -> int:
    return max((last_update(folder) or 0 for folder in (root / ".resume").glob("train@cot-*")), default=0)


def wait_for_update(root: Path, update: int) -> None:
    deadline = time.monotonic() + 90
    while update_of(root) < update:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def result_of_a_straight_run(root: Path, tmp_path: Path) -> str:
    """Of the parameters in `root`, trained again whatever DVC remembers."""
    straight = Path(shutil.copytree(root, tmp_path / "straight", ignore=shutil.ignore_patterns(".resume")))
    forced = standin.run(straight, "dvc", "repro", "--force", "--single-item", "train@cot")
    assert forced.returncode == 0, forced.stderr
    assert update_of(straight) == NUM_UPDATES
    return (straight / "outputs/cot").read_text()


# DVC runs stages by $SHELL: bash makes room for a lone command by itself, the `sh` of cron and services does not.
@pytest.mark.parametrize(
    ("where", "shell"),
    [
        ([], "/bin/sh"),
        pytest.param(["--temp"], "/bin/sh", marks=pytest.mark.long),
        pytest.param([], "/bin/bash", marks=pytest.mark.long),
    ],
    ids=["workspace", "temp", "bash"],
)
def test_an_experiment_continues_a_killed_one(root, tmp_path, monkeypatch, where, shell):
    monkeypatch.setenv("SHELL", shell)
    # Nearly a minute long, so that the signal finds it at work on a busy machine too.
    standin.behave(root, {"train@cot": [{"nap": 0.3}]})
    first = standin.start(root, "dvc", "exp", "run", *where, *CHANGE, "train@cot")
    wait_for_update(root, 5)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=300)
    saved = update_of(root)
    assert 5 <= saved < NUM_UPDATES
    again = standin.run(root, "dvc", "exp", "run", *where, *CHANGE, "train@cot")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"train@cot: resumed at update {saved}" in again.stdout + again.stderr
    branch = standin.run(root, "dvc", "exp", "list", "--name-only").stdout.split()[-1]
    assert standin.run(root, "dvc", "exp", "apply", branch).returncode == 0
    assert (root / "outputs/cot").read_text() == result_of_a_straight_run(root, tmp_path)


@pytest.mark.long
def test_the_queue_continues_a_killed_experiment(root):
    """Also: the trainer does not die of its parent's thread, as it would if the queue started it from one."""
    standin.behave(root, {"train@cot": [{"nap": 0.1, "die_at": 25}]})
    for num_resumed in (0, 1):
        queued = standin.run(root, "dvc", "exp", "run", "--queue", *CHANGE, "train@cot")
        assert queued.returncode == 0, queued.stderr
        assert standin.run(root, "dvc", "queue", "start").returncode == 0
        deadline = time.monotonic() + 120
        while True:
            status = standin.run(root, "dvc", "queue", "status").stdout
            if status.count("Failed") + status.count("Success") == num_resumed + 1 and "Running" not in status:
                break
            assert time.monotonic() < deadline, status
            time.sleep(0.5)
        assert update_of(root) == (NUM_UPDATES if num_resumed else 25)
    assert status.count("Failed") == 1
    assert status.count("Success") == 1
    logs = (root / "outputs/logs/train@cot.log", *(root / ".dvc/tmp/exps").rglob("*.out"))
    assert any("resumed at update 25" in path.read_text() for path in logs if path.exists())
