"""How a stage's process begins and ends: with dvc, and with the inputs that it began with."""

import ast
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.signals import GRACE_S
from coconut.pipeline.stage import run_stage
from inprocess import canonical_splits, make_folder, stage, succeed, sums, write_rows
from project import ROOT, environment, run, write_params

SCRIPTS = sorted((ROOT / "stages").glob("*.py"))
# Many rows, so that the stage is at work for seconds; it waits for its raw files at the first.
LONG = {
    "data.train.rows": 300_000,
    "data.generator": {"task": "chained_arithmetic", "num_operations": 6, "modulus": 11},
}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_nothing_but_its_frame_before_it_begins(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [one.rpartition(" import ")[0] for one in imports] == ["", "from pathlib", "from coconut.pipeline.stage"]
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':\n    run_script(load, ")


SCRIPT = """
import gc, signal
from coconut.pipeline.stage import run_script

def load():
    print("loads", signal.getsignal(signal.SIGTERM).__name__, gc.isenabled())
    return lambda entry, inputs: print("works", entry, inputs and inputs.stage, gc.isenabled())

run_script(load, "train", of_entry=True)
"""


def test_a_script_begins_then_imports_then_works(tmp_path: Path) -> None:
    """By hand it works without inputs; its log has the stage's name in any case."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "stage.py").write_text(SCRIPT)
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  train:\n    foreach: ${curriculum}\n    do: {cmd: 'python stage.py ${key}'}"
    )
    (tmp_path / "params.yaml").write_text("curriculum: {cot: {}}")
    for entry, name, inputs in (("cot", "train-cot", "train@cot"), ("base", "train_base", "None")):
        done = run(tmp_path, "python", "stage.py", entry)
        assert done.stdout == f"loads _end False\nworks {entry} {inputs} True\n"
        assert (tmp_path / f"outputs/logs/{name}.log").exists()
    done = run(tmp_path, "python", "stage.py", check=False)
    assert done.returncode == 2
    assert "the following arguments are required: entry" in done.stderr


def test_beginning_needs_no_torch() -> None:
    code = "import sys, coconut.pipeline.stage; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def start_preprocess(project: Path) -> subprocess.Popen[str]:
    """`python stages/preprocess.py`, once it has begun: its log file is there."""
    process = subprocess.Popen(
        [sys.executable, "stages/preprocess.py"],
        cwd=project,
        env=environment(project),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (project / "outputs/logs/preprocess.log").exists():
        assert time.monotonic() < deadline, "never began"
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_an_edit_while_a_stage_runs_is_refused(tmp_path: Path) -> None:
    project = make_folder(tmp_path / "project", LONG)
    succeed(project, "digest_code", "params")
    edited = tmp_path / "edited"
    edited.mkdir()
    shutil.copy(project / "params.yaml", edited)
    write_params(edited, {"data.train.rows": 500})
    process = start_preprocess(project)
    (edited / "params.yaml").replace(project / "params.yaml")  # In one stroke: the stage may be reading it.
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "preprocess: changed while it ran: params.yaml: data. Its outputs do not count" in errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="stages die with dvc on Linux only")
def test_no_stage_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    project = make_folder(tmp_path / "project", LONG)
    succeed(project, "digest_code", "params")
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess; subprocess.run(['python', 'stages/preprocess.py'])"],
        cwd=project, env=environment(project), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (project / "outputs/logs/preprocess.log").exists():
        assert time.monotonic() < deadline, "never began"
        time.sleep(0.01)
    (child,) = psutil.Process(parent.pid).children()
    child.suspend()  # As one that hangs in the disk, which would go on after another run has begun.
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    child.resume()
    child.wait(timeout=20)
    assert not list((project / "data").glob("examples/*.jsonl"))


def test_a_stage_whose_inputs_changed_ends_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_folder(tmp_path / "project", {})
    succeed(project, "digest_code", "params")
    monkeypatch.chdir(project)
    inputs = StageInputs.read("preprocess")

    run_stage(lambda: None, "preprocess", inputs=inputs)
    with pytest.raises(SystemExit) as end:
        run_stage(lambda: write_params(project, {"data.seed": 7}), "preprocess", inputs=inputs)
    assert end.value.code == 1
    assert "preprocess: changed while it ran: params.yaml: data." in capsys.readouterr().err


def test_code_that_was_edited_since_the_pipeline_began_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = make_folder(tmp_path / "project", {})
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "src").unlink()
    (tmp_path / "src").rename(project / "src")
    succeed(project, "digest_code", "params")
    monkeypatch.chdir(project)
    module = project / "src/coconut/data/preprocessing.py"
    module.write_text(module.read_text(encoding="utf-8") + "# A comment.\n", encoding="utf-8")
    run_stage(lambda: None, "preprocess", inputs=StageInputs.read("preprocess"))

    module.write_text(module.read_text(encoding="utf-8") + "EDITED = 1\n", encoding="utf-8")
    for cure in (lambda: None, (project / "outputs/code/preprocess.txt").unlink):
        cure()
        with pytest.raises(SystemExit):
            run_stage(lambda: pytest.fail("it ran"), "preprocess", inputs=StageInputs.read("preprocess"))
    errors = capsys.readouterr().err
    assert "written for other code than there is now (src/coconut/data/preprocessing.py), so DVC would record" in errors
    assert "outputs/code/preprocess.txt: no such file, wanted the digests of this stage's code; `dvc repro`" in errors


# --- before a night is spent ----------------------------------------------------------------


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    project = make_folder(tmp_path / "project", canonical_splits())
    write_rows(project, sums(80))
    succeed(project, "preprocess", "base", "encode")
    return project


def test_the_first_stage_refuses_a_layer_that_a_later_one_would_lack(encoded: Path) -> None:
    write_params(encoded, {"curriculum.latent_2.thought": "hidden[40]"})
    assert (
        "curriculum.latent_2.thought: found layer 40, but the model has 3 layers" in stage(encoded, "train@cot").error
    )


def test_an_entrys_own_thoughts_that_do_not_fit_the_positions_are_an_error_before_any_entry_trains(
    encoded: Path,
) -> None:
    write_params(encoded, {"curriculum.latent_1.c_thought": 60})
    error = stage(encoded, "train@cot").error
    assert "curriculum.latent_1.method: row " in error
    assert "columns in a layout of method coconut, wanted at most the model's" in error
    assert "take fewer thoughts (c_thought, max_latent_stage, num_thoughts)" in error


def test_thoughts_that_an_entry_never_shows_need_no_positions(encoded: Path) -> None:
    """Its two stages would take 2 x 28 of the 64 positions and more; it shows the first alone."""
    own = {"c_thought": 28, "uniform_prob": 0.0}
    write_params(encoded, {f"curriculum.latent_1.{key}": value for key, value in own.items()})
    succeed(encoded, "train@cot", "train@latent_1")
    write_params(encoded, {"curriculum.latent_1.uniform_prob": 0.3})
    assert "curriculum.latent_1.method: row " in stage(encoded, "train@latent_1").error


def test_an_icot_entry_goes_on_where_its_parents_schedule_ended(encoded: Path) -> None:
    first = {
        "parent": "base",
        "method": "icot",
        "latent_stage": 0,
        "epochs": 1,
        "lr": 2e-3,
        "icot_tokens_per_epoch": 1.0,
        "icot_smoothing": 4.0,
    }
    names = ("one", "two", "three")
    entries = {name: first | {"parent": parent} for name, parent in zip(names, ("base", *names), strict=False)}
    write_params(encoded, {"curriculum": entries})
    succeed(encoded, *(f"train@{name}" for name in names))
    metas = [json.loads((encoded / f"outputs/{name}/checkpoint/coconut.json").read_text()) for name in names]
    assert [(meta["num_removed_tokens"], meta["num_removed_at_end"]) for meta in metas] == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.skipif(sys.platform != "linux", reason="stages die with dvc on Linux only")
@pytest.mark.parametrize(
    ("hook", "work"),
    [("pass", "pool.map(abs, range(4))"), ("os.register_at_fork(after_in_child=lambda: time.sleep(1))", "pass")],
    ids=["idle", "forking"],
)
def test_a_stage_that_is_told_to_end_leaves_no_worker_behind(tmp_path: Path, hook: str, work: str) -> None:
    """Neither where the workers wait for work, nor where they still run what Python runs first in a fork."""
    code = (
        f"import multiprocessing as m, os, sys, time\nfrom coconut.pipeline.stage import begin\nbegin()\n{hook}\n"
        f"with m.Pool(2) as pool:\n    {work}\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert psutil.wait_procs(workers, timeout=30)[1] == []


def test_a_stage_ends_in_time_where_python_swallows_what_the_signal_raises(tmp_path: Path) -> None:
    code = (
        "import signal, time\nfrom coconut.pipeline.stage import begin\nbegin()\n"
        "class Slow:\n    def __del__(self):\n        print('ready', flush=True)\n        time.sleep(60)\n"
        "Slow()\nleft = signal.alarm(0)\nprint(left, flush=True)\nsignal.alarm(min(left, 1))\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert 0 < int(process.stdout.readline()) <= GRACE_S
    assert process.wait(timeout=30) == -signal.SIGALRM
