"""SIGKILL at random moments of the real pipeline: nothing is lost, nothing is redone, every byte is the same.

`COCONUT_KILLS` says how many (4 by default, for CI); `COCONUT_KILLS_SEED` makes the draws. The summary
goes to the test's output: `pytest tests/test_kills.py -s`.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from coconut.model.fast.thresholds import Thresholds
from coconut.pipeline.dvc_lock import repair
from coconut.pipeline.record import keep_copy
from coconut.pipeline.states import last_update
from project import commit, environment, make_project, run, write_params

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3 * 3600),
    pytest.mark.skipif(sys.platform != "linux", reason="trainers die with dvc on Linux only"),
]

NUM_KILLS = int(os.environ.get("COCONUT_KILLS", "4"))
SEED = int(os.environ.get("COCONUT_KILLS_SEED", "0"))

RECIPE: dict[str, Any] = {
    "data.train.rows": 512,
    "runtime.save_every_s": 0.2,
    "runtime.log_every_s": 0.2,
    "curriculum": {
        "cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 16, "lr": 2e-3},
        "latent_1": {
            "parent": "cot", "method": "coconut", "latent_stage": 1, "epochs": 12, "lr": 2e-3, "select": "best",
        },
        "no_cot": {"parent": "base", "method": "no_cot", "latent_stage": 0, "epochs": 12, "lr": 2e-3},
    },
}  # fmt: skip
NUM_UPDATES_COT = 16 * 512 // 16
NUM_WIDE_KILLS = max(3, NUM_KILLS // 10)
WIDE_CONFIG = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 256, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
WIDE_RECIPE: dict[str, Any] = {
    "model": "models/wide",
    "data.train.rows": 128,
    "runtime.save_every_s": 0.2,
    "runtime.log_every_s": 0.2,
    "curriculum": {
        "cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 4, "lr": 1e-3},
        "latent_1": {"parent": "cot", "method": "coconut", "latent_stage": 1, "epochs": 6, "lr": 1e-3},
    },
}
"""At a width at which the fast path is on."""
TIMINGS = {
    "seconds", "cpu_seconds", "load", "tokens_per_s", "ms_per_update", "seconds_per_example", "peak_memory_mb",
    "cpu_seconds_per_example", "eval_load", "train_seconds", "train_cpu_seconds", "train_load",
    "peak_memory_mb_of_processes",
}  # fmt: skip


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("kills") / "fresh", RECIPE)


@pytest.fixture(scope="module")
def encoded(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that is ready to train."""
    project = Path(shutil.copytree(fresh, tmp_path_factory.mktemp("kills") / "encoded"))
    run(project, "dvc", "repro", "encode")
    return project


