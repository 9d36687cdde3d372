import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

import standin
import waiting
from coconut.files import try_lock
from coconut.pipeline.events import last_run
from coconut.pipeline.inputs import fingerprint
from coconut.pipeline.record import md5_as_dvc
from coconut.pipeline.resume import ResumeStore
from coconut.pipeline.status import Row, render, stage_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the pipeline's guards are Linux only")
wait_for = partial(waiting.wait_for, seconds=60)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = standin.make_repository(tmp_path_factory.mktemp("finished") / "repository")
    assert standin.run(root, "dvc", "repro").returncode == 0
    return root


@pytest.fixture
def root(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "repository"))


def states(root: Path) -> dict[str, str]:
    return {row.stage: row.state for row in stage_rows(root)}


def details(root: Path) -> dict[str, str]:
    return {row.stage: row.detail for row in stage_rows(root)}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.slow
def test_a_finished_pipeline_is_done(root):
    assert states(root) == {"base": "done", "train@cot": "done", "train@latent_1": "done", "train@no_cot": "done"}


def test_nothing_is_done_before_the_first_run(tmp_path):
    root = standin.make_repository(tmp_path)
    assert stage_rows(root) == [
        Row("base", "to do", "never ran"),
        Row("train@cot", "waiting", "for base"),
        Row("train@latent_1", "waiting", "for train@cot"),
        Row("train@no_cot", "waiting", "for base"),
    ]


@pytest.mark.slow
def test_a_changed_parameter_makes_its_stage_out_of_date_and_the_next_wait(root):
    replace(
        root / "params.yaml", "latent_1: {parent: cot, num_updates: 20}", "latent_1: {parent: cot, num_updates: 21}"
    )
    assert states(root)["train@cot"] == "done"
    assert details(root)["train@latent_1"] == "curriculum.latent_1 changed"
    replace(root / "params.yaml", "cot: {parent: base, num_updates: 20}", "cot: {parent: base, num_updates: 2.2e+01}")
    assert details(root)["train@cot"] == "curriculum.cot changed"
    assert details(root)["train@latent_1"] == "for train@cot"


def test_a_value_written_differently_is_no_change(root):
    replace(root / "params.yaml", "num_updates: 20", "num_updates: 2e+01  # the same\n   ")
    assert set(states(root).values()) == {"done"}


def test_changed_code_lost_outputs_and_a_changed_command_are_named(root):
    (root / "outputs/no_cot").unlink()
    assert details(root)["train@no_cot"] == "outputs/no_cot is gone"
    replace(root / "dvc.yaml", "python stage.py base", "python  stage.py base")
    with (root / "stage.py").open("a") as file:
        file.write("\n")
    assert details(root)["base"] == "cmd changed, stage.py changed"
    assert details(root)["train@no_cot"] == "for base"


def test_a_stage_that_dvc_ran_again_upstream_is_out_of_date_by_the_recorded_hashes(root):
    (root / "outputs/base").unlink()  # It may be a link into DVC's cache.
    (root / "outputs/base").write_text("another\n")
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    lock["stages"]["base"]["outs"][0]["md5"] = md5_as_dvc(root / "outputs/base")
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert details(root) == {
        "base": "",
        "train@cot": "outputs/base changed",
        "train@latent_1": "for train@cot",
        "train@no_cot": "outputs/base changed",
    }


def test_an_output_that_its_run_did_not_leave_is_out_of_date(root):
    (root / "outputs/cot").unlink()
    (root / "outputs/cot").write_text("edited\n")
    assert details(root)["train@cot"] == "outputs/cot is not what its run left"
    assert states(root)["train@latent_1"] == "waiting"


@pytest.mark.slow
def test_a_stage_that_failed_shows_its_error_until_it_ran_well(root):
    replace(root / "params.yaml", "num_updates: 20", "num_updates: 30")
    standin.behave(root, {"train@cot": [{"fail_at": 24}]})
    assert standin.run(root, "dvc", "repro", "train@cot").returncode != 0
    row = next(row for row in stage_rows(root) if row.stage == "train@cot")
    assert row == Row("train@cot", "failed", "train@cot: curriculum.train@cot: a loss that is not finite at update 24")
    assert standin.run(root, "dvc", "repro", "train@cot").returncode == 0
    assert states(root)["train@cot"] == "done"


