"""Trackers are told what history.csv holds, and never stop a run."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from loguru import logger

from coconut.config.params import parse_params
from coconut.tracking import Track, tracking
from coconut.training.callbacks import Callbacks
from test_config import shipped_tree
from test_loop import make_entry, make_trainer

CONFIG = {"lr": 0.1, "parent": None, "train": {"batch_size": 8}}


class FakeTracker(GeneralTracker):
    """Keeps what it is told, and fails where it is asked to."""

    name = "fake"
    requires_logging_directory = False
    fails_at = ""
    calls: list[tuple[Any, ...]]

    def __init__(self, project: str, **kwargs: Any) -> None:
        super().__init__()
        type(self).calls = [("made", project, kwargs)]

    def _called(self, *call: Any) -> None:
        self.calls.append(call)
        if self.fails_at == call[0]:
            raise RuntimeError("no connection")

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self._called("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._called("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._called("log", values, step)

    def finish(self) -> None:
        self._called("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeTracker]:
    PartialState()
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "fake", FakeTracker)
    monkeypatch.setattr(FakeTracker, "fails_at", "")
    return FakeTracker


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)


def test_a_tracker_is_told_the_config_and_the_numbers(fake: type[FakeTracker], tmp_path: Path) -> None:
    with tracking("fake", run="latent_2", config=CONFIG, folder=tmp_path) as track:
        track({"loss": 0.5, "entry": "latent_2", "first_update_loss": None, "epoch": 1}, 7)
    assert fake.calls == [
        ("made", "continuous-thought", {"name": "latent_2"}),
        ("start",),
        ("config", {"lr": 0.1, "parent": "None", "train.batch_size": 8}),
        ("log", {"loss": 0.5, "epoch": 1}, 7),
        ("finish",),
    ]


@pytest.mark.parametrize("moment", ["start", "config", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_stops_nothing(
    fake: type[FakeTracker], moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, warnings: list[str]
) -> None:
    monkeypatch.setattr(fake, "fails_at", moment)
    with tracking("fake", run="cot", config=CONFIG, folder=tmp_path) as track:
        for update in range(3):
            track({"loss": 0.5}, update)
    assert len(warnings) == 1
    assert "runtime.tracker: fake failed (RuntimeError: no connection); training goes on without it" in warnings[0]
    assert [call[0] for call in fake.calls].count("log") == {"start": 0, "config": 0, "log": 1, "finish": 3}[moment]


def test_an_error_of_the_run_itself_is_not_swallowed_and_the_tracker_is_closed(
    fake: type[FakeTracker], tmp_path: Path
) -> None:
    with pytest.raises(KeyError), tracking("fake", run="cot", config=CONFIG, folder=tmp_path):
        raise KeyError("ours")
    assert fake.calls[-1] == ("finish",)


def test_a_tracker_that_is_not_installed_is_one_warning_with_the_cure(
    fake: type[FakeTracker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, warnings: list[str]
) -> None:
    def start(_self: Any) -> None:
        raise ModuleNotFoundError("No module named 'fake'")

    monkeypatch.setattr(fake, "start", start)
    with tracking("fake", run="cot", config=CONFIG, folder=tmp_path) as track:
        track({"loss": 0.5}, 1)
    assert len(warnings) == 1
    assert "Run `pip install -e '.[fake]'` in the repository, or set runtime.tracker: none" in warnings[0]


def test_a_folder_that_cannot_be_made_stops_nothing(
    fake: type[FakeTracker], tmp_path: Path, warnings: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    with tracking("fake", run="cot", config=CONFIG, folder=tmp_path / "file" / "below") as track:
        track({"loss": 0.5}, 1)
    assert len(warnings) == 1
    assert fake is not None


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    with tracking("none", run="cot", config=CONFIG, folder=tmp_path / "logs") as track:
        track({"loss": 0.5}, 1)
    assert not [*tmp_path.iterdir()]


class Tracking(Callbacks):
    """Passes on what a trainer tracks."""

    def __init__(self, track: Track) -> None:
        self._track = track

    def track(self, values: Mapping[str, Any], update: int) -> None:
        self._track(values, update)


def test_the_trainer_tells_every_epoch_of_its_history() -> None:
    params = parse_params(shipped_tree())
    told: list[tuple[dict[str, Any], int]] = []
    callbacks = Tracking(lambda values, update: told.append((dict(values), update)))
    trainer = make_trainer(params, make_entry(params), callbacks=callbacks)
    trainer.fit()
    assert told[0] == ({"valid_loss": 1.0, "valid_accuracy": 0.5}, 0)
    epochs = [(values, update) for values, update in told if "epoch" in values]
    assert epochs == [(row, row["update"]) for row in trainer.position.history]


def test_training_is_the_same_whatever_the_tracker_does(fake: type[FakeTracker], tmp_path: Path) -> None:
    params = parse_params(shipped_tree())
    plain = make_trainer(params, make_entry(params))
    plain.fit()
    with tracking("fake", run="cot", config=CONFIG, folder=tmp_path) as track:
        tracked = make_trainer(params, make_entry(params), callbacks=Tracking(track))
        tracked.fit()
    assert [row["train_loss"] for row in tracked.position.history] == [
        row["train_loss"] for row in plain.position.history
    ]
    assert len(fake.calls) > 4


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    Accelerator(cpu=True)
    with tracking("tensorboard", run="latent_2", config=CONFIG, folder=tmp_path) as track:
        track({"loss": 0.5}, 1)
    assert [*(tmp_path / "tensorboard" / "latent_2").glob("events.*")]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.long
def test_wandb_writes_offline_where_nothing_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    Accelerator(cpu=True)
    with tracking("wandb", run="latent_2", config=CONFIG, folder=tmp_path) as track:
        track({"loss": 0.5}, 1)
    assert not warnings, json.dumps(warnings)
    assert [*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_its_data_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    Accelerator(cpu=True)
    with tracking("trackio", run="latent_2", config=CONFIG, folder=tmp_path) as track:
        track({"loss": 0.5}, 1)
    assert not warnings, json.dumps(warnings)
    assert [*(tmp_path / "trackio").iterdir()]
