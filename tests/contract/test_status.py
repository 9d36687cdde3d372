"""`coconut status` from another terminal: how far a training is while it runs, and that it is done after it."""

import re
import time
from pathlib import Path

import pytest

from contract.projects import make_project, run, start, train_entry

pytestmark = pytest.mark.slow

TRAINING = "train@cot"
NUM_EPOCHS = 15
NUM_UPDATES = NUM_EPOCHS * 512 // 16


def line_of(project: Path, stage: str) -> str:
    """Return what the status says of a stage."""
    done = run(project, "python", "-m", "coconut", "status")
    (line,) = [line.strip() for line in done.stdout.splitlines() if line.split()[:1] == [stage]]
    return line


def test_status_says_how_far_a_training_is_and_then_that_it_is_done(tmp_path: Path) -> None:
    changes = {
        "data.train": {"format": "generated", "rows": 512},
        "train.batch_size": 16,
        "runtime.save_every_s": 0.2,
        "runtime.log_every_s": 0.5,
        "curriculum": {"cot": train_entry("cot", epochs=NUM_EPOCHS), "latent_1": train_entry("coconut", "cot", 1)},
    }
    project = make_project(tmp_path / "project", changes, is_versioned=True)
    assert line_of(project, TRAINING).split()[1] == "waiting"
    dvc, seen, deadline = start(project, "dvc", "repro", TRAINING), [], time.monotonic() + 600
    while dvc.poll() is None:
        assert time.monotonic() < deadline
        seen.append(line_of(project, TRAINING))
    output, _ = dvc.communicate()
    assert dvc.returncode == 0, output
    shares = [re.match(rf"train@cot +running +update (\d+) of {NUM_UPDATES} \((\d+)%\)", line) for line in seen]
    found = [(int(match[1]), int(match[2])) for match in shares if match]
    assert found, seen
    assert found == sorted(found), "a training never goes back"
    assert all(abs(100 * update / NUM_UPDATES - percent) <= 1 for update, percent in found)
    assert line_of(project, TRAINING).split()[1] == "done"
    assert line_of(project, "train@latent_1").split()[1] == "to"  # "to do"