@pytest.mark.slow
def test_a_killed_stage_shows_how_far_its_training_came(root):
    replace(root / "params.yaml", "num_updates: 20", "num_updates: 40")
    standin.behave(root, {"train@cot": [{"die_at": 10}]})
    assert standin.run(root, "dvc", "repro", "train@cot").returncode != 0
    row = next(row for row in stage_rows(root) if row.stage == "train@cot")
    assert row.state == "interrupted"
    assert row.detail.startswith("update 10 of 40 (25%), loss 0.1000, 0:00:0")


def test_the_progress_of_other_parameters_does_not_count(root):
    """A training writes where it is from time to time, so that a finished one may have left 86 %."""
    (path,) = (root / ".resume").glob("train@cot-*/progress.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"update": 18}))
    replace(root / "params.yaml", "cot: {parent: base, num_updates: 20}", "cot: {parent: base, num_updates: 21}")
    assert (states(root)["train@cot"], details(root)["train@cot"]) == ("to do", "curriculum.cot changed")


@pytest.mark.slow
def test_it_follows_a_running_dvc_repro_without_disturbing_it(root):
    replace(root / "params.yaml", "num_updates: 20", "num_updates: 30")
    standin.behave(root, {"train@cot": [{"nap": 0.2}]})
    dvc = standin.start(root, "dvc", "repro")
    seen = set()
    while dvc.poll() is None:
        status = standin.run(root, "coconut", "status")
        assert status.returncode == 0, status.stderr
        seen |= {line.strip() for line in status.stdout.splitlines() if "running " in line}
        time.sleep(0.1)
    assert dvc.returncode == 0
    assert any(
        line.startswith("train@cot       running      update ") and " 0:00:01 left, 0:00:0" in line for line in seen
    )
    assert set(states(root).values()) == {"done"}


@pytest.mark.slow
def test_a_trainer_in_another_work_tree_is_listed_as_an_experiment(root):
    replace(root / "params.yaml", "num_updates: 20", "num_updates: 30")
    standin.behave(root, {"train@cot": [{"nap": 0.2}]})
    shutil.copytree(root, root / "elsewhere")
    environment = standin.environment() | {"DVC_ROOT": str(root)}
    trainer = subprocess.Popen([sys.executable, "stage.py", "train@cot"], cwd=root / "elsewhere", env=environment)
    try:
        deadline = time.monotonic() + 30
        while len(rows := stage_rows(root)) == 4:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert rows[4].stage == "train@cot"
        assert rows[4].state == "running"
        assert rows[4].detail.startswith("experiment: ")
    finally:
        trainer.kill()
        trainer.wait()


def test_in_a_fresh_clone_nothing_has_gone(root):
    """It has the dvc.lock of somebody else's run, and neither outputs nor logs."""
    shutil.rmtree(root / "outputs")
    shutil.rmtree(root / ".resume")
    assert details(root)["base"] == "outputs/base is not here yet"
    assert set(states(root).values()) == {"to do", "waiting"}


def test_a_suspended_stage_is_not_called_running(root):
    with (root / "stage.py").open("a") as file:
        file.write("\n")
    standin.behave(root, {"base": [{"nap": 60}]})
    dvc = standin.start(root, "dvc", "repro", "base")
    try:
        wait_for(lambda: (run := last_run("base", root)) is not None and run.end == "")
        assert states(root)["base"] == "running"
        run = last_run("base", root)
        assert run is not None
        os.kill(run.pid, signal.SIGSTOP)
        wait_for(lambda: states(root)["base"] == "suspended")
        assert details(root)["base"] == f"pid {run.pid} was stopped by a signal; `kill -CONT {run.pid}` lets it go on"
        os.kill(run.pid, signal.SIGCONT)
        wait_for(lambda: states(root)["base"] == "running")
    finally:
        os.killpg(dvc.pid, signal.SIGKILL)
        dvc.communicate()
    wait_for(lambda: states(root)["base"] == "interrupted")
    assert details(root)["base"] == "ended before it was done"


@pytest.mark.parametrize("text", ["", "stages: [", '{"update": 1', "[]", 20_000 * "["])
@pytest.mark.parametrize(
    "name", ["dvc.lock", "progress.json", ".dvc/tmp/rwlock", "outputs/logs/train-cot.events.jsonl"]
)
def test_a_file_caught_while_it_is_written_ends_nothing(root, name, text):
    if name == "progress.json":
        name = next((root / ".resume").glob("*/progress.json")).relative_to(root).as_posix()
    (root / name).write_text(text)
    assert len(stage_rows(root)) == 4


def damaged(whole: bytes, places: range) -> Iterator[bytes]:
    """`whole` cut, or with one bit flipped, at each place; the bit is another one from place to place."""
    for place in places:
        yield whole[:place]
        yield whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.long), 29], ids=["each byte", "every 29th byte"])
