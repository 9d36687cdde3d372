import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

import standin
from coconut.dvc_lock import is_whole_record, keep_record
from coconut.overnight import Night, Patience
from coconut.repro_log import Outcome, ReproLog
from coconut.training.resume import last_update

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the pipeline's guards are Linux only"),
]
PREEMPTION_S = 30
"""What a preempted machine gives; a loaded test machine must not need it all."""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    return standin.make_repository(tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def finished(fresh, tmp_path_factory) -> Path:
    """The repository after a straight run."""
    root = tmp_path_factory.mktemp("finished") / "repository"
    shutil.copytree(fresh, root)
    assert standin.run(root, "dvc", "repro").returncode == 0
    return root


@pytest.fixture
def root(fresh, tmp_path) -> Path:
    return Path(shutil.copytree(fresh, tmp_path / "repository"))


@pytest.fixture
def done_root(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "repository"))


def summary(output: str) -> dict[str, tuple[str, str]]:
    """Stage -> (result, reason) of the table at the end."""
    table = output.split("\nSummary: ")[1].split("\n\n")[1]
    fields = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    return {
        row[0]: (row[1], row[-1] if len(row) > 2 and not re.fullmatch(r"[\d:]+", row[-1]) else "") for row in fields
    }


def outputs(root: Path) -> dict[str, str]:
    return {name: (root / "outputs" / name).read_text() for name in ("base", "cot", "latent_1", "no_cot")}


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def update_of(root: Path, stage: str) -> int:
    return max((last_update(folder) or 0 for folder in (root / ".resume").glob(f"{stage}-*")), default=0)


@pytest.mark.slow
def test_a_night_of_kills_and_failures_ends_with_the_result_of_a_straight_run(root, finished):
    standin.behave(root, {"train@cot": [{"die_at": 5}, {"die_at": 12}], "train@latent_1": [{"fail_at": 3}]})
    night = standin.run(root, "coconut.overnight", "--pause-s", "0.1")
    assert night.returncode == 0, night.stdout + night.stderr
    assert summary(night.stdout) == {
        "base": ("ran", ""),
        "train@cot": ("resumed", "at update 12"),
        "train@latent_1": ("resumed", "at update 3"),
        "train@no_cot": ("ran", ""),
    }
    assert ", 4 tries\n" in night.stdout
    assert outputs(root) == outputs(finished)
    (journal,) = (root / "outputs/overnight").glob("*.log")
    assert journal.read_text() == night.stdout


@pytest.mark.slow
def test_an_error_that_repeats_is_not_retried_and_the_rest_is_still_done(root):
    standin.behave(root, {"train@cot": [{"fail_at": 3}] + 9 * [{"fail_at": 3}]})
    # The update that fails comes again: the state before it is what is resumed.
    stage = root / "stage.py"
    stage.write_text(stage.read_text().replace("store.save(", "update != now.get('fail_at') and store.save("))
    night = standin.run(root, "coconut.overnight", "--pause-s", "0.1")
    assert night.returncode == 1
    result = summary(night.stdout)
    assert result["train@cot"] == (
        "failed",
        "train@cot: curriculum.train@cot: a loss that is not finite at update 3",
    )
    assert result["train@latent_1"] == ("not run", "train@cot failed")
    assert result["train@no_cot"] == ("ran", "")
    assert ", 2 tries\n" in night.stdout
    assert "the same errors as before" in night.stdout


def test_tries_that_lead_nowhere_end_after_their_number(root):
    stage = root / "stage.py"
    stage.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    night = standin.run(root, "coconut.overnight", "--pause-s", "0.1", "--tries", "3")
    assert night.returncode == 1
    assert summary(night.stdout)["base"] == ("failed", "ended by SIGKILL")
    assert re.findall(r"trying again in (\d)", night.stdout) == ["0", "0"]
    assert "3 tries in a row led nowhere" in night.stdout


def test_a_finished_pipeline_is_left_alone(done_root):
    night = standin.run(done_root, "coconut.overnight")
    assert night.returncode == 0
    assert {result for result, _ in summary(night.stdout).values()} == {"unchanged"}


