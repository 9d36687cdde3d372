"""Two clones share results through a DVC remote: what one has trained, the other one takes."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from coconut.pipeline.events import last_run
from project import commit, make_project, run, stages_run, write_params

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="the pipeline's guards are Linux only"),
]

ENTRIES: dict[str, Any] = {
    "cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 1, "lr": 2e-3},
    "latent_1": {"parent": "cot", "method": "coconut", "latent_stage": 1, "epochs": 1, "lr": 2e-3},
}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project whose results are in a remote and whose record is in git."""
    folder = tmp_path_factory.mktemp("remote")
    project = make_project(folder / "first", {"curriculum": ENTRIES})
    run(project, "dvc", "remote", "add", "--default", "store", str(folder / "store"))
    run(project, "dvc", "repro")
    commit(project)
    run(project, "dvc", "push", "--run-cache")
    return project


def clone(first: Path, folder: Path) -> Path:
    run(first, "git", "clone", "-q", str(first), str(folder))
    return folder


def test_a_second_clone_pulls_and_trains_nothing(first: Path, tmp_path: Path) -> None:
    second = clone(first, tmp_path / "second")
    run(second, "dvc", "pull")
    again = run(second, "dvc", "repro")
    assert stages_run(again) == []
    assert "up to date" in again.stdout
    weights = "outputs/latent_1/checkpoint/model.safetensors"
    assert (second / weights).read_bytes() == (first / weights).read_bytes()
    assert (second / "outputs/report/report.html").exists()


def test_results_of_a_value_that_git_has_not_seen_come_from_the_run_cache(first: Path, tmp_path: Path) -> None:
    """The first clone tries a value and pushes; the second one tries it too."""
    second = clone(first, tmp_path / "second")
    write_params(first, {"curriculum.latent_1.lr": 1e-3})
    run(first, "dvc", "repro", "train@latent_1")
    run(first, "dvc", "push", "--run-cache")

    shutil.copy(first / "params.yaml", second)
    run(second, "dvc", "pull", "--run-cache")
    run(second, "dvc", "repro", "--pull", "train@latent_1")
    assert last_run("train@latent_1", second) is None, "its process was started"
    weights = "outputs/latent_1/checkpoint/model.safetensors"
    assert (second / weights).read_bytes() == (first / weights).read_bytes()