def test_any_damage_of_dvc_lock_gives_a_table(root, step):
    lock = root / "dvc.lock"
    whole = lock.read_bytes()
    for content in damaged(whole, range(0, len(whole), step)):
        lock.write_bytes(content)
        assert len(render(stage_rows(root)).splitlines()) == 6, content


@pytest.mark.parametrize("text", ["stages:\n", "stages: 1\n", "stages:\n  base:\n", "stages: [base, train@cot]\n"])
def test_a_dvc_lock_that_ends_early_gives_a_table(root, text):
    (root / "dvc.lock").write_text(text)
    assert states(root)["train@cot"] == "waiting"


MERGE = "<<<<<<< HEAD\n    cmd: a\n=======\n    cmd: b\n>>>>>>> other\n"


@pytest.mark.parametrize("mark", ["<<<<<<< HEAD\n", "=======\n", ">>>>>>> other\n", MERGE])
def test_a_merge_in_dvc_lock_is_named_and_nothing_is_said_to_have_never_run(root, mark):
    head, body = (root / "dvc.lock").read_text().split("stages:\n")
    (root / "dvc.lock").write_text(f"{head}stages:\n{mark}{body}")
    named = f"dvc.lock: line 3 holds {mark[:7]}, the mark of a merge; keep one side of it"
    assert details(root)["base"].startswith(named)
    assert named in standin.run(root, "coconut", "status").stdout
    for command in ("repro", "overnight"):
        done = standin.run(root, "coconut", command)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"coconut: {named}")


def test_a_merge_in_other_files_is_named(root):
    (root / "params.yaml").write_text(f"{MERGE}{(root / 'params.yaml').read_text()}")
    status = standin.run(root, "coconut", "status")
    assert "params.yaml: not valid YAML: line 1 holds <<<<<<<, the mark of a merge; keep one side" in status.stderr


@pytest.mark.parametrize("size", [0, 100])
def test_a_torn_dvc_lock_is_named_with_its_cure(root, size):
    (root / "dvc.lock").write_bytes((root / "dvc.lock").read_bytes()[:size])
    assert details(root)["base"].startswith("dvc.lock: not whole, as after a kill: `coconut repair` or `coconut repro`")


def test_a_damaged_record_is_named_and_the_others_count(root):
    replace(root / "dvc.lock", "    cmd: exec python stage.py train@no_cot", "    cme: python stage.py train@no_cot")
    assert states(root) == {"base": "done", "train@cot": "done", "train@latent_1": "done", "train@no_cot": "to do"}
    assert details(root)["train@no_cot"] == "its record in dvc.lock is damaged"


def resume_folder_with_40_updates(root: Path) -> Path:
    """Change a parameter of a finished stage, and make its states those of the new one."""
    replace(root / "params.yaml", "cot: {parent: base, num_updates: 20}", "cot: {parent: base, num_updates: 40}")
    (folder,) = (root / ".resume").glob("train@cot-*")
    return folder.rename(ResumeStore.folder_of("train@cot", fingerprint("train@cot", root), root))