def test_what_dvc_has_in_its_run_cache_is_restored_not_run(done_root):
    (done_root / "dvc.lock").unlink()
    shutil.rmtree(done_root / "outputs")
    night = standin.run(done_root, "coconut.overnight")
    assert night.returncode == 0
    assert set(summary(night.stdout).values()) == {("restored", "from DVC's run cache")}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=SLOW), pytest.param("SIGHUP", marks=SLOW)])
def test_a_stop_signal_saves_the_state_and_ends_everything_within_seconds(root, name):
    standin.behave(root, {"train@cot": [{"nap": 0.5}]})
    night = standin.start(root, "coconut.overnight")
    wait_for(lambda: update_of(root, "train@cot") >= 2)
    children = psutil.Process(night.pid).children(recursive=True)
    begin = time.monotonic()
    night.send_signal(signal.Signals[name])
    output, _ = night.communicate(timeout=2 * PREEMPTION_S)
    assert time.monotonic() - begin < PREEMPTION_S
    assert night.returncode == 128 + signal.Signals[name]
    assert summary(output)["train@cot"] == ("stopped", f"by {name}")
    assert summary(output)["train@no_cot"] == ("not run", "")
    stopped_at = re.search(r"train@cot: stopped at update (\d+)", output)
    assert stopped_at is not None
    assert int(stopped_at[1]) == update_of(root, "train@cot")
    assert not [child for child in children if is_at_work(child)]


def test_a_stop_signal_ends_the_pause_before_the_next_try(root):
    (root / "stage.py").write_text("raise SystemExit(2)")
    night = standin.start(root, "coconut.overnight", "--pause-s", "300")
    assert night.stdout is not None
    while "trying again in 300 s" not in night.stdout.readline():
        pass
    night.send_signal(signal.SIGTERM)
    night.communicate(timeout=PREEMPTION_S)
    assert night.returncode == 143


@pytest.mark.slow
def test_when_overnight_is_killed_dvc_and_the_trainer_end_too_and_the_next_night_goes_on(root, finished):
    standin.behave(root, {"train@cot": [{"nap": 0.2}]})
    night = standin.start(root, "coconut.overnight")
    wait_for(lambda: update_of(root, "train@cot") >= 2)
    children = psutil.Process(night.pid).children(recursive=True)
    assert len(children) >= 2
    night.kill()
    night.wait()
    wait_for(lambda: not any(map(is_at_work, children)), PREEMPTION_S)
    again = standin.run(root, "coconut.overnight")
    assert again.returncode == 0, again.stdout
    assert summary(again.stdout)["train@cot"][0] == "resumed"
    assert outputs(root) == outputs(finished)


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_when_dvc_alone_is_killed_the_next_try_resumes(root, finished):
    standin.behave(root, {"train@cot": [{"nap": 0.2}]})
    night = standin.start(root, "coconut.overnight", "--pause-s", "0.1")
    wait_for(lambda: update_of(root, "train@cot") >= 2)
    (dvc,) = psutil.Process(night.pid).children()
    dvc.kill()
    output, _ = night.communicate(timeout=600)
    assert night.returncode == 0, output
    assert "dvc ended by SIGKILL" in output
    assert summary(output)["train@cot"][0] == "resumed"
    assert outputs(root) == outputs(finished)


def test_two_nights_never_share_a_repository(root):
    standin.behave(root, {"base": [{"nap": 60}]})
    first = standin.start(root, "coconut.overnight")
    assert first.stdout is not None
    while "Running stage 'base'" not in first.stdout.readline():
        pass
    second = standin.run(root, "coconut.overnight")
    assert second.returncode == 1
    assert f"an overnight run is under way, pid {first.pid};" in second.stderr
    first.terminate()
    first.communicate(timeout=300)


