import errno
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

import standin
import waiting
from coconut.files import can_pass, check_free_space, explain, try_lock
from coconut.pipeline import dvc_lock, overnight
from coconut.pipeline.dvc_lock import repair
from coconut.pipeline.events import events_path, last_run
from coconut.pipeline.night import Night, Patience
from coconut.pipeline.record import is_whole, keep_copy
from coconut.pipeline.repro_log import Outcome, ReproLog
from coconut.pipeline.resume import ResumeStore, TensorsFile
from coconut.pipeline.states import last_update
from coconut.pipeline.status import stage_rows
from waiting import is_at_work

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the pipeline's guards are Linux only"),
]
Usage = namedtuple("Usage", "total used free")
PREEMPTION_S = 30
"""What a preempted machine gives; a loaded test machine must not need it all."""
wait_for = partial(waiting.wait_for, seconds=180)


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


def update_of(root: Path, stage: str) -> int:
    return max((last_update(folder) or 0 for folder in (root / ".resume").glob(f"{stage}-*")), default=0)


@pytest.mark.slow
def test_a_night_of_kills_and_failures_ends_with_the_result_of_a_straight_run(root, finished):
    standin.behave(root, {"train@cot": [{"die_at": 5}, {"die_at": 12}], "train@latent_1": [{"fail_at": 3}]})
    night = standin.run(root, "coconut", "overnight", "--pause-s", "0.1")
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
    assert "no page was written" not in night.stdout


@pytest.mark.slow
def test_an_error_that_repeats_is_not_retried_and_the_rest_is_still_done(root):
    standin.behave(root, {"train@cot": [{"fail_at": 3}] + 9 * [{"fail_at": 3}]})
    # The update that fails comes again: the state before it is what is resumed.
    stage = root / "stage.py"
    stage.write_text(stage.read_text().replace("store.save(", "update != now.get('fail_at') and store.save("))
    night = standin.run(root, "coconut", "overnight", "--pause-s", "0.1")
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
    night = standin.run(root, "coconut", "overnight", "--pause-s", "0.1", "--tries", "3")
    assert night.returncode == 1
    assert summary(night.stdout)["base"] == ("failed", "ended by SIGKILL")
    assert re.findall(r"trying again in (\d)", night.stdout) == ["0", "0"]
    assert "3 tries in a row brought no progress" in night.stdout


def test_a_finished_pipeline_is_left_alone(done_root):
    night = standin.run(done_root, "coconut", "overnight")
    assert night.returncode == 0
    assert {result for result, _ in summary(night.stdout).values()} == {"unchanged"}


def test_what_dvc_has_in_its_run_cache_is_restored_not_run(done_root):
    (done_root / "dvc.lock").unlink()
    shutil.rmtree(done_root / "outputs")
    night = standin.run(done_root, "coconut", "overnight")
    assert night.returncode == 0
    assert set(summary(night.stdout).values()) == {("restored", "from DVC's run cache")}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=SLOW), pytest.param("SIGHUP", marks=SLOW)])
def test_a_stop_signal_saves_the_state_and_ends_everything_within_seconds(root, name):
    standin.behave(root, {"train@cot": [{"nap": 0.5}]})
    night = standin.start(root, "coconut", "overnight")
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
    night = standin.start(root, "coconut", "overnight", "--pause-s", "300")
    assert night.stdout is not None
    while "trying again in 300 s" not in night.stdout.readline():
        pass
    night.send_signal(signal.SIGTERM)
    night.communicate(timeout=PREEMPTION_S)
    assert night.returncode == 143


@pytest.mark.slow
def test_when_overnight_is_killed_dvc_and_the_trainer_end_too_and_the_next_night_goes_on(root, finished):
    standin.behave(root, {"train@cot": [{"nap": 0.2}]})
    night = standin.start(root, "coconut", "overnight")
    wait_for(lambda: update_of(root, "train@cot") >= 2)
    children = psutil.Process(night.pid).children(recursive=True)
    assert len(children) >= 2
    night.kill()
    night.wait()
    wait_for(lambda: not any(map(is_at_work, children)), seconds=PREEMPTION_S)
    again = standin.run(root, "coconut", "overnight")
    assert again.returncode == 0, again.stdout
    assert summary(again.stdout)["train@cot"][0] == "resumed"
    assert outputs(root) == outputs(finished)