@pytest.mark.parametrize("is_held", [True, False], ids=["running", "interrupted"])
@pytest.mark.parametrize("bit", [4, *(pytest.param(bit, marks=pytest.mark.slow) for bit in (0, 1, 2, 3, 5, 6, 7))])
def test_any_damage_of_progress_json_gives_a_table(root, is_held, bit):
    folder = resume_folder_with_40_updates(root)
    progress = json.loads((folder / "progress.json").read_text())
    progress |= {"num_updates": 40, "resumed_from": 12, "pid": os.getpid()}
    whole = json.dumps(progress).encode()
    (folder / "progress.json").write_bytes(whole)
    lock = try_lock(folder / "lock")
    assert lock is not None
    if not is_held:
        lock.close()
    rows = stage_rows(root)
    assert any(", 0:00:01 left, resumed at update 12, " in row.detail for row in rows)
    for place in range(len(whole)):
        flipped = whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :]
        for content in (flipped, whole[:place]) if bit == 0 else (flipped,):
            (folder / "progress.json").write_bytes(content)
            assert len(render(stage_rows(root)).splitlines()) == 2 + len(rows), content
    lock.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("time", 1e17),
        ("time", 10**400),
        ("eta_s", float("nan")),
        ("eta_s", "1.0"),
        ("pid", 10**11),
        ("pid", 1.5),
        ("loss", 10**400),
        ("loss", None),
        ("update", [1]),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_a_progress_that_no_trainer_writes_counts_as_none(root, name, value):
    path = resume_folder_with_40_updates(root) / "progress.json"
    progress = json.loads(path.read_text()) | {"num_updates": 40}
    path.write_text(json.dumps(progress))
    assert states(root)["train@cot"] == "interrupted"
    path.write_text(json.dumps(progress | {name: value}))
    assert states(root)["train@cot"] == "to do"


def test_a_folder_whose_lock_cannot_be_opened_counts_as_free(root):
    """As that of another user; a folder in its place stops even root."""
    for folder in (root / ".resume").iterdir():
        (folder / "lock").unlink()
        (folder / "lock").mkdir()
    assert set(states(root).values()) == {"done"}


def test_a_lock_that_another_one_looks_at_is_not_in_use_and_none_is_made(root):
    (first, second, _) = sorted((root / ".resume").iterdir())
    (second / "lock").unlink()
    with (first / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert set(states(root).values()) == {"done"}
    assert not (second / "lock").exists()


def test_md5s_are_those_of_dvc_lock(tmp_path):
    root = standin.make_repository(tmp_path)
    (root / "data/deep/er").mkdir(parents=True)
    for name, text in {"data/b.txt": "b", "data/a b.txt": "a", "data/deep/er/ä.txt": "\r\n", "data/B": ""}.items():
        (root / name).write_text(text)
    (root / "data/x.pyc").write_text("cache")
    (root / ".dvcignore").write_text("__pycache__/\n*.pyc\n")
    replace(root / "dvc.yaml", "deps: [stage.py]", "deps: [stage.py, data]")
    assert standin.run(root, "dvc", "repro", "base").returncode == 0
    deps = yaml.safe_load((root / "dvc.lock").read_text())["stages"]["base"]["deps"]
    assert {dep["path"]: dep["md5"] for dep in deps} == {name: md5_as_dvc(root / name) for name in ("data", "stage.py")}
    assert states(root)["base"] == "done"


def test_a_cycle_is_an_error_not_an_endless_loop(root):
    replace(root / "params.yaml", "latent_1: {parent: cot", "latent_1: {parent: latent_2")
    replace(root / "params.yaml", "  no_cot: {parent: base", "  latent_2: {parent: latent_1")
    with pytest.raises(ValueError, match=r"dvc\.yaml: a cycle among train@latent_1, train@latent_2"):
        stage_rows(root)


def test_the_table_is_plain_text():
    rows = [Row("base", "done"), Row("train@cot", "running", "update 1 of 2"), Row("evaluate@cot", "waiting", "for x")]
    assert render(rows) == (
        "1 done, 1 running, 1 waiting\n\n"
        "base          done\n"
        "train@cot     running      update 1 of 2\n"
        "evaluate@cot  waiting      for x\n"
    )


def test_outside_of_a_repository_there_is_one_line_and_exit_code_1(tmp_path):
    status = standin.run(tmp_path, "coconut", "status")
    assert (status.returncode, status.stdout) == (1, "")
    assert status.stderr == "coconut: params.yaml: no such file; run from the repository's top folder\n"


def test_status_starts_without_torch():
    code = (
        "import sys, json, coconut.pipeline.status;"
        " print(json.dumps([x for x in ('torch', 'dvc') if x in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
