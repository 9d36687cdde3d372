"""The real dvc.yaml, from raw data to the report, on a recipe of seconds."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from inprocess import canonical_splits, sums, write_rows
from project import commit, make_project, run, stages_run, write_params

pytestmark = pytest.mark.slow

ENTRIES = ["cot", "latent_1", "latent_2", "no_cot"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after its first `dvc repro`, committed."""
    project = make_project(tmp_path_factory.mktemp("pipeline") / "project")
    run(project, "dvc", "repro")
    commit(project)
    return project


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project for one test."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, symlinks=True)
    return copy


def weights_bytes(project: Path, entry: str) -> bytes:
    return (project / "outputs" / entry / "checkpoint/model.safetensors").read_bytes()


def test_one_command_makes_every_output(finished: Path) -> None:
    for entry in ENTRIES:
        folder = finished / "outputs" / entry
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["num_examples"] == 16
        assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
        assert json.loads((folder / "costs.json").read_text())["train_updates"] == {"cot": 12}.get(entry, 6)
        assert len((folder / "predictions.jsonl").read_text().splitlines()) == 16
        assert (folder / "history.csv").is_file()
    assert (finished / "outputs/report/report.md").is_file()
    assert len(list((finished / "outputs/report").glob("*.svg"))) >= 4


def test_every_entry_has_the_same_metrics_in_the_same_order(finished: Path) -> None:
    keys = [list(json.loads((finished / "outputs" / entry / "metrics.json").read_text())) for entry in ENTRIES]
    assert keys[0][:4] == ["accuracy", "accuracy_low", "accuracy_high", "num_examples"]
    assert all(other == keys[0] for other in keys)


def test_metrics_show_has_one_row_per_entry(finished: Path) -> None:
    shown = json.loads(run(finished, "dvc", "metrics", "show", "--json").stdout)
    files = shown["workspace" if "workspace" in shown else ""]["data"]
    assert sorted(files) == sorted(f"outputs/{entry}/metrics.json" for entry in [*ENTRIES, "base"])


def test_metrics_diff_after_scoring_again_is_empty(project: Path) -> None:
    done = run(project, "dvc", "repro", "--force", "--single-item", "evaluate@cot")
    assert "is empty" not in done.stdout + done.stderr, "one set leaves no folder without a file"
    assert run(project, "dvc", "metrics", "diff", "--json").stdout.strip() == "{}"


def test_a_second_repro_does_nothing(project: Path) -> None:
    again = run(project, "dvc", "repro")
    assert stages_run(again) == []
    assert "up to date" in again.stdout


@pytest.mark.long
def test_one_entrys_learning_rate_trains_it_and_what_follows_it_and_nothing_else(project: Path) -> None:
    done = run(project, "dvc", "exp", "run", "-S", "curriculum.latent_2.lr=5e-5")
    order = ["params", "train@latent_2", "evaluate@latent_2", "probe@latent_2", "report"]
    assert sorted(stages_run(done), key=order.index) == order
    changed = json.loads(run(project, "dvc", "metrics", "diff", "--json", "HEAD").stdout)
    assert all(name == "diff" or name.startswith("outputs/latent_2/") for name in changed)


@pytest.mark.parametrize("change", ["runtime.log_every_s=1", "runtime.micro_batch=4", "runtime.save_every_s=0"])
def test_knobs_that_cannot_change_a_result_train_nothing(project: Path, change: str) -> None:
    assert stages_run(run(project, "dvc", "exp", "run", "-S", change)) == ["params"]


@pytest.mark.long
def test_an_entry_added_on_the_command_line_trains_alone(project: Path) -> None:
    entry = "{parent: cot, method: pause_as_thought, latent_stage: 2, epochs: 1, lr: 1e-3}"
    done = run(project, "dvc", "exp", "run", "-S", f"+curriculum.pause={entry}")
    order = ["params", "train@pause", "evaluate@pause", "probe@pause", "report"]
    assert sorted(stages_run(done), key=order.index) == order


@pytest.mark.long
def test_the_same_seed_gives_the_same_bytes_twice(finished: Path, tmp_path: Path) -> None:
    second = make_project(tmp_path / "second")
    run(second, "dvc", "repro", "evaluate@latent_2")
    for entry in ("base", "cot", "latent_1", "latent_2"):
        assert weights_bytes(second, entry) == weights_bytes(finished, entry), entry
    ours, theirs = ((p / "outputs/latent_2/predictions.jsonl").read_bytes() for p in (finished, second))
    assert ours == theirs