@pytest.mark.slow
@pytest.mark.long
def test_when_dvc_alone_is_killed_the_next_try_resumes(root, finished):
    standin.behave(root, {"train@cot": [{"nap": 0.2}]})
    night = standin.start(root, "coconut", "overnight", "--pause-s", "0.1")
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
    first = standin.start(root, "coconut", "overnight")
    assert first.stdout is not None
    while "Running stage 'base'" not in first.stdout.readline():
        pass
    second = standin.run(root, "coconut", "overnight")
    assert second.returncode == 1
    assert f"an overnight run is under way, pid {first.pid};" in second.stderr
    first.terminate()
    first.communicate(timeout=300)


@pytest.mark.slow
def test_a_night_whose_signals_were_blocked_ends_when_asked_to(root):
    standin.behave(root, {"base": [{"nap": 60}]})
    night = standin.start(
        root,
        "coconut",
        "overnight",
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()),
    )
    assert night.stdout is not None
    while "Running stage 'base'" not in night.stdout.readline():
        pass
    night.terminate()
    out, _ = night.communicate(timeout=30)
    assert night.returncode != 0
    assert "SIGTERM" in out


@pytest.mark.slow
def test_a_closed_terminal_does_not_end_the_night(root):
    """`nohup`, and a pipe whose reader is gone."""
    standin.behave(root, {"base": [{"nap": 1}]})
    night = standin.start(root, "coconut", "overnight", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
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
    night = standin.run(root, "coconut", "overnight", "base")
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
    assert standin.run(done_root, "coconut", "status").returncode == 0
    night = standin.run(done_root, "coconut", "overnight")
    assert night.returncode == 0, night.stdout
    assert "dvc.lock: torn by a kill" in night.stdout
    assert {result for result, _ in summary(night.stdout).values()} == {"restored"}
    assert sorted(lock.read_bytes()) == sorted(whole)
    assert (done_root / ".dvc/tmp/dvc.lock.torn").read_bytes() == whole[:place]


def test_a_torn_dvc_lock_is_replaced_by_the_copy_that_the_night_keeps(done_root):
    lock = done_root / "dvc.lock"
    whole = lock.read_bytes()
    keep_copy(done_root)
    lock.write_bytes(whole[:100])
    keep_copy(done_root)
    night = standin.run(done_root, "coconut", "overnight")
    assert {result for result, _ in summary(night.stdout).values()} == {"unchanged"}
    assert lock.read_bytes() == whole


@pytest.mark.parametrize("has_copy", [True, False])
def test_repro_mends_a_torn_dvc_lock_and_keeps_a_copy_of_a_whole_one(done_root, has_copy):
    lock = done_root / "dvc.lock"
    whole = lock.read_bytes()
    if has_copy:
        assert standin.run(done_root, "coconut", "repro").returncode == 0
    lock.write_bytes(b"")
    repro = standin.run(done_root, "coconut", "repro")
    assert repro.returncode == 0, repro.stdout
    back = "the last whole one is back" if has_copy else "there is no copy of a whole one"
    assert f"dvc.lock: torn by a kill; moved to .dvc/tmp/dvc.lock.torn, {back}" in repro.stdout
    assert sorted(lock.read_bytes()) == sorted((done_root / ".dvc/tmp/dvc.lock.whole").read_bytes()) == sorted(whole)


def test_a_torn_dvc_lock_beside_a_living_dvc_stays_and_is_named(done_root):
    (done_root / "dvc.lock").write_bytes(b"")
    with subprocess.Popen(["dvc", "-c", "read x"], executable="/bin/sh", cwd=done_root, stdin=subprocess.PIPE) as dvc:
        said = standin.run(done_root, "coconut", "repair").stdout
        dvc.communicate()
    assert f"dvc.lock: not whole, but dvc runs here (pid {dvc.pid}) and may be writing it" in said
    assert (done_root / "dvc.lock").read_bytes() == b""


@pytest.mark.long
def test_a_night_whose_files_are_changed_while_it_runs_asks_dvc_once_more(root):
    """As by `git stash`: dvc ends well, having begun with other parameters, or before another record was taken back."""
    standin.behave(root, {"train@no_cot": [{"nap": 0.2}]})
    with standin.start(root, "coconut", "overnight") as night:
        wait_for(lambda: (root / "outputs/latent_1").exists() and last_run("train@no_cot", root))
        params = (root / "params.yaml").read_text()
        (root / "params.yaml").write_text(params.replace("num_updates: 20", "num_updates: 21", 1))
        output, _ = night.communicate()
    assert night.returncode == 0, output
    assert "dvc ended well, but these are not up to date: train@cot, train@latent_1: asking it again" in output
    assert {row.state for row in stage_rows(root)} == {"done"}


@pytest.mark.long
def test_the_night_keeps_a_copy_of_dvc_lock_at_the_start_of_each_stage(root):
    standin.behave(root, {"train@cot": [{"fail_at": 1}, {"fail_at": 1}, {"fail_at": 1}]})
    standin.run(root, "coconut", "overnight", "--tries", "1", "train@cot")
    assert list(yaml.safe_load((root / ".dvc/tmp/dvc.lock.whole").read_text())["stages"]) == ["base"]


@pytest.mark.parametrize("name", ["dvc.lock", ".dvc/tmp/rwlock"])
def test_what_plain_dvc_cannot_survive_make_repro_does(done_root, name):
    (done_root / name).write_text('{"write": {')
    assert standin.run(done_root, "dvc", "repro").returncode != 0
    shutil.copy(Path(__file__).parents[1] / "Makefile", done_root)
    for needed in (
        "stages/params.py",
        "stages/digest_code.py",
        "requirements.lock",
        "pyproject.toml",
        ".venv/.installed",
    ):
        (done_root / needed).parent.mkdir(exist_ok=True)
        (done_root / needed).touch()
    make = subprocess.run(
        ["make", "repro"], cwd=done_root, env=standin.environment(), capture_output=True, text=True, check=False
    )
    assert make.returncode == 0, make.stdout + make.stderr
    assert "torn by a kill" in make.stdout
    assert "coconut", "repair" not in make.stdout
    assert is_whole((done_root / "dvc.lock").read_bytes())


def test_by_hand_it_says_what_it_mended_and_nothing_where_there_is_nothing(tmp_path):
    assert said_by_hand(tmp_path) == (0, "", "")
    path = torn_rwlock(tmp_path)
    assert said_by_hand(tmp_path) == (0, ".dvc/tmp/rwlock: torn by a kill, and no dvc runs here; removed\n", "")
    assert said_by_hand(tmp_path) == (0, "", "")
    path.mkdir()
    exit_code, output, errors = said_by_hand(tmp_path)
    assert (exit_code, output) == (1, "")
    assert "rwlock: Is a directory; move away what stands there" in errors


def said_by_hand(root: Path) -> tuple[int, str, str]:
    done = standin.run(root, "coconut", "repair")
    return done.returncode, done.stdout, done.stderr


def torn_rwlock(root: Path) -> Path:
    path = root / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"write": {')
    return path


SLEEP = "import time; print('up', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("command", "is_dvc"),
    [
        ("tail -f dvc.yaml", False),
        ("{python} of-dvc.py", False),
        ("my-dvc/python other.py", False),
        ("{python} other.py dvc", False),
        ("{python} -m other dvc", False),
        ("bin/dvc repro", True),
        ("{python} -u bin/dvc repro", True),
        ("{python} -X dev -m dvc repro", True),
        ("{python} -um dvc repro", True),
        ("{python} dvc/__main__.py repro", True),
    ],
)
def test_only_a_process_that_runs_dvc_keeps_a_torn_file_from_being_mended(tmp_path, command, is_dvc):
    for name in ("of-dvc.py", "other.py", "bin/dvc", "dvc/__main__.py", "dvc.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#!{sys.executable}\n{SLEEP}\n")
    (tmp_path / "dvc/__init__.py").touch()
    (tmp_path / "bin/dvc").chmod(0o755)
    (tmp_path / "my-dvc").mkdir()
    (tmp_path / "my-dvc/python").symlink_to(sys.executable)
    path = torn_rwlock(tmp_path)
    words = command.format(python=sys.executable).split()
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, env=standin.environment())
    try:
        assert process.stdout is not None
        process.stdout.readline()
        (sentence,) = repair(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert path.exists() == is_dvc
    assert (f"dvc runs here (pid {process.pid})" in sentence) == is_dvc


def test_neither_a_torn_copy_nor_a_half_written_one_takes_the_place_of_dvc_lock(done_root):
    lock, copy = done_root / "dvc.lock", done_root / ".dvc/tmp/dvc.lock.whole"
    whole = lock.read_bytes()
    copy.with_name("dvc.lock.whole.tmp").write_bytes(whole[:100])
    lock.write_bytes(whole[:100])
    copy.write_bytes(whole[:50])
    (sentence,) = repair(done_root)
    assert "there is no copy of a whole one" in sentence
    assert not lock.exists()
    lock.write_bytes(whole)
    keep_copy(done_root)
    lock.write_bytes(whole[:100])
    (sentence,) = repair(done_root)
    assert "the last whole one is back" in sentence
    assert lock.read_bytes() == whole


def test_what_a_full_disk_took_of_a_copy_is_removed_and_the_copy_before_it_stays(done_root):
    copy, temporary = (done_root / ".dvc/tmp" / name for name in ("dvc.lock.whole", "dvc.lock.whole.tmp"))
    copy.write_text("the copy before")
    temporary.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*dvc\.lock\.whole'"):
        keep_copy(done_root)
    assert copy.read_text() == "the copy before"
    assert not temporary.is_symlink()


@pytest.mark.long
def test_a_disk_that_fills_up_costs_the_copy_of_dvc_lock_and_not_the_night(root):
    tmp = root / ".dvc/tmp"
    tmp.mkdir(exist_ok=True)
    (tmp / "dvc.lock.whole.tmp").symlink_to("/dev/full")
    night = standin.run(root, "coconut", "overnight")
    assert night.returncode == 0, night.stdout + night.stderr
    assert {result for result, _ in summary(night.stdout).values()} == {"ran"}
    assert ".dvc/tmp/dvc.lock.whole: No space left on device; make room" in night.stdout
    assert "no copy of dvc.lock was kept, the one before it stays" in night.stdout
    assert ", 1 try\n" in night.stdout


def test_a_full_disk_puts_off_what_there_is_to_mend(root):
    tmp = root / ".dvc/tmp"
    tmp.mkdir(exist_ok=True)
    stranger = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    (tmp / "rwlock").write_text(rwlock(root, stranger.pid, "/usr/bin/dvc repro -k"))
    (tmp / "rwlock.tmp").symlink_to("/dev/full")
    night = standin.run(root, "coconut", "overnight", "--pause-s", "0.1", "base")
    stranger.kill()
    stranger.wait()
    assert night.returncode == 0, night.stdout + night.stderr
    assert ".dvc/tmp/rwlock: No space left on device; make room" in night.stdout
    assert "what a killed dvc may have left is not repaired" in night.stdout
    assert summary(night.stdout)["base"] == ("ran", "")
    assert ", 2 tries\n" in night.stdout


def test_on_a_disk_without_any_room_the_night_still_ends_with_its_tries_and_a_summary(root):
    def allow_no_byte() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    night = standin.run(root, "coconut", "overnight", "--pause-s", "0.1", "--tries", "3", preexec_fn=allow_no_byte)
    assert night.returncode == 1
    assert summary(night.stdout).keys() == {"base", "train@cot", "train@latent_1", "train@no_cot"}
    assert "trying again in" in night.stdout


def test_the_summary_is_printed_whatever_ends_the_night(root, monkeypatch, capsys):
    def fail(_night: Night, _patience: Patience) -> int:
        raise OSError(errno.EAGAIN, "no process to be had")

    monkeypatch.chdir(root)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Night, "run", fail)
    with pytest.raises(OSError, match="no process to be had"):
        overnight.run(Path())
    assert summary(capsys.readouterr().out)["base"] == ("not run", "")


