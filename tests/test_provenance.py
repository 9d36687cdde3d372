"""Which results are of this run: a pipeline of literal files, judged by its dvc.lock."""

import json
import subprocess
import sys

import pytest
import yaml

from coconut.layout import OUTPUTS_DIR
from coconut.pipeline.record import md5_as_dvc
from coconut.pipeline.status import stage_rows
from coconut.report.page import write_report
from coconut.report.provenance import judge
from coconut.report.reading import read_folder
from coconut.report.results import read_results
from coconut.report.tables import accuracy_table
from fake_outputs import CURRICULUM, default_tree, fake_params, write_entry, write_outputs

PIPELINE = """
stages:
  train:
    foreach: ${curriculum}
    do:
      cmd: python train.py ${key}
      deps: [train.py]
      params: ["curriculum.${key}"]
      outs: ["outputs/${key}/history.csv"]
  evaluate:
    foreach: ${curriculum}
    do:
      cmd: python evaluate.py ${key}
      deps: [evaluate.py, "outputs/${key}/history.csv"]
      metrics: [{"outputs/${key}/metrics.json": {cache: false}}]
      outs: ["outputs/${key}/predictions.jsonl"]
  report:
    cmd: python report.py
    deps: [report.py]
    outs: [outputs/report]
"""


@pytest.fixture
def root(tmp_path):
    """A work tree in which every stage is up to date."""
    (tmp_path / "params.yaml").write_text(json.dumps(default_tree()))
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    for script in ("train", "evaluate", "report"):
        (tmp_path / f"{script}.py").write_text("pass\n")
    write_outputs(tmp_path / OUTPUTS_DIR)
    (tmp_path / OUTPUTS_DIR / "report").mkdir()
    stages = {"report": record(tmp_path, "python report.py", ["report.py"], ["outputs/report"])}
    for name, entry in CURRICULUM.items():
        history, metrics, predictions = (
            f"outputs/{name}/{file}" for file in ("history.csv", "metrics.json", "predictions.jsonl")
        )
        trained = record(tmp_path, f"python train.py {name}", ["train.py"], [history])
        trained["params"] = {"params.yaml": {f"curriculum.{name}": entry}}
        stages[f"train@{name}"] = trained
        command = f"python evaluate.py {name}"
        stages[f"evaluate@{name}"] = record(tmp_path, command, ["evaluate.py", history], [metrics, predictions])
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    return tmp_path


def record(root, command, deps, outs):
    files = {
        key: [{"path": path, "md5": md5_as_dvc(root / path)} for path in paths]
        for key, paths in (("deps", deps), ("outs", outs))
    }
    return {"cmd": command, **files}


def labels(root):
    results = read_results(fake_params().curriculum, read_folder(root / OUTPUTS_DIR), marks=judge(root).marks)
    return [row[0] for row in accuracy_table(results).rows]


def coconut(root, *command):
    return subprocess.run(
        [sys.executable, "-m", "coconut", *command], cwd=root, capture_output=True, text=True, check=False
    )


def test_what_is_up_to_date_has_no_mark(root):
    assert labels(root) == ["cot", "latent_1", "latent_2", "no_cot"]
    assert judge(root).table().rows == []
    assert coconut(root, "report").stdout == "outputs/report/report.html\n"
    assert not (root / "outputs/partial-report").exists()


def test_numbers_of_other_code_or_params_are_of_another_run(root):
    (root / "evaluate.py").write_text("other\n")
    assert labels(root) == [f"{name} (of another run)" for name in CURRICULUM]
    (root / "evaluate.py").write_text("pass\n")
    curriculum = CURRICULUM | {"no_cot": CURRICULUM["no_cot"] | {"lr": 0.1}}
    (root / "params.yaml").write_text(json.dumps(default_tree(curriculum=curriculum)))
    assert labels(root) == ["cot", "latent_1", "latent_2", "no_cot (of another run)"]


def test_numbers_without_their_predictions_came_with_the_repository(root):
    for path in root.glob("outputs/*/predictions.jsonl"):
        path.unlink()
    assert labels(root) == [f"{name} (shipped)" for name in CURRICULUM]
    table = coconut(root, "table")
    assert table.returncode == 0
    assert "(shipped): the numbers came with the repository and were not made here. `dvc repro` makes" in table.stdout


@pytest.mark.parametrize("file", ["metrics.json", "predictions.jsonl"])
def test_figures_that_the_recorded_run_did_not_leave_are_of_another_run(root, file):
    path = root / "outputs/no_cot" / file
    path.write_bytes((root / "outputs/cot" / file).read_bytes())
    assert labels(root) == ["cot", "latent_1", "latent_2", "no_cot (of another run)"]
    row = next(row for row in stage_rows(root) if row.stage == "evaluate@no_cot")
    assert (row.state, row.detail) == ("to do", f"outputs/no_cot/{file} is not what its run left")