@pytest.fixture(scope="module")
def straight(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted run leaves."""
    project = Path(shutil.copytree(encoded, tmp_path_factory.mktemp("kills") / "straight"))
    run(project, "dvc", "repro")
    return results(project)


def results(project: Path) -> dict[str, Any]:
    """Every file the pipeline made, timings aside; of the report, which shows timings, the names."""
    found: dict[str, Any] = {}
    for path in sorted([*project.glob("data/*/*"), *project.glob("outputs/**/*")]):
        name = path.relative_to(project).as_posix()
        # DVC's own .gitignore files lose lines when a stage is restored from the run cache.
        if not path.is_file() or name.startswith(("outputs/logs/", "data/raw/")) or path.name == ".gitignore":
            continue
        if name.startswith(("outputs/report/", "outputs/evaluations/")):
            found[name] = "there"
        elif path.name in ("metrics.json", "costs.json", "train.json", "preprocess.json", "encode.json"):
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in TIMINGS}
        elif path.name == "history.csv":
            rows = csv.DictReader(path.read_text().splitlines())
            found[name] = [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]
        else:
            found[name] = path.read_bytes()
    return found


class Repro:
    """One `dvc repro` in a session of its own, listened to by a thread."""

    def __init__(self, project: Path, *targets: str) -> None:
        self.project = project
        self.lines: list[str] = []
        self.leftovers = set(project.glob(".resume/*/tmp-*"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", *targets],
            cwd=project,
            env=environment(project),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("Running stage '"):
                keep_copy(self.project)  # As `make overnight` does.

    @property
    def stage(self) -> str | None:
        """The stage that dvc started last."""
        names = self.stages_run()
        return names[-1] if names else None

    def stages_run(self) -> list[str]:
        return [line.split("'")[1] for line in list(self.lines) if line.startswith("Running stage '")]

    def stage_process(self) -> psutil.Process | None:
        try:
            return next(iter(psutil.Process(self.process.pid).children()), None)
        except psutil.NoSuchProcess:
            return None

    def finish(self) -> int:
        """Wait for dvc and for all that holds its output."""
        code = self.process.wait(600)
        self._listener.join(60)
        assert not self._listener.is_alive(), "a stage outlived its dvc"
        return code


# --- moments --------------------------------------------------------------------------------
# Each waits until its moment has come; the kill follows after a random part of its length.


def is_training(repro: Repro) -> bool:
    return (repro.stage or "").startswith("train@") and any("before the first update" in line or "resumed at" in line
            for line in _since_last_stage(repro))  # fmt: skip


def is_saving(repro: Repro) -> bool:
    """A save beyond the first of this session, so that there is something to resume."""
    is_resumed = any("resumed at" in line for line in _since_last_stage(repro))
    has_saved = is_resumed or any(repro.project.glob(f".resume/{repro.stage}-*/state-*"))
    return has_saved and bool(set(repro.project.glob(".resume/*/tmp-*")) - repro.leftovers)


def is_writing_outputs(repro: Repro) -> bool:
    stage = repro.stage or ""
    return stage.startswith("train@") and (repro.project / "outputs" / stage[6:] / "checkpoint").exists()


def is_evaluating(repro: Repro) -> bool:
    return (repro.stage or "").startswith("evaluate@")


def is_recording(repro: Repro) -> bool:
    return bool(repro.lines) and repro.lines[-1].startswith("Updating lock file")


def is_anything(repro: Repro) -> bool:
    return bool(repro.lines)


MOMENTS: dict[str, tuple[Callable[[Repro], bool], float]] = {
    "training": (is_training, 5.0),
    "saving": (is_saving, 0.03),
    "writing outputs": (is_writing_outputs, 0.1),
    "evaluation": (is_evaluating, 5.0),
    "recording": (is_recording, 0.1),
    "any time": (is_anything, 8.0),
}
# Most of them leave the stage unfinished, so that a pipeline takes many kills.
MOMENTS_OF = {
    "train": [*3 * ["training"], *3 * ["saving"], *2 * ["writing outputs"], "recording", "any time"],
    "evaluate": [*3 * ["evaluation"], "recording"],
}
ANY_STAGE = [*3 * ["any time"], "recording"]


def _since_last_stage(repro: Repro) -> list[str]:
    lines = list(repro.lines)
    starts = [number for number, line in enumerate(lines) if line.startswith("Running stage '")]
    return lines[starts[-1] :] if starts else []


def kill_somewhen(repro: Repro, draw: random.Random) -> tuple[str, str] | None:
    """Kill a random victim at a random moment; None if dvc ended before it came."""
    num_stages = draw.choice([1, 1, 1, 1, 1, 2])
    if not wait_for(repro, lambda: len(repro.stages_run()) >= num_stages):
        return None
    kind = (repro.stage or "").partition("@")[0]
    moment = draw.choice(MOMENTS_OF.get(kind, ANY_STAGE))
    has_come, length_s = MOMENTS[moment]
    if not wait_for(repro, lambda: has_come(repro)):
        return None
    time.sleep(draw.random() * length_s)
    stage, victim = repro.stage_process(), draw.choice(["stage", "dvc", "group"])
    if repro.process.poll() is not None:
        return None
    if victim == "stage" and stage is not None:
        stage.kill()
    elif victim == "group":
        os.killpg(repro.process.pid, signal.SIGKILL)
    else:
        victim = "dvc"
        repro.process.kill()
    return moment, victim


def wait_for(repro: Repro, condition: Callable[[], bool]) -> bool:
    while not condition():
        if repro.process.poll() is not None:
            return False
        time.sleep(0.001)
    return True


# --- the test -------------------------------------------------------------------------------


def recorded(project: Path) -> dict[str, Any]:
    """The stages that `dvc.lock` says are finished."""
    path = project / "dvc.lock"
    return yaml.safe_load(path.read_bytes())["stages"] if path.exists() else {}


def saved_updates(project: Path) -> dict[str, int]:
    return {folder.name: last_update(folder) or 0 for folder in (project / ".resume").glob("*")}


class Witness:
    """Watches one project through its kills and restarts."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.finished: set[str] = set(recorded(project))
        self.saved: dict[str, int] = {}
        self.tally: Counter[str] = Counter()

    def check(self, repro: Repro) -> None:
        """After a run, killed or not: nothing finished was run again, and no state went backwards."""
        redone = self.finished & set(repro.stages_run())
        assert not redone, f"{redone} ran again, {dict(self.tally)}:\n{''.join(repro.lines)}"
        self.tally["resumed"] += sum("resumed at update" in line for line in repro.lines)
        for sentence in repair(self.project):
            self.tally["torn dvc.lock" if "dvc.lock: torn" in sentence else "stale or torn rwlock"] += 1
        self.finished |= recorded(self.project).keys()
        saved = saved_updates(self.project)
        for name, update in self.saved.items():
            assert saved.get(name, 0) >= update, f"{name}: update {update} was saved, now {saved.get(name)}"
        self.saved = saved


def test_random_kills_lose_nothing_redo_nothing_and_change_no_byte(
    fresh: Path, encoded: Path, straight: dict[str, Any], tmp_path: Path
) -> None:
    kill_and_compare(fresh, encoded, straight, tmp_path, num_kills=NUM_KILLS)


def test_random_kills_change_no_byte_on_the_fast_path_either(tmp_path: Path) -> None:
    assert WIDE_CONFIG["n_embd"] >= Thresholds().min_width
    fresh = make_project(tmp_path / "fresh", WIDE_RECIPE)
    (fresh / "models/wide").mkdir()
    (fresh / "models/wide/config.json").write_text(json.dumps(WIDE_CONFIG))
    commit(fresh)
    encoded = Path(shutil.copytree(fresh, tmp_path / "encoded"))
    run(encoded, "dvc", "repro", "encode")
    straight = Path(shutil.copytree(encoded, tmp_path / "straight"))
    run(straight, "dvc", "repro")
    # What comes before the training is killed in the other test.
    kill_and_compare(encoded, encoded, results(straight), tmp_path, num_kills=NUM_WIDE_KILLS)


def kill_and_compare(fresh: Path, encoded: Path, straight: dict[str, Any], tmp_path: Path, *, num_kills: int) -> None:
    """Kill pipelines that begin from either project, finish them, and compare with what a straight run left."""
    draw = random.Random(SEED)
    kills: Counter[tuple[str, str]] = Counter()
    tally: Counter[str] = Counter()
    begin = time.monotonic()
    while kills.total() < num_kills:
        # Training is what kills cost most: most pipelines begin there.
        start = fresh if tally["pipelines"] % 4 == 0 else encoded
        project = Path(shutil.copytree(start, tmp_path / f"project-{tally['pipelines']}"))
        witness = Witness(project)
        is_finished = False
        while not is_finished:
            repro = Repro(project)
            if kills.total() < num_kills and (kill := kill_somewhen(repro, draw)):
                kills[kill] += 1
                sys.stdout.write(f"{kills.total()} {repro.stage}: {' '.join(kill)}\n")
            is_finished = repro.finish() == 0
            witness.check(repro)
            if not is_finished and kills.total() >= num_kills:
                tally["last runs that failed"] += 1
                assert tally["last runs that failed"] < 3, "".join(repro.lines)
        assert results(project) == straight
        tally += witness.tally
        tally["pipelines"] += 1
        shutil.rmtree(project)
        sys.stdout.write(f"\n{kills.total()} kills so far: {dict(tally)}")
    summary = [f"{kills.total()} kills in {time.monotonic() - begin:.0f} s, seed {SEED}: {dict(tally)}"]
    summary += [f"  {moment:<16} {victim:<6} {count}" for (moment, victim), count in sorted(kills.items())]
    sys.stdout.write("\n" + "\n".join(summary) + "\n")


@pytest.fixture
def small_disk(encoded: Path, tmp_path: Path) -> Iterator[Path]:
    """A project whose `outputs/cot` lies on a disk that holds the outputs just so."""
    project = Path(shutil.copytree(encoded, tmp_path / "project"))
    disk = project / "outputs/cot"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs can be mounted by root on Linux only")
    yield project
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_fills_up_while_outputs_are_written_costs_seconds(
    small_disk: Path, straight: dict[str, Any]
) -> None:
    filler = small_disk / "outputs/cot/filler"
    repro = Repro(small_disk, "train@cot")
    assert wait_for(repro, lambda: is_training(repro)), "".join(repro.lines)
    filler.write_bytes(b"0" * 3_500_000)
    assert repro.finish() != 0
    output = "".join(repro.lines)
    assert "| ERROR   | train@cot: " in output
    assert "No space left on device" in output
    assert "Traceback" not in output
    filler.unlink()
    again = Repro(small_disk, "train@cot")
    assert again.finish() == 0, "".join(again.lines)
    assert any(f"train@cot: resumed at update {NUM_UPDATES_COT}" in line for line in again.lines)
    weights = "outputs/cot/checkpoint/model.safetensors"
    assert (small_disk / weights).read_bytes() == straight[weights]


def test_a_disk_that_is_too_small_is_found_before_the_first_update(small_disk: Path) -> None:
    (small_disk / "outputs/cot/filler").write_bytes(b"0" * 3_500_000)
    repro = Repro(small_disk, "train@cot")
    assert repro.finish() != 0
    output = "".join(repro.lines)
    assert "free on its disk" in output
    assert "before the first update" not in output
    assert "Traceback" not in output


def test_an_edit_during_the_run_is_refused_and_undoing_it_keeps_the_training(
    encoded: Path, straight: dict[str, Any], tmp_path: Path
) -> None:
    project = Path(shutil.copytree(encoded, tmp_path / "project"))
    params = project / "params.yaml"
    before = params.read_text()
    repro = Repro(project, "train@cot")
    assert wait_for(repro, lambda: is_training(repro))
    write_params(project, {"train.weight_decay": 0.5})
    assert repro.finish() != 0
    assert "train@cot: changed while it ran: params.yaml: train. Its outputs do not count" in "".join(repro.lines)
    assert "train@cot" not in recorded(project)
    assert not (project / "outputs/cot/checkpoint").exists()
    params.write_text(before)
    again = Repro(project, "train@cot")
    assert again.finish() == 0
    assert any(f"train@cot: resumed at update {NUM_UPDATES_COT}" in line for line in again.lines)
    weights = "outputs/cot/checkpoint/model.safetensors"
    assert (project / weights).read_bytes() == straight[weights]
