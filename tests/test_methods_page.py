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

from coconut.pipeline.states import last_update
from project import commit, environment, make_project, run, stages_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="trainers die with dvc on Linux only"),
]
PAGE = (Path(__file__).parents[1] / "docs/methods.md").read_text(encoding="utf-8")
(METHOD,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(ENTRY,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
FILE = "src/coconut/methods/mine.py"
ENTRY_NAME = "mine_1"
NUM_UPDATES = 12 * 96 // 16


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
    tree["runtime"]["save_every_s"] = 0
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    commit(trained)
    return trained


@pytest.fixture(scope="module")
def killed(project: Path) -> "subprocess.CompletedProcess[str]":
    """The `dvc repro` that finished the project after a kill in the middle of the entry's training."""
    kill_in_training(project)
    run(project, sys.executable, "-m", "coconut", "repair")
    return run(project, "dvc", "repro")


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
    """Begin `dvc repro`, and kill it without a warning once the entry has saved a state in its middle."""
    process = subprocess.Popen(
        ["dvc", "repro", f"train@{ENTRY_NAME}"],
        cwd=project,
        env=environment(project),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 300
        while saved_update(project) < NUM_UPDATES // 4:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < until, "it has saved no state"
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert saved_update(project) < NUM_UPDATES, "it had finished before it was killed"


def saved_update(project: Path) -> int:
    return max((last_update(folder) or 0 for folder in project.glob(f".resume/train@{ENTRY_NAME}-*")), default=0)


def test_the_example_is_short_and_passes_its_own_check(project: Path) -> None:
    assert len([line for line in METHOD.splitlines() if line.strip()]) <= 45
    done = run(project, sys.executable, "-m", "coconut", "check-method", "mine")
    assert "a resumed run ends with the bytes of an uninterrupted one" in done.stdout
    assert len(done.stdout.splitlines()) == 8


def test_the_example_has_the_style_of_the_package(project: Path) -> None:
    run(project, "ruff", "check", FILE)
    run(project, "ruff", "format", "--check", FILE)


def test_nothing_but_the_file_and_the_entry_is_touched(project: Path) -> None:
    changed = run(project, "git", "diff", "--name-only", "HEAD~1", "HEAD", "--", "src", "stages", "*.yaml", "*.toml")
    assert set(changed.stdout.split()) == {FILE, "params.yaml"}


def test_the_example_trains_alone_and_is_on_the_page(project: Path, killed: "subprocess.CompletedProcess[str]") -> None:
    assert trainings(killed.stdout) == {ENTRY_NAME}
    updates = project / "outputs" / ENTRY_NAME / "updates.csv"
    assert updates.read_bytes().splitlines()[0] == b"update,loss,lr,grad_norm,nll,length"
    for file in ("metrics.json", "thoughts.json", "predictions.jsonl"):
        assert (project / "outputs" / ENTRY_NAME / file).is_file()
    page = (project / "outputs/report/report.html").read_text(encoding="utf-8")
    assert ENTRY_NAME in page
    assert "Training loss: length" in page
    assert ENTRY_NAME in run(project, "dvc", "metrics", "show").stdout
    assert ENTRY_NAME in run(project, sys.executable, "-m", "coconut", "table").stdout
    assert ENTRY_NAME in run(project, sys.executable, "-m", "coconut", "compare", "workspace").stdout


def test_a_killed_training_resumes_to_the_bytes_of_a_straight_one(
    project: Path, killed: "subprocess.CompletedProcess[str]"
) -> None:
    (update,) = re.findall(rf"train@{ENTRY_NAME}: resumed at update (\d+)", killed.stdout + killed.stderr)
    assert 0 < int(update) < NUM_UPDATES
    resumed = bytes_of(project)
    shutil.rmtree(project / ".resume")
    straight = run(project, "dvc", "repro", "--force", "--single-item", f"train@{ENTRY_NAME}")
    assert f"{ENTRY_NAME}: before the first update" in straight.stdout + straight.stderr
    assert "resumed at" not in straight.stdout + straight.stderr
    assert bytes_of(project) == resumed


@pytest.mark.usefixtures("killed")
def test_its_results_are_pushed_with_the_others(project: Path, tmp_path: Path) -> None:
    run(project, "dvc", "remote", "add", "--local", "store", str(tmp_path / "store"))
    assert "up to date" not in run(project, "dvc", "push", "--remote", "store", f"train@{ENTRY_NAME}").stdout
    weights = project / "outputs" / ENTRY_NAME / "checkpoint/model.safetensors"
    pushed = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert weights.read_bytes() in pushed


@pytest.mark.usefixtures("killed")
def test_a_mistake_is_one_message_before_anything_trains(project: Path) -> None:
    path = project / "params.yaml"
    whole = path.read_text(encoding="utf-8")
    for old, new, *messages in (
        ("noise: 0.3", "noize: 0.3", "curriculum.mine_1.noize: unknown key; known here: parent", "did you mean noise?"),
        ("noise: 0.3", "noise: -1", "curriculum.mine_1.noise: "),
        (
            "noise: 0.3",
            "distill_weight: 1",
            "distill_weight: only for method codi or sim_codi, found method mine; take it out",
        ),
        (
            "method: mine",
            "method: mime",
            "found 'mime', wanted one of coconut, codi, cot, icot, mine",
            "did you mean mine?",
        ),
    ):
        assert whole.count(old) == 1
        path.write_text(whole.replace(old, new, 1), encoding="utf-8")
        done = run(project, "dvc", "repro", check=False)
        assert done.returncode != 0
        said = done.stdout + done.stderr
        assert [said.count(message) for message in messages] == [1] * len(messages)
        assert "stages/params.py, exited with 1" in said
        assert "Traceback" not in said
        assert trainings(done.stdout) == set()
    path.write_text(whole, encoding="utf-8")


@pytest.mark.usefixtures("killed")
def test_an_edit_trains_the_methods_own_entries_and_a_new_file_trains_nothing(project: Path) -> None:
    run(project, "dvc", "repro")  # Another test may have trained anew, whose seconds are in the evaluation.
    (project / "src/coconut/methods/other.py").write_text(METHOD.replace("class Mine", "class Other"), encoding="utf-8")
    assert set(stages_run(run(project, "dvc", "repro"))) <= {"code", "params", "report"}
    path = project / FILE
    path.write_text(METHOD.replace('"""Coconut with noise', '"""A comment more. Coconut with noise'), encoding="utf-8")
    assert trainings(run(project, "dvc", "repro").stdout) == set()
    path.write_text(METHOD.replace("min=1e-6", "min=1e-5"), encoding="utf-8")
    assert trainings(run(project, "dvc", "repro").stdout) == {ENTRY_NAME}


@pytest.mark.usefixtures("killed")
def test_an_exception_in_the_file_is_one_message_with_its_line(project: Path) -> None:
    path = project / FILE
    (line,) = [number for number, text in enumerate(METHOD.splitlines(), 1) if "reading.nll()" in text]
    path.write_text(METHOD.replace("reading.nll()", "reading.nl()"), encoding="utf-8")
    done = run(project, "dvc", "repro", check=False)
    path.write_text(METHOD, encoding="utf-8")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count(f"{FILE}:{line}: method mine cannot compute its loss: AttributeError") == 1
    assert f"stages/train.py {ENTRY_NAME}, exited with 1" in said
    assert "Traceback" not in said