def test_a_dvc_lock_is_whole_with_its_last_byte_only(done_root):
    whole = (done_root / "dvc.lock").read_bytes()
    assert is_whole(whole)
    assert is_whole(whole[:300] + b"<<<<<<< HEAD\n" + whole[300:])
    wrongly_whole = [size for size in range(len(whole)) if is_whole(whole[:size])]
    # What is left after these has only whole stages, or lacks outputs: DVC restores the rest by itself.
    assert all(whole[:size].endswith(b"\n") for size in wrongly_whole)


@pytest.mark.slow
@pytest.mark.long
def test_the_lock_of_a_living_dvc_is_respected(root):
    standin.behave(root, {"base": [{"nap": 8}]})
    dvc = standin.start(root, "dvc", "repro")
    wait_for(lambda: (root / "outputs/logs/base.log").exists())
    night = standin.run(root, "coconut", "overnight", "--pause-s", "2")
    dvc.communicate(timeout=300)
    assert dvc.returncode == 0
    assert "removed" not in night.stdout
    assert night.returncode == 0, night.stdout
    assert re.search(rf"another dvc \(pid {dvc.pid}\) is at work on .*; trying again in 2 s", night.stdout)


def test_a_mistake_in_dvc_yaml_is_reported_and_not_retried_for_long(root):
    text = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(text.replace("    outs: [outputs/base]\n", "    outs: [outputs/base, stage.py]\n"))
    night = standin.run(root, "coconut", "overnight", "--pause-s", "0.1")
    assert night.returncode == 1
    assert ", 2 tries\n" in night.stdout


