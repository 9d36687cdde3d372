"""docs/extending.md: its files, copied from the page into a project, are used, and train nothing again."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from coconut.pipeline.stage_code import describe_code, stage_code
from project import ROOT, commit, make_project, run, stages_run, write_params

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
FILES = {f"src/{file}": text for file, text in re.findall(r"`(coconut/\S+\.py)`:\n\n```python\n(.*?)```", PAGE, re.S)}
TASK, TESTS = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S))
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "stages").glob("*.py"))
USERS = {"generators": "stages/preprocess.py", "presets": "stages/preprocess.py", "added": "stages/probe.py"}
"""The one stage in whose digests a file of each folder stands."""


def digests(project: Path) -> dict[str, str]:
    return {script: describe_code(stage_code(script, project)) for script in SCRIPTS}


def add(project: Path, file: str) -> None:
    assert not (project / file).exists()
    (project / file).write_text(FILES[file], encoding="utf-8")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("page") / "fresh")


def test_the_page_shows_a_file_of_each_folder() -> None:
    assert sorted(Path(file).parent.name for file in FILES) == sorted(USERS)


@pytest.mark.parametrize("file", FILES)
def test_a_new_file_is_in_the_digests_of_its_one_user(fresh: Path, file: str) -> None:
    before = digests(fresh)
    add(fresh, file)
    after = digests(fresh)
    (fresh / file).unlink()
    assert [script for script in SCRIPTS if after[script] != before[script]] == [USERS[Path(file).parent.name]]


@pytest.mark.parametrize("file", FILES)
def test_the_files_have_the_style_of_the_package(fresh: Path, file: str) -> None:
    add(fresh, file)
    run(fresh, "ruff", "check", file)
    run(fresh, "ruff", "format", "--check", file)
    (fresh / file).unlink()


def test_a_task_a_preset_and_a_test_set_are_read(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p")
    for file in FILES:
        add(project, file)
    write_params(project, {"data.generator": TASK["generator"], "data.tests": TESTS["tests"]})
    row = {"context": "Tom has 3.", "question": "He gets 2. How many?", "solution": "3+2 is 5. So 5.", "result": 5}
    (project / "data/raw/ours.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    run(project, "python", "stages/preprocess.py")
    first = json.loads((project / "data/examples/train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    bits = [int(bit) for bit in first["question"].split()[:-1]]
    assert len(bits) == 12
    assert first["steps"] == [str(sum(bits[: place + 1]) % 2) for place in range(12)]
    (ours,) = (project / "data/examples/tests/ours.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(ours)["question"] == "Tom has 3. He gets 2. How many?"
    assert json.loads(ours)["answer"] == "5"


def test_what_is_wrong_with_a_file_is_said_where_it_is_named_alone(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p")
    for folder in ("generators", "presets"):
        (project / f"src/coconut/data/{folder}/broken.py").write_text("import nowhere\n", encoding="utf-8")
    run(project, "python", "stages/params.py")
    for change, package in (
        ({"data.generator": {"task": "broken"}}, "generators"),
        ({"data.generator": {"task": "search", "branches": 2, "hops": 2, "edges": "words"}}, ""),
        ({"data.tests.test.format": "broken"}, "presets"),
    ):
        write_params(project, change)
        done = run(project, "python", "stages/params.py", check=False)
        said = done.stdout + done.stderr
        message = f"coconut.data.{package}.broken cannot be imported (ModuleNotFoundError: No module named 'nowhere')"
        assert (done.returncode, message in said) == ((1, True) if package else (0, False))
        assert "Traceback" not in said


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="trainers die with dvc on Linux only")
def test_nothing_is_trained_because_of_a_file_and_the_probe_is_taken(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p")
    run(project, "dvc", "repro", "probe@latent_1", "evaluate@latent_1")
    commit(project)
    for file in FILES:
        add(project, file)
    done = run(project, "dvc", "repro", "probe@latent_1", "evaluate@latent_1")
    assert set(stages_run(done)) == {"code", "preprocess", "probe@latent_1"}
    touched = run(
        project, "git", "status", "--porcelain", "--untracked-files=all", "--", "src", "stages", "params.yaml"
    )
    assert sorted(line.split()[-1] for line in touched.stdout.splitlines()) == sorted(FILES)
    rows = csv.DictReader((project / "outputs/latent_1/thoughts.csv").read_text(encoding="utf-8").splitlines())
    assert [row["thought"] for row in rows if row["measure"] == "norm"] == ["1"]