@pytest.mark.slow
def test_a_closed_terminal_does_not_end_the_night(root):
    """`nohup`, and a pipe whose reader is gone."""
    standin.behave(root, {"base": [{"nap": 1}]})
    night = standin.start(root, "coconut.overnight", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert night.stdout is not None
    night.stdout.readline()
    night.stdout.close()
    night.send_signal(signal.SIGHUP)
    assert night.wait(60) == 0


def rwlock(root: Path, pid: int, cmd: str) -> str:
    info = {"pid": pid, "cmd": cmd}
    return json.dumps({"write": {str(root / "outputs/base"): info}, "read": {str(root / "stage.py"): [info]}})


@pytest.mark.parametrize("content", ["torn", "foreign", "zombie", "format"])
def test_locks_that_a_killed_dvc_left_are_cleared(root, content):
    stranger = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    zombie = subprocess.Popen([sys.executable, "-c", "", "dvc", "repro"])
    wait_for(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
    path = root / ".dvc/tmp/rwlock"
    path.parent.mkdir(exist_ok=True)
    texts = {
        "torn": rwlock(root, 1, "dvc repro")[:50],
        "foreign": rwlock(root, stranger.pid, "/usr/bin/dvc repro -k"),
        "zombie": rwlock(root, zombie.pid, "notebook.py"),
        "format": '{"write": []}',
    }
    path.write_text(texts[content])
    assert standin.run(root, "dvc", "repro", "base").returncode != 0
    night = standin.run(root, "coconut.overnight", "base")
    stranger.kill()
    stranger.wait()
    zombie.wait()
    assert night.returncode == 0, night.stdout
    assert "overnight" in night.stdout
    assert "removed" in night.stdout


@pytest.mark.parametrize("at", [0.0, 0.5])
def test_a_torn_dvc_lock_costs_no_finished_stage(done_root, at):
    lock = done_root / "dvc.lock"
    whole = lock.read_bytes()
    place = whole.index(b"outs:", int(at * len(whole))) + 60  # In the middle of an output's hash.
    lock.write_bytes(whole[:place])
    assert standin.run(done_root, "coconut.status").returncode == 0
    night = standin.run(done_root, "coconut.overnight")
    assert night.returncode == 0, night.stdout
    assert "dvc.lock: torn by a kill" in night.stdout
    assert {result for result, _ in summary(night.stdout).values()} == {"restored"}
    assert sorted(lock.read_bytes()) == sorted(whole)
    assert (done_root / ".dvc/tmp/dvc.lock.torn").read_bytes() == whole[:place]


def test_a_torn_dvc_lock_is_replaced_by_the_copy_that_the_night_keeps(done_root):
    lock = done_root / "dvc.lock"
    whole = lock.read_bytes()
    keep_record(done_root)
    lock.write_bytes(whole[:100])
    keep_record(done_root)
    night = standin.run(done_root, "coconut.overnight")
    assert {result for result, _ in summary(night.stdout).values()} == {"unchanged"}
    assert lock.read_bytes() == whole


def test_the_night_keeps_a_copy_of_dvc_lock_at_the_start_of_each_stage(root):
    standin.behave(root, {"train@cot": [{"fail_at": 1}, {"fail_at": 1}, {"fail_at": 1}]})
    standin.run(root, "coconut.overnight", "--tries", "1", "train@cot")
    assert list(yaml.safe_load((root / ".dvc/tmp/dvc.lock.whole").read_text())["stages"]) == ["base"]


def test_a_dvc_lock_is_whole_with_its_last_byte_only(done_root):
    whole = (done_root / "dvc.lock").read_bytes()
    assert is_whole_record(whole)
    assert is_whole_record(whole[:300] + b"<<<<<<< HEAD\n" + whole[300:])
    wrongly_whole = [size for size in range(len(whole)) if is_whole_record(whole[:size])]
    # What is left after these has only whole stages, or lacks outputs: DVC restores the rest by itself.
    assert all(whole[:size].endswith(b"\n") for size in wrongly_whole)


@pytest.mark.slow
def test_the_lock_of_a_living_dvc_is_respected(root):
    standin.behave(root, {"base": [{"nap": 8}]})
    dvc = standin.start(root, "dvc", "repro")
    wait_for(lambda: (root / "outputs/logs/base.log").exists())
    night = standin.run(root, "coconut.overnight", "--pause-s", "2")
    dvc.communicate(timeout=300)
    assert dvc.returncode == 0
    assert "removed" not in night.stdout
    assert night.returncode == 0, night.stdout
    assert "trying again in 2 s" in night.stdout


def test_a_mistake_in_dvc_yaml_is_reported_and_not_retried_for_long(root):
    text = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(text.replace("    outs: [outputs/base]\n", "    outs: [outputs/base, stage.py]\n"))
    night = standin.run(root, "coconut.overnight", "--pause-s", "0.1")
    assert night.returncode == 1
    assert ", 2 tries\n" in night.stdout


def test_outside_of_a_repository_there_is_one_line_and_exit_code_1(tmp_path):
    night = standin.run(tmp_path, "coconut.overnight")
    assert night.returncode == 1
    assert "params.yaml: no such file; run from the repository's top folder" in night.stderr
    assert "Traceback" not in night.stderr


@pytest.mark.slow
def test_prune_keeps_what_an_unfinished_stage_would_continue(done_root):
    (done_root / ".resume/train@cot-0000000000000000").mkdir()
    params = done_root / "params.yaml"
    params.write_text(
        params.read_text().replace("cot: {parent: base, num_updates: 20", "cot: {parent: base, num_updates: 30", 1)
    )
    standin.behave(done_root, {"train@cot": [{"die_at": 25}]})
    assert standin.run(done_root, "dvc", "repro", "train@cot").returncode != 0
    before = resume_folders(done_root)
    assert before == ["train@cot", "train@cot", "train@cot", "train@latent_1", "train@no_cot"]
    pruned = standin.run(done_root, "coconut.overnight", "--prune")
    assert pruned.returncode == 0, pruned.stderr
    # Of train@latent_1 nobody can say: its parent's outputs are gone.
    assert resume_folders(done_root) == ["train@cot", "train@latent_1"]
    assert update_of(done_root, "train@cot") == 25
    night = standin.run(done_root, "coconut.overnight")
    assert summary(night.stdout)["train@cot"] == ("resumed", "at update 25")
    assert standin.run(done_root, "coconut.overnight", "--prune").returncode == 0
    assert resume_folders(done_root) == []


def resume_folders(root: Path) -> list[str]:
    return sorted(path.name[:-17] for path in (root / ".resume").iterdir())


# --- the parts ---


def test_a_model_that_prints_dvcs_lines_fools_nobody():
    log = ReproLog(["train@cot"])
    log.read("Running stage 'train@cot':")
    log.read("Running stage 'evil':")
    log.read("Stage 'evil' didn't change, skipping")
    log.read("03:00:00 | ERROR   | train@cot: out of ideas")
    log.read("WARNING: failed to run: python stages/train.py cot, exited with 1")
    log.read("ERROR: failed to reproduce 'train@cot'")
    log.close(255)
    assert log.outcomes["train@cot"].reason == "train@cot: out of ideas"
    assert log.own_errors() == {"train@cot": "train@cot: out of ideas"}


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        (Outcome("ran", "", 5.0), Outcome("unchanged"), Outcome("ran", "", 5.0)),
        (
            Outcome("failed", "x", 5.0, 1),
            Outcome("resumed", "at update 3", 2.0),
            Outcome("resumed", "at update 3", 7.0),
        ),
        (Outcome("failed", "x", 5.0, 1), Outcome(), Outcome("failed", "x", 5.0, 1)),
        (Outcome(), Outcome("not run", "a failed"), Outcome("not run", "a failed")),
        (Outcome("not run", "a failed"), Outcome("ran", "", 1.0), Outcome("ran", "", 1.0)),
    ],
)
def test_outcomes_of_several_tries_are_joined(earlier, later, expected):
    assert earlier.then(later) == expected


def test_a_stage_that_dvc_itself_fails_is_named_with_dvcs_warning():
    log = ReproLog(["encode", "train@cot"])
    log.read("WARNING: missing data 'source': data/raw")
    log.read("WARNING: Stage 'train@cot' will be skipped due to this failure")
    log.read("ERROR: failed to reproduce 'encode'")
    log.close(255)
    assert log.own_errors() == {"encode": "missing data 'source': data/raw"}
    busy = ReproLog(["encode"])
    busy.read("WARNING: '/x/data' is busy, it is being blocked by:")
    busy.read("ERROR: failed to reproduce 'encode'")
    assert list(busy.failures()) == ["encode"]
    assert busy.own_errors() == {}


def test_pauses_grow_while_tries_lead_nowhere(root, monkeypatch):
    class FakeJournal:
        path = Path("journal")

        def say(self, message: str) -> None:
            pass

    monkeypatch.chdir(root)
    night = Night(Path(), [], FakeJournal())
    pauses: list[float] = []
    monkeypatch.setattr(night, "_repro", lambda _log: 255)
    monkeypatch.setattr(night, "_sleep", pauses.append)
    assert night.run(Patience(9, 10.0)) == 1
    assert pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0]