def test_outside_of_a_repository_there_is_one_line_and_exit_code_1(tmp_path):
    night = standin.run(tmp_path, "coconut", "overnight")
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
    pruned = standin.run(done_root, "coconut", "prune")
    assert pruned.returncode == 0, pruned.stderr
    # Of train@latent_1 nobody can say: its parent's outputs are gone.
    assert resume_folders(done_root) == ["train@cot", "train@latent_1"]
    assert update_of(done_root, "train@cot") == 25
    night = standin.run(done_root, "coconut", "overnight")
    assert summary(night.stdout)["train@cot"] == ("resumed", "at update 25")
    assert standin.run(done_root, "coconut", "prune").returncode == 0
    assert resume_folders(done_root) == []


def resume_folders(root: Path) -> list[str]:
    return sorted(path.name[:-17] for path in (root / ".resume").iterdir())


# --- the parts ---


def leave_events(root: Path, stage: str, **end: object) -> None:
    """As a process of the stage that began and failed."""
    path = events_path(stage, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    events: list[dict[str, object]] = [{"event": "begun", "message": ""}, {"event": "failed", **end}]
    with path.open("a") as file:
        file.writelines(f"{json.dumps(event | {'pid': 7, 'time': time.time()})}\n" for event in events)


def test_a_model_that_prints_dvcs_lines_fools_nobody(tmp_path):
    leave_events(tmp_path, "train@cot", message="an earlier night")
    log = ReproLog(["train@cot"], tmp_path)
    log.read("Running stage 'train@cot':")
    log.read("Running stage 'evil':")
    log.read("Stage 'evil' didn't change, skipping")
    log.read("03:00:00 | ERROR   | train@cot: out of ideas")
    leave_events(tmp_path, "train@cot", message="train@cot: out of ideas")
    log.read("and a last word")
    log.read("WARNING: failed to run: python stages/train.py cot, exited with 1")
    log.read("ERROR: failed to reproduce 'train@cot'")
    log.close(255)
    assert log.outcomes["train@cot"].reason == "train@cot: out of ideas"
    assert log.own_errors() == {"train@cot": "train@cot: out of ideas"}


@pytest.mark.parametrize(
    ("exit_code", "reason"), [(1, "ModuleNotFoundError: No module named 'x'"), (-9, "ended by SIGKILL")]
)
def test_a_stage_that_ended_before_it_could_say_anything_is_known_by_its_last_words(tmp_path, exit_code, reason):
    leave_events(tmp_path, "train@cot", message="an earlier night")
    log = ReproLog(["train@cot"], tmp_path)
    for line in (
        "Running stage 'train@cot':",
        "ModuleNotFoundError: No module named 'x'",
        f"WARNING: failed to run: python stages/train.py cot, exited with {exit_code}",
    ):
        log.read(line)
    assert log.outcomes["train@cot"].reason == reason


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


def test_a_stage_that_dvc_itself_fails_is_named_with_dvcs_warning(tmp_path):
    log = ReproLog(["encode", "train@cot"], tmp_path)
    log.read("WARNING: missing data 'source': data/raw")
    log.read("WARNING: Stage 'train@cot' will be skipped due to this failure")
    log.read("ERROR: failed to reproduce 'encode'")
    log.close(255)
    assert log.own_errors() == {"encode": "missing data 'source': data/raw"}
    busy = ReproLog(["encode"], tmp_path)
    busy.read("WARNING: '/x/data' is busy, it is being blocked by:")
    busy.read("ERROR: failed to reproduce 'encode'")
    assert list(busy.failures()) == ["encode"]
    assert busy.own_errors() == {}
    later = ReproLog(["train@cot"], tmp_path)
    later.read("WARNING: 'outputs/base/predictions' is empty.")
    later.read("ERROR: failed to reproduce 'train@cot': '/x/outputs/cot' is busy, it is being blocked by:")
    assert later.what_can_pass() == "'/x/outputs/cot' is busy, it is being blocked by:"


class FakeJournal:
    path = Path("journal")

    def say(self, message: str) -> None:
        pass


class Clock:
    """A night whose pauses take no time, over a `dvc` that is played by a function."""

    def __init__(self, root: Path, repro: Callable[[ReproLog], int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(root)
        self.night = Night(Path(), [], FakeJournal())
        self.pauses: list[float] = []
        monkeypatch.setattr(self.night, "_repro", repro)
        monkeypatch.setattr(self.night, "_sleep", self.pauses.append)


def errors_that_can_pass(folder: Path) -> dict[str, OSError]:
    """As those who meet them raise them."""
    with pytest.raises(OSError, match="wanted") as no_room:
        check_free_space({folder: 10**18})
    tensors_file = TensorsFile(lambda _tensors, _path: None, lambda _path: {})
    arguments = ("train@cot", "0123456789abcdef", tensors_file)
    held = try_lock(folder / ".resume/train@cot-0123456789abcdef/lock")
    assert held is not None
    store = ResumeStore.open(*arguments, root=folder, lock_wait_s=0.0)
    with held, pytest.raises(OSError, match="two must never") as in_use, store:
        pass
    full = OSError(errno.ENOSPC, "No space left on device", "outputs/cot/history.csv")
    return {"system": full, "before": no_room.value, "in use": in_use.value}


@pytest.mark.parametrize("name", ["system", "before", "in use"])
def test_what_can_pass_is_waited_for_until_it_has(root, monkeypatch, name):
    error = errors_that_can_pass(root)[name]
    complaint = f"train@cot: {explain(error)}"
    tries = []

    def repro(log: ReproLog) -> int:
        tries.append(log)
        if len(tries) == 40:
            return 0
        log.read("Running stage 'train@cot':")
        leave_events(root, "train@cot", message=complaint, can_pass=can_pass(error))
        log.read("WARNING: failed to run: python stages/train.py cot, exited with 1")
        log.read("ERROR: failed to reproduce 'train@cot'")
        return 255

    clock = Clock(root, repro, monkeypatch)
    assert clock.night.run(Patience(3, 10.0)) == 0
    assert clock.pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, *(33 * [600.0])]
    assert clock.night.outcomes["train@cot"].reason == complaint


@pytest.mark.parametrize(
    "line",
    [
        "ERROR: unexpected error - [Errno 28] No space left on device",
        "ERROR: unexpected error - database or disk is full",
        "ERROR: Unable to acquire lock. Most likely another DVC process is running or was terminated abruptly.",
    ],
)
def test_what_dvc_itself_complains_of_is_waited_for_too(root, monkeypatch, line):
    tries = []

    def repro(log: ReproLog) -> int:
        tries.append(log)
        log.read(line)
        return 0 if len(tries) == 20 else 255

    clock = Clock(root, repro, monkeypatch)
    assert clock.night.run(Patience(3, 10.0)) == 0


def test_a_night_waits_for_the_evaluation_of_another_dvc_however_long_it_takes(root, monkeypatch):
    (root / ".dvc/tmp").mkdir(exist_ok=True)
    (root / ".dvc/tmp/rwlock").write_text(rwlock(root, os.getpid(), " ".join(psutil.Process().cmdline())))
    clock = Clock(root, lambda _log: 0, monkeypatch)

    def sleep(seconds: float) -> None:
        clock.pauses.append(seconds)
        if len(clock.pauses) == 50:
            (root / ".dvc/tmp/rwlock").unlink()

    monkeypatch.setattr(clock.night, "_sleep", sleep)
    assert clock.night.run(Patience(3, 10.0)) == 0
    assert clock.pauses[6:] == 44 * [600.0]


def test_tries_on_a_full_disk_do_not_count_whatever_they_end_with(root, monkeypatch):
    room = [*(10 * [0]), *(10 * [10**9])]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, room.pop(0)))
    clock = Clock(root, lambda _log: 255, monkeypatch)
    assert clock.night.run(Patience(3, 10.0)) == 1
    assert len(clock.pauses) == 10 + 2


