"""SIGKILL at random moments of `dvc repro`: run again, it leaves the bytes of an undisturbed run.

`COCONUT_CONTRACT_KILLS` says how many kills (2 by default), `COCONUT_CONTRACT_KILLS_SEED` makes the draws. One kill in
four falls into the training of the entry `killed`, whose method is `COCONUT_CONTRACT_KILLS_METHOD`: a name such as
`icot`, or an entry's keys such as `{method: icot, icot_tokens_per_epoch: 4, icot_smoothing: 4}`. The summary goes to
the test's output: `pytest tests/contract/test_kills.py -s`.
"""

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from contract.projects import expect_same, make_project, results, run, start, train_entry

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3 * 3600),
    pytest.mark.skipif(sys.platform != "linux", reason="stages end with their dvc on Linux only"),
]

NUM_KILLS = int(os.environ.get("COCONUT_CONTRACT_KILLS", "2"))
SEED = int(os.environ.get("COCONUT_CONTRACT_KILLS_SEED", "0"))
METHOD = os.environ.get("COCONUT_CONTRACT_KILLS_METHOD", "coconut")
AIMED = "train@killed"
LATENT_METHODS = ("coconut", "no_thoughts", "pause_as_thought")
TARGETS = ("evaluate@cot", "evaluate@killed")
ENTRIES = ("base", "cot", "killed")


def killed_entry(asked: str) -> dict[str, Any]:
    """Return the entry that kills are aimed at, from a method's name or from an entry's keys.

    >>> killed_entry("{method: pause, epochs: 2}")
    {'parent': 'cot', 'method': 'pause', 'latent_stage': 0, 'epochs': 2, 'lr': 0.002}
    """
    given = yaml.safe_load(asked)
    given = given if isinstance(given, dict) else {"method": given}
    stage = 1 if given["method"] in LATENT_METHODS else 0
    rates = {"icot_tokens_per_epoch": 4, "icot_smoothing": 4} if given["method"] == "icot" else {}
    return train_entry(given["method"], "cot", stage, epochs=12) | rates | given


class Repro:
    """One `dvc repro` in a session of its own, listened to by a thread."""

    def __init__(self, project: Path) -> None:
        self.project, self.lines = project, list[str]()
        self.begun_at = dict[str, float]()
        self.process = start(project, "dvc", "repro", *TARGETS)
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("Running stage '"):
                self.begun_at[line.split("'")[1]] = time.monotonic()

    @property
    def stage(self) -> str | None:
        """The stage that dvc started last."""
        return next(reversed(list(self.begun_at)), None)

    def is_in(self, stage: str) -> bool:
        return self.stage == stage

    def has_run(self, stage: str) -> bool:
        return stage in self.begun_at

    def has_saved(self, stage: str) -> bool:
        """Say whether this run can have saved a state of a training, beside what was there before it."""
        has_begun = any("before the first update" in line or "resumed at" in line for line in self._lines_of(stage))
        return has_begun and any(self.project.glob(f".resume/{stage}-*/state-*"))

    def is_resumed(self, stage: str) -> bool:
        return any("resumed at update" in line for line in self._lines_of(stage))

    def _lines_of(self, stage: str) -> list[str]:
        lines = list(self.lines)
        begin = [number for number, line in enumerate(lines) if line.startswith(f"Running stage '{stage}'")]
        return lines[begin[0] :] if begin else []

    def waits_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; return False if the run ends before."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return self.process.poll() is None

    def kill(self, victim: str) -> None:
        """Kill the stage's process, dvc, or the whole session."""
        stages = []
        if victim == "stage":
            try:
                stages = psutil.Process(self.process.pid).children()
            except psutil.NoSuchProcess:
                return
        if stages:
            stages[0].kill()
        elif victim == "session":
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()

    def finish(self) -> int:
        """Wait for dvc, and for everything that holds its output."""
        exit_code = self.process.wait(900)
        self._listener.join(90)
        assert not self._listener.is_alive(), "a stage outlived its dvc"
        return exit_code


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {
        "data.train": {"format": "generated", "rows": 256},
        "runtime.save_every_s": 0.2,
        "runtime.log_every_s": 0.2,
        "curriculum": {"cot": train_entry("cot", epochs=8), "killed": killed_entry(METHOD)},
    }
    return make_project(tmp_path_factory.mktemp("kills") / "fresh", changes, is_versioned=True)