def test_shipped_figures_that_are_not_those_of_dvc_lock_are_of_another_run(root):
    for path in root.glob("outputs/*/predictions.jsonl"):
        path.unlink()
    (root / "outputs/cot/metrics.json").write_bytes((root / "outputs/no_cot/metrics.json").read_bytes())
    assert labels(root) == ["cot (of another run)", "latent_1 (shipped)", "latent_2 (shipped)", "no_cot (shipped)"]


def test_answers_that_do_not_give_the_accuracy_are_marked_whatever_dvc_lock_says(root):
    path = root / "outputs/cot/predictions.jsonl"
    path.write_text(path.read_text().replace('"right": true', '"right": false', 1))
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    lock["stages"]["evaluate@cot"]["outs"][1]["md5"] = md5_as_dvc(path)
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert labels(root)[0] == "cot (answers at odds)"
    table = coconut(root, "table").stdout
    assert "the right answers in its predictions do not give the accuracy in its metrics.json" in table


def test_an_entry_trained_anew_but_not_yet_evaluated_is_marked_in_its_scores_alone(root):
    history = "outputs/cot/history.csv"
    (root / history).write_text((root / history).read_text() + "\n")
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    lock["stages"]["train@cot"]["outs"][0]["md5"] = md5_as_dvc(root / history)
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    marks = judge(root).marks
    assert "train@cot" not in marks
    assert marks["evaluate@cot"] == "of another run"
    (cot, *_) = read_results(fake_params().curriculum, read_folder(root / OUTPUTS_DIR), marks=marks)
    assert (cot.label, cot.training_label) == ("cot (of another run)", "cot")


def test_the_untouched_model_is_judged_by_its_own_stage(root):
    write_entry(root / OUTPUTS_DIR, "base", right="+")
    (root / "base.py").write_text("pass\n")
    stage = (
        "\n  evaluate_base:\n    cmd: python base.py\n    deps: [base.py]\n    outs: [outputs/base/predictions.jsonl]\n"
    )
    (root / "dvc.yaml").write_text(PIPELINE.rstrip() + stage)
    assert labels(root)[0] == "base (of another run)"


def test_a_merge_in_dvc_lock_is_named_by_table_and_plan(root):
    lock = (root / "dvc.lock").read_text()
    (root / "dvc.lock").write_text(f"<<<<<<< HEAD\n{lock}=======\n{lock}>>>>>>> other\n")
    named = "dvc.lock: line 1 holds <<<<<<<, the mark of a merge; keep one side of it, and delete the marks"
    assert labels(root) == [f"{name} (of another run)" for name in CURRICULUM]
    assert f"of the present params.yaml is not known: {named}" in coconut(root, "table").stdout
    assert f"\n{named}" in coconut(root, "plan", "--no-measure").stdout


def test_without_a_pipeline_nothing_is_known_and_the_table_says_so(root):
    (root / "dvc.yaml").unlink()
    table = coconut(root, "table")
    assert "cot " in table.stdout
    assert "Whether these numbers are of the present params.yaml is not known: dvc.yaml: no such file" in table.stdout


def test_a_partial_page_says_which_stages_are_not_done_and_marks_its_rows(root):
    (root / "outputs/no_cot/predictions.jsonl").unlink()
    (root / "outputs/no_cot/metrics.json").unlink()
    (root / "train.py").write_text("other\n")
    done = coconut(root, "report")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "8 stages are not up to date; the page says why.",
        "outputs/partial-report/report.html",
    ]
    text = (root / "outputs/partial-report/report.md").read_text()
    assert "## This page is partial" in text
    assert "| train@cot         | to do   | train.py changed   |" in text
    assert "| cot (of another run)      | cot     |" in text
    assert "| no_cot " in text
    assert "no_cot (of" not in text.partition("## Results")[2].partition("## ")[0], "it has no numbers"


def test_files_of_an_earlier_partial_page_do_not_stay(root):
    (root / "outputs/partial-report").mkdir()
    (root / "outputs/partial-report/old.svg").write_text("")
    (root / "train.py").write_text("other\n")
    assert coconut(root, "report").returncode == 0
    assert not (root / "outputs/partial-report/old.svg").exists()


def test_the_stage_itself_does_not_count(root, tmp_path):
    (root / "report.py").write_text("other\n")
    provenance = judge(root, ignore=["report"])
    write_report(fake_params(), root / OUTPUTS_DIR, tmp_path / "page", provenance)
    assert "partial" not in (tmp_path / "page/report.md").read_text()