def test_dvcs_own_full_disk_may_pass_but_a_failed_stage_stays_failed_when_the_night_is_stopped(tmp_path):
    log = ReproLog(["train@cot"], tmp_path)
    log.read("ERROR: unexpected error - [Errno 28] No space left on device")
    log.close(255)
    assert log.own_errors() == {}
    stopped = ReproLog(["train@cot"], tmp_path)
    stopped.read("Running stage 'train@cot':")
    leave_events(tmp_path, "train@cot", message="x: No space left on device", can_pass=True)
    stopped.read("WARNING: failed to run: python stages/train.py cot, exited with 1")
    stopped.close(255, stopped_by=signal.SIGTERM)
    assert stopped.outcomes["train@cot"].result == "failed"


def test_pauses_grow_while_tries_bring_no_progress(root, monkeypatch):
    clock = Clock(root, lambda _log: 255, monkeypatch)
    assert clock.night.run(Patience(9, 10.0)) == 1
    assert clock.pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0]


# --- at the end, and without a terminal ---


def test_dvcs_advice_to_delete_a_living_owners_lock_is_not_passed_on(root, monkeypatch):
    """`dvc` finds the lock held between our look and its own."""
    night = Night(root, [], FakeJournal())
    lines: list[str] = []
    monkeypatch.setattr(night.journal, "write", lines.append, raising=False)
    info = {"pid": os.getpid(), "cmd": " ".join(psutil.Process().cmdline())}
    (root / ".dvc/tmp").mkdir(exist_ok=True)
    (root / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(root / "outputs/base"): info}, "read": {}}))
    advice = (
        f"If there are no processes with such PIDs, you can manually remove '{root}/.dvc/tmp/rwlock' and try again."
    )
    fake_dvc = root / "dvc.py"
    fake_dvc.write_text(f"print({advice!r}); raise SystemExit(255)")
    monkeypatch.setenv("PYTHONPATH", str(root))
    night._repro(ReproLog([], root))
    assert lines == [
        f"(another dvc (pid {os.getpid()}) is at work on {root / 'outputs/base'}: its lock must stay, and the night"
        " waits for it)"
    ]