@pytest.fixture(scope="module")
def encoded(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that is ready to train."""
    project = Path(shutil.copytree(fresh, tmp_path_factory.mktemp("kills") / "encoded"))
    run(project, "dvc", "repro", "encode")
    return project


@pytest.fixture(scope="module")
def straight(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float, float]:
    """What an undisturbed run leaves; its seconds, and those of the training that is aimed at."""
    project = Path(shutil.copytree(encoded, tmp_path_factory.mktemp("kills") / "straight"))
    begin = time.monotonic()
    repro = Repro(project)
    assert repro.finish() == 0, "".join(repro.lines)
    seconds, starts = time.monotonic() - begin, sorted(repro.begun_at.items(), key=lambda item: item[1])
    names = [name for name, _ in starts]
    (_, begun), (_, ended) = starts[names.index(AIMED) : names.index(AIMED) + 2]
    return results(project, ENTRIES), seconds, ended - begun


def kill_once(repro: Repro, draw: random.Random, *, is_aimed: bool, seconds: float) -> str | None:
    """Kill within so many seconds; return where it fell, or None if the run, or the stage aimed at, ended before."""
    if is_aimed and not repro.waits_for(lambda: repro.is_in(AIMED) and repro.has_saved(AIMED)):
        return None
    moment, victim = time.monotonic() + draw.random() * seconds, draw.choice(["stage", "dvc", "session"])
    if not repro.waits_for(lambda: time.monotonic() >= moment) or (is_aimed and not repro.is_in(AIMED)):
        return None
    stage = repro.stage or "the start"
    repro.kill(victim)
    return f"{stage}: {victim}"


@dataclass
class Pipeline:
    """One project that is run until it is done, with kills on the way."""

    project: Path
    must_resume: bool = False
    is_resumed: bool = False
    kills: list[str] = field(default_factory=list)

    def finish(self, draw: random.Random, num_before: int, seconds: float, seconds_aimed: float) -> None:
        """Run again after every kill, with what `coconut repair` mends, until there is nothing left to do."""
        while True:
            repro, num_kills, killed = Repro(self.project), num_before + len(self.kills), None
            if num_kills < NUM_KILLS:
                is_aimed = num_kills % 4 == 0
                killed = kill_once(repro, draw, is_aimed=is_aimed, seconds=seconds_aimed / 2 if is_aimed else seconds)
            exit_code = repro.finish()
            # A training that was killed after its last update may have been recorded: then it does not run again.
            if self.must_resume and repro.has_run(AIMED) and exit_code == 0:
                assert self.is_resumed or repro.is_resumed(AIMED), "".join(repro.lines)
            self.is_resumed |= repro.is_resumed(AIMED)
            if exit_code == 0:
                return
            assert killed is not None, f"nobody killed it, after {self.kills}:\n{''.join(repro.lines)}"
            self.kills.append(killed)
            if num_kills % 4 == 0:
                self.must_resume, self.is_resumed = True, False
            run(self.project, "python", "-m", "coconut", "repair")


def test_random_kills_change_no_byte(
    fresh: Path, encoded: Path, straight: tuple[dict[str, Any], float, float], tmp_path: Path
) -> None:
    expected, seconds, seconds_aimed = straight
    draw, kills, num_pipelines = random.Random(SEED), list[str](), 0
    while len(kills) < NUM_KILLS:
        start_from = fresh if num_pipelines % 4 == 1 else encoded
        pipeline = Pipeline(Path(shutil.copytree(start_from, tmp_path / f"project-{num_pipelines}")))
        pipeline.finish(draw, len(kills), seconds, seconds_aimed)
        expect_same(results(pipeline.project, ENTRIES), expected)
        shutil.rmtree(pipeline.project)
        kills += pipeline.kills
        num_pipelines += 1
        sys.stdout.write(f"pipeline {num_pipelines}, seed {SEED}: {pipeline.kills or 'no kill'}\n")
    assert sum(kill.startswith(f"{AIMED}: ") for kill in kills) >= NUM_KILLS / 4
