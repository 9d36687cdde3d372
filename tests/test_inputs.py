"""What `dvc repro` trains again after an edit, in a real project: what the edit can change, and nothing else."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coconut.pipeline.events import last_run
from project import environment, make_project, run, stages_run, write_params

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the pipeline's guards are Linux only"),
]

ENTRIES: dict[str, Any] = {
    "cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 2, "lr": 2e-3},
    "latent_1": {"parent": "cot", "method": "coconut", "latent_stage": 1, "epochs": 1, "lr": 2e-3},
}
NUM_UPDATES = {"cot": 12, "latent_1": 6}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("inputs") / "project", {"curriculum": ENTRIES})
    run(project, "dvc", "repro", *(f"train@{name}" for name in ENTRIES))
    return project


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "project"))


def edit(project: Path, name: str, old: str, new: str) -> None:
    path = project / "src/coconut" / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def weights(project: Path) -> dict[str, bytes]:
    return {name: (project / f"outputs/{name}/checkpoint/model.safetensors").read_bytes() for name in ENTRIES}


def updates_done(project: Path) -> dict[str, int]:
    """By each entry's last process: all of the entry, without those that it took over from a state."""
    done = {}
    for name in ENTRIES:
        last = last_run(f"train@{name}", project)
        assert last is not None
        assert last.end == "ended"
        rows = list(csv.DictReader((project / f"outputs/{name}/history.csv").read_text().splitlines()))
        done[name] = int(rows[-1]["update"]) - (last.resumed_at or 0)
    return done


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("model/latent.py", '"""', '"""Edited. '),
        ("evaluation/statistics.py", "\ndef ", "\nEDITED = 1\n\n\ndef "),
    ],
    ids=["a docstring in model/", "code in evaluation/ that no training loads"],
)
def test_what_cannot_change_a_training_does_no_update_twice(project: Path, name: str, old: str, new: str) -> None:
    before = weights(project)
    edit(project, name, old, new)
    again = run(project, "dvc", "repro", *(f"train@{name}" for name in ENTRIES))
    assert stages_run(again) == ["code"], "its digests are the same"
    assert weights(project) == before


def test_a_finished_training_that_dvc_runs_again_takes_its_finished_state(project: Path) -> None:
    """A gate changes no byte, so that DVC's list of inputs is coarser than the fingerprint."""
    assert updates_done(project) == NUM_UPDATES
    states = [path.parent for path in (project / ".resume").glob("train@*/state-*")]
    assert len(states) == len(set(states)) == len(ENTRIES), "a finished training keeps its newest state alone"
    before, histories = weights(project), [(project / f"outputs/{name}/history.csv").read_bytes() for name in ENTRIES]
    write_params(project, {f"curriculum.{name}.min_accuracy": 0.0 for name in ENTRIES})
    again = run(project, "dvc", "repro", *(f"train@{name}" for name in ENTRIES))
    assert {f"train@{name}" for name in ENTRIES} <= set(stages_run(again))
    assert updates_done(project) == dict.fromkeys(ENTRIES, 0)
    assert weights(project) == before
    assert [(project / f"outputs/{name}/history.csv").read_bytes() for name in ENTRIES] == histories


def test_code_that_every_training_loads_trains_again(project: Path) -> None:
    edit(project, "training/rows.py", "\n\n\ndef ", "\n\nEDITED = 1\n\n\ndef ")
    run(project, "dvc", "repro", "train@cot")
    assert updates_done(project)["cot"] == NUM_UPDATES["cot"]


def test_a_comment_edited_while_a_training_runs_does_not_fail_it(project: Path) -> None:
    edit(project, "training/rows.py", "\n\n\ndef ", "\n\nEDITED = 1\n\n\ndef ")
    training = subprocess.Popen(
        ["dvc", "repro", "train@cot"],
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert training.stdout is not None
    lines = []
    for line in training.stdout:
        lines.append(line)
        if "cot: before the first update" in line:
            edit(project, "model/latent.py", '"""', '"""Edited. ')
            edit(project, "training/loop.py", "\nimport ", "\n# Edited.\nimport ")
    assert training.wait() == 0, "".join(lines)
    assert "Edited. " in (project / "src/coconut/model/latent.py").read_text(encoding="utf-8"), "".join(lines)