def test_make_repro_says_who_else_is_at_work_and_where_to_look(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    (root / ".dvc/tmp").mkdir(exist_ok=True)
    (root / ".dvc/tmp/rwlock").write_text(rwlock(root, os.getpid(), " ".join(psutil.Process().cmdline())))
    assert dvc_lock.run(Path()) == 0
    said = capsys.readouterr().out
    assert f"another dvc (pid {os.getpid()}) is at work on {root / 'outputs/base'}; `coconut status` shows" in said
    assert "as long as it lives, .dvc/tmp/rwlock must stay" in said


def test_a_process_that_started_after_its_lock_was_written_is_not_the_holder(root):
    """Its pid was another one's, whose command line was the same."""
    path = root / ".dvc/tmp/rwlock"
    path.parent.mkdir(exist_ok=True)
    path.write_text(rwlock(root, os.getpid(), " ".join(psutil.Process().cmdline())))
    assert list(dvc_lock.paths_being_written(root)) == [root / "outputs/base"]
    started = psutil.Process().create_time()
    os.utime(path, (started - 30, started - 30))  # Clocks are set, and ticks are rounded.
    assert list(dvc_lock.paths_being_written(root)) == [root / "outputs/base"]
    os.utime(path, (started - 3600, started - 3600))
    assert dvc_lock.paths_being_written(root) == {}
    (sentence,) = repair(root)
    assert f"removed the locks of pid {os.getpid()}" in sentence


def test_a_night_that_failed_asks_for_a_page_of_what_there_is(root):
    (root / "stage.py").write_text("raise SystemExit(2)")
    night = standin.run(root, "coconut", "overnight", "--pause-s", "0.1", "--tries", "1")
    assert night.returncode == 1
    # The stand-in has nothing that the report knows, and says so: it was asked.
    assert "no page was written; `coconut report` says why" in night.stdout
    assert night.stdout.index("no page was written") < night.stdout.index("Summary:")


# As `make` does: first of the terminal's processes, it ignores the hang-up and waits for its child.
LEADER = """
import fcntl, os, signal, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, lambda *_: None)
child = subprocess.Popen([sys.executable, "-m", "coconut", "overnight"], process_group=0)
with open("pid", "w") as file:
    file.write(str(child.pid))
child.wait()
with open("exit_code", "w") as file:
    file.write(str(child.returncode))
"""


def drain(terminal: int) -> bool:
    """Read what a terminal shows, so that nobody waits for it to be read."""
    while select.select([terminal], [], [], 0)[0]:
        os.read(terminal, 65536)
    return True


@pytest.mark.slow
def test_a_terminal_that_closes_ends_the_night_in_order_even_behind_make(root):
    standin.behave(root, {"train@cot": [{"nap": 0.5}]})
    terminal, ours = os.openpty()
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER],
        cwd=root,
        env=standin.environment(),
        stdin=ours,
        stdout=ours,
        stderr=ours,
        start_new_session=True,
    )
    os.close(ours)
    wait_for(lambda: bool(drain(terminal)) and update_of(root, "train@cot") >= 2)
    os.close(terminal)
    leader.wait(PREEMPTION_S)
    assert (root / "exit_code").read_text() == str(128 + signal.SIGHUP)
    (journal,) = (root / "outputs/overnight").glob("*.log")
    stopped_at = re.search(r"train@cot: stopped at update (\d+)", journal.read_text())
    assert stopped_at is not None
    assert int(stopped_at[1]) == update_of(root, "train@cot")
