"""Stages as jobs of a scheduler: submitted once, waited for, cancelled when their inputs are others."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from project import commit, environment, make_project, run, write_params
from slurm import calls, path_with, write_commands
from test_processes import RECIPE, processes_in, trained

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux only"),
]

LAUNCHER = f"{sys.executable} -m coconut submit --nodes=2 --gpus-per-node=8 --"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose trainings are to be jobs on two hosts."""
    changes = RECIPE | {"runtime.processes": 1, "runtime.launcher": LAUNCHER}
    project = make_project(tmp_path_factory.mktemp("slurm") / "encoded", changes)
    commit(project)
    run(project, "dvc", "repro", "encode", "base")
    return project


@pytest.fixture(scope="module")
def straight(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes of one host leave."""
    project = Path(shutil.copytree(encoded, tmp_path_factory.mktemp("slurm") / "straight"))
    write_params(project, {"runtime.processes": 2, "runtime.launcher": "none"})
    run(project, "dvc", "repro", "train@latent_1")
    return trained(project)


class Cluster:
    """A project with a scheduler of its own."""

    def __init__(self, encoded: Path, folder: Path) -> None:
        self.project = Path(shutil.copytree(encoded, folder / "project"))
        self.home = folder / "slurm"
        write_commands(self.home)
        self.environment = environment(self.project) | {"PATH": path_with(self.home), "COCONUT_POLL_S": "0.1"}

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=self.project, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

    def repro(self) -> tuple[int, str]:
        """`dvc repro train@latent_1`, to its end."""
        process = self.start(sys.executable, "-m", "dvc", "repro", "train@latent_1")
        shown, _ = process.communicate(timeout=300)
        return process.returncode, shown

    def wait_for_state(self, process: subprocess.Popen[str]) -> None:
        """Return once the training of latent_1 has saved a state."""
        deadline = time.monotonic() + 120
        while not any(self.project.glob(".resume/train@latent_1-*/state-*")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no state came"
            time.sleep(0.02)

    def submitted(self) -> list[str]:
        return calls(self.home, "sbatch")


@pytest.fixture
def cluster(encoded: Path, tmp_path: Path) -> Any:
    found = Cluster(encoded, tmp_path)
    yield found
    for process in processes_in(found.project):  # Jobs outlive their driver, and must not outlive the test.
        process.kill()


def test_every_training_is_one_job_and_gives_the_bytes_of_two_processes(
    cluster: Cluster, straight: dict[str, Any]
) -> None:
    code, shown = cluster.repro()
    assert code == 0, shown
    assert trained(cluster.project) == straight
    assert [next(word for word in line.split() if "job-name" in word) for line in cluster.submitted()] == [
        "--job-name=train@cot",
        "--job-name=train@latent_1",
    ]
    assert all("--nodes=2 --gpus-per-node=8" in line and "--requeue" in line for line in cluster.submitted())
    assert "2 processes on cpu" in (cluster.project / "outputs/logs/train-latent_1.job.log").read_text()


def test_a_driver_that_was_killed_finds_its_job_and_waits_for_it(cluster: Cluster, straight: dict[str, Any]) -> None:
    driver = cluster.start(sys.executable, "-m", "dvc", "repro", "train@latent_1")
    cluster.wait_for_state(driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    num_jobs = len(cluster.submitted())
    code, shown = cluster.repro()
    assert code == 0, shown
    assert "runs it already; waiting for its end" in shown
    assert len(cluster.submitted()) == num_jobs
    assert trained(cluster.project) == straight


def test_a_job_of_other_inputs_is_cancelled(cluster: Cluster) -> None:
    driver = cluster.start(sys.executable, "-m", "dvc", "repro", "train@latent_1")
    cluster.wait_for_state(driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    write_params(cluster.project, {"curriculum.latent_1.lr": 5e-4, "curriculum.latent_1.epochs": 1})
    code, shown = cluster.repro()
    assert code == 0, shown
    assert "its inputs are others now" in shown
    assert len(calls(cluster.home, "scancel")) == 1
    assert "runs it already" not in shown


def test_a_job_that_is_stopped_has_saved_its_state(cluster: Cluster, straight: dict[str, Any]) -> None:
    driver = cluster.start(sys.executable, "-m", "dvc", "repro", "train@latent_1")
    cluster.wait_for_state(driver)
    number = max(int(path.name.removeprefix("job-")) for path in cluster.home.glob("job-*"))
    subprocess.run([str(cluster.home / "scancel"), str(number)], check=True)
    shown, _ = driver.communicate(timeout=60)
    assert driver.returncode != 0
    code, again = cluster.repro()
    assert code == 0, shown + again
    assert "resumed at update" in (cluster.project / "outputs/logs/train-latent_1.job.log").read_text()
    assert trained(cluster.project) == straight


def test_a_scheduler_that_does_not_answer_is_named(cluster: Cluster) -> None:
    (cluster.home / "away").touch()
    code, shown = cluster.repro()
    assert code != 0
    assert "sbatch: sbatch: error: Unable to contact slurm controller" in shown
    assert "Traceback" not in shown


def test_the_whole_pipeline_in_an_allocation_is_queued_again_when_its_time_is_over(
    straight: dict[str, Any], cluster: Cluster, tmp_path: Path
) -> None:
    write_params(cluster.project, {"runtime.processes": 2, "runtime.launcher": "none"})
    script = Path(__file__).parents[1] / "docs/slurm/pipeline.sbatch"
    text = script.read_text().replace("coconut overnight --jobs 0", "coconut overnight --jobs 1 train@latent_1")
    (cluster.project / "pipeline.sbatch").write_text(text)
    (cluster.home / "coconut").write_text(f'#!/bin/sh\nexec {sys.executable} -m coconut "$@"\n')
    (cluster.home / "coconut").chmod(0o755)
    for round_ in ("first", "second"):
        log = tmp_path / f"{round_}.log"
        submitted = subprocess.run(
            ["sbatch", f"--output={log}", "pipeline.sbatch"],
            cwd=cluster.project, env=cluster.environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        number = submitted.stdout.strip()
        state = ["squeue", f"--jobs={number}"]
        deadline = time.monotonic() + 180
        told = False
        while subprocess.run(state, env=cluster.environment, capture_output=True).returncode == 0:
            assert time.monotonic() < deadline, log.read_text()
            if round_ == "first" and not told and any(cluster.project.glob(".resume/train@latent_1-*/state-*")):
                subprocess.run(["scancel", number], env=cluster.environment, check=True)
                told = True
            time.sleep(0.05)
        requeued = [f"scontrol requeue {number}"] if round_ == "first" else []
        assert [line for line in calls(cluster.home, "scontrol") if number in line] == requeued, log.read_text()
    assert trained(cluster.project) == straight
