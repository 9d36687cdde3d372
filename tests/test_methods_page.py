"""docs/methods.md: its example, copied from the page into a project, goes through the whole pipeline."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from project import commit, environment, make_project, run

pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
(METHOD,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(ENTRY,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
FILE = "src/coconut/methods/mine.py"
ENTRY_NAME = "mine_1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that was trained before anybody thought of the method."""
    folder = make_project(tmp_path_factory.mktemp("page") / "p")
    run(folder, "dvc", "repro")
    return folder


@pytest.fixture(scope="module")
def project(trained: Path) -> Path:
    """The same with the page's file and entry, and nothing else."""
    (trained / FILE).write_text(METHOD, encoding="utf-8")
    path = trained / "params.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("curriculum:\n", f"curriculum:\n{ENTRY}", 1), encoding="utf-8")
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    tree["curriculum"][ENTRY_NAME]["epochs"] = 12  # Long enough to be killed in its middle.
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    commit(trained)
    return trained


def trainings(output: str) -> set[str]:
    """The entries whose training a `dvc repro` has run."""
    return set(re.findall(r"Running stage 'train@(\w+)'", output))


def bytes_of(project: Path) -> dict[str, bytes]:
    folder = project / "outputs" / ENTRY_NAME
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in [*folder.glob("checkpoint/*"), folder / "optimizer.safetensors", folder / "updates.csv"]
    }


def kill_in_training(project: Path) -> None:
    """Begin `dvc repro`, and kill it without a warning once the entry has saved a state."""
    process = subprocess.Popen(
        ["dvc", "repro", f"train@{ENTRY_NAME}"],
        cwd=project,
        env=environment(project),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while not list(project.glob(f".resume/train@{ENTRY_NAME}-*/state-*")) and time.monotonic() < until:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_example_is_short_and_passes_its_own_check(project: Path) -> None:
    assert len([line for line in METHOD.splitlines() if line.strip()]) <= 45
    done = run(project, sys.executable, "-m", "coconut", "check-method", "mine")
    assert "a resumed run ends with the bytes of an uninterrupted one" in done.stdout


def test_the_example_trains_alone_resumes_and_is_on_the_page(project: Path) -> None:
    tree = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    tree["runtime"]["save_every_s"] = 0
    (project / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    kill_in_training(project)
    run(project, sys.executable, "-m", "coconut", "repair")
    done = run(project, "dvc", "repro")
    assert trainings(done.stdout) == {ENTRY_NAME}
    assert "goes on from" in done.stdout + done.stderr or "resum" in done.stdout + done.stderr
    resumed = bytes_of(project)
    shutil.rmtree(project / ".resume")
    run(project, "dvc", "repro", "--force", "--single-item", f"train@{ENTRY_NAME}")
    straight = bytes_of(project)
    assert resumed == straight
    assert resumed["updates.csv"].splitlines()[0] == b"update,loss,lr,grad_norm,nll,length"
    for file in ("metrics.json", "thoughts.json", "predictions.jsonl"):
        assert (project / "outputs" / ENTRY_NAME / file).is_file()
    page = (project / "outputs/report/report.html").read_text(encoding="utf-8")
    assert ENTRY_NAME in page
    assert "Training loss: length" in page
    assert ENTRY_NAME in run(project, "dvc", "metrics", "show").stdout


def test_a_mistake_is_one_message_before_anything_trains(project: Path) -> None:
    path = project / "params.yaml"
    whole = path.read_text(encoding="utf-8")
    for old, new, message in (
        ("noise: 0.05", "noize: 0.05", "curriculum.mine_1.noize: unknown key"),
        ("noise: 0.05", "distill_weight: 1", "distill_weight: only for method codi, found method mine; take it out"),
        ("method: mine", "method: mime", "did you mean mine?"),
    ):
        path.write_text(whole.replace(old, new, 1), encoding="utf-8")
        done = run(project, "dvc", "repro", check=False)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert trainings(done.stdout) == set()
    path.write_text(whole, encoding="utf-8")


def test_an_edit_trains_the_methods_own_entries_and_a_new_file_trains_nothing(project: Path) -> None:
    (project / "src/coconut/methods/other.py").write_text(METHOD.replace("class Mine", "class Other"), encoding="utf-8")
    assert trainings(run(project, "dvc", "repro").stdout) == set()
    path = project / FILE
    path.write_text(METHOD.replace('"""Coconut with noise', '"""A comment more. Coconut with noise'), encoding="utf-8")
    assert trainings(run(project, "dvc", "repro").stdout) == set()
    path.write_text(METHOD.replace("/ wanted - 1)", "/ wanted - 2)"), encoding="utf-8")
    assert trainings(run(project, "dvc", "repro").stdout) == {ENTRY_NAME}


def test_an_exception_in_the_file_is_one_message_with_its_line(project: Path) -> None:
    path = project / FILE
    line = METHOD.splitlines().index('        parts = {"nll": reading.nll()}') + 1
    path.write_text(METHOD.replace("reading.nll()", "reading.nl()"), encoding="utf-8")
    done = run(project, "dvc", "repro", check=False)
    path.write_text(METHOD, encoding="utf-8")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert f"{FILE}:{line}: method mine cannot compute its loss: AttributeError" in said
    assert "Traceback" not in said