def test_the_scripts_work_without_dvc(project: Path) -> None:
    before = weights_bytes(project, "latent_1")
    shutil.rmtree(project / "outputs/latent_1")
    run(project, "python", "stages/train.py", "latent_1")
    assert weights_bytes(project, "latent_1") == before


def test_two_processes_give_the_weights_of_one_to_float_rounding(project: Path) -> None:
    one = load_file(project / "outputs/latent_1/checkpoint/model.safetensors")
    before = weights_bytes(project, "latent_1")
    shutil.rmtree(project / "outputs/latent_1")
    shutil.rmtree(project / ".resume")
    # With --cpu accelerate starts one process, unless there is an mpirun; --multi_gpu is what makes it start
    # several, and runtime.device: cpu then puts them on the CPU, with gloo.
    launch = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    options = (
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(20_000 + os.getpid() % 20_000),
    )
    done = run(project, *launch, *options, "stages/train.py", "latent_1")
    assert "2 processes" in done.stderr
    two = load_file(project / "outputs/latent_1/checkpoint/model.safetensors")
    assert weights_bytes(project, "latent_1") != before, "two processes add up in another order"
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() < 1e-4, name


def test_a_checkpoint_opens_without_our_code(finished: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('3 + 2 * 5 ?', return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=3).shape[0])\n"
        "assert 'coconut' not in sys.modules"
    )
    assert run(finished, "python", "-c", code, "outputs/latent_2/checkpoint").stdout.strip() == "1"


def test_the_reasoner_answers_as_the_evaluation_did(finished: Path) -> None:
    code = (
        "import json; from coconut import Example, Reasoner\n"
        "reasoner = Reasoner.from_pretrained('outputs/latent_2/checkpoint')\n"
        "rows = [json.loads(line) for line in open('data/examples/test.jsonl')]\n"
        "wanted = [json.loads(line) for line in open('outputs/latent_2/predictions.jsonl')]\n"
        "solutions = reasoner.solve([row['question'] for row in rows], max_new_tokens=6)\n"
        "assert [s.text for s in solutions] == [w['text'] for w in wanted]\n"
        "assert [s.answer for s in solutions] == [w['answer'] for w in wanted]\n"
        "assert {s.num_thoughts for s in solutions} == {2}\n"
        "nll, count = reasoner.nll([Example(**row) for row in rows], latent_stage=2)\n"
        "nll.backward()\n"
        "loss = json.load(open('outputs/latent_2/metrics.json'))['loss']\n"
        "assert abs(float(nll) / count - loss) < 1e-5, (float(nll) / count, loss)\n"
        "print('ok')"
    )
    assert run(finished, "python", "-c", code).stdout.strip() == "ok"


def test_a_failed_gate_stops_its_children_and_nothing_else(project: Path) -> None:
    write_params(project, {"curriculum.latent_1.min_accuracy": 1.0, "curriculum.no_cot.lr": 1e-3})
    done = run(project, "dvc", "repro", "-k", check=False)
    assert done.returncode != 0
    assert "train@latent_1: curriculum.latent_1.min_accuracy: validation accuracy" in done.stderr + done.stdout
    ran = stages_run(done)
    assert {"train@latent_1", "train@no_cot", "evaluate@no_cot"} <= set(ran)
    assert "train@latent_2" not in ran
    # The training itself is finished and kept: a lower gate lets it through without an update.
    write_params(project, {"curriculum.latent_1.min_accuracy": 0.0})
    again = run(project, "dvc", "repro", "-k")
    assert "resumed at update 6" in again.stderr + again.stdout


def test_an_experiment_in_a_work_tree_of_its_own_finds_the_data_and_the_model_that_dvc_tracks(tmp_path: Path) -> None:
    """`--temp` and the queue see what git has: not the user's files, but what `dvc add` writes of them."""
    project = make_project(tmp_path / "project", canonical_splits())
    write_rows(project, sums(80))
    shutil.copytree(project / "models/tiny", project / "models/mine")
    run(project, "dvc", "add", "-q", "data/raw/rows.json", "models/mine")
    commit(project)
    tracked = run(project, "git", "ls-files", "data/raw", "models").stdout.split()
    assert {"data/raw/rows.json.dvc", "models/mine.dvc"} <= set(tracked)
    assert not [path for path in tracked if path.endswith("rows.json") or path.startswith("models/mine/")]
    done = run(project, "dvc", "exp", "run", "--temp", "-S", "model=models/mine", "base")
    assert {"preprocess", "base"} <= set(stages_run(done))
