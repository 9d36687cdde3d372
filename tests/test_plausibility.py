"""What a run would lack is said by the stage `params`, before anything is trained."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from coconut.config.params import parse_params
from coconut.config.schema import Params
from coconut.config.strict import parse_yaml
from coconut.pipeline.machine import check_machine
from coconut.pipeline.plausibility import check_model_config, find_warnings, most_rows, warnings_about_entry
from coconut.recipes import find_recipes, whole_params
from inprocess import make_folder, stage
from test_config import shipped_tree

ROOT = Path(__file__).parents[1]
CODI = {"parent": "cot", "method": "codi", "latent_stage": 0, "epochs": 1, "lr": 1e-3}
MANY = {"train": 10_000, "valid": 1_000, "test": 1_000}


def params(changes: dict[str, Any] | None = None) -> Params:
    tree = shipped_tree()
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        section = tree
        for name in path:
            section = section[name]
        section[last] = value
    return parse_params(tree)


CUT_DOWN = {
    "gsm8k-smollm2": ["data.tests.test"],
    "prosqa-small": ["data.tests.test"],
    "released-codi-gpt2": ["curriculum"],
    "released-coconut-gpt2": ["curriculum"],
}
"""Recipes that say themselves that they are too small for a result, or that they train nothing."""


@pytest.mark.parametrize("name", find_recipes(ROOT))
def test_what_we_ship_is_plausible(name: str) -> None:
    shipped = parse_params(parse_yaml(whole_params(name, ROOT), name))
    warnings = find_warnings(shipped, most_rows(shipped.data))
    assert [warning.partition(":")[0] for warning in warnings] == CUT_DOWN.get(name, [])


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, {"train": 20_000, "valid": 1_000, "test": 1_000}),
        ({"data.max_train": 300}, {"train": 300, "valid": 1_000, "test": 1_000}),
        ({"data.max_train": 30_000}, {"train": 20_000, "valid": 1_000, "test": 1_000}),
        (
            {
                "data.train": {"format": "canonical", "file": "a"},
                "data.tests.test": {"format": "canonical", "file": "b"},
            },
            {"train": None, "valid": 1_000, "test": None},
        ),
    ],
)
def test_rows_are_known_as_far_as_the_parameters_say(changes: dict[str, Any], rows: dict[str, int | None]) -> None:
    assert most_rows(params(changes).data) == rows


@pytest.mark.parametrize(
    ("num_test", "changes", "warnings"),
    [
        (100, {}, []),
        (None, {}, []),
        (99, {}, ["data.tests.test: accuracies will be of 99 examples at most, and uncertain by 10 points either way"]),
        (25, {}, ["data.tests.test: accuracies will be of 25 examples at most, and uncertain by 20 points either way"]),
        (1_000, {"evaluate.max_examples": 50}, ["data.tests.test: accuracies will be of 50 examples at most"]),
    ],
)
def test_a_small_test_set_is_doubted(num_test: int | None, changes: dict[str, Any], warnings: list[str]) -> None:
    found = find_warnings(params(changes), MANY | {"test": num_test})
    assert [warning.startswith(start) for warning, start in zip(found, warnings, strict=True)] == [True] * len(warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"curriculum.cot.select": "best"}, "curriculum.cot: select: best goes by 40 validation examples at most"),
        ({"curriculum.cot.min_accuracy": 0.5}, "curriculum.cot: min_accuracy goes by 40 validation examples at most"),
    ],
)
def test_a_small_validation_set_is_doubted_where_it_decides(changes: dict[str, Any], message: str | None) -> None:
    found = find_warnings(params(changes), MANY | {"valid": 40})
    assert [warning.partition(", mostly")[0] for warning in found] == ([message] if message else [])


@pytest.mark.parametrize(
    ("num_train", "changes", "message"),
    [
        # 5 epochs of 20 updates are as many as the warm-up has, so that lr is reached in the last one only.
        (
            64 * 20,
            {},
            "cot: ends within the warm-up, .* is 100, but it has 100 updates .5 epochs of 20.",
        ),
        (64 * 20 + 1, {}, None),
        (64 * 20 + 1, {"curriculum.cot.max_updates": 100}, "cot: ends within the warm-up, .* it has 100 updates"),
        (300, {"train.warmup_updates": 0}, None),
        (64, {"train.warmup_updates": 0}, "cot: batch_size 64 takes all 64 training examples at once"),
        (65, {"train.warmup_updates": 0}, None),
        (None, {}, None),
    ],
)
def test_an_entry_with_few_updates_is_doubted(num_train: int | None, changes: dict[str, Any], message: str) -> None:
    warnings = warnings_about_entry(params(changes).curriculum, "cot", num_train)
    assert len(warnings) == (message is not None)
    for warning in warnings:
        assert re.match(f"curriculum.{message}", warning)


def test_updates_of_an_optimizer_that_is_taken_over_count_towards_its_warm_up() -> None:
    # 3 epochs of 21 updates are fewer than 100, but the parent has done 5 such epochs.
    shared, fresh = params(), params({"curriculum.latent_1.reset_optimizer": True})
    assert warnings_about_entry(shared.curriculum, "latent_1", 64 * 21) == []
    (warning,) = warnings_about_entry(fresh.curriculum, "latent_1", 64 * 21)
    assert "it has 63 updates (3 epochs of 21); lower" in warning
    (warning,) = warnings_about_entry(shared.curriculum, "latent_1", 300)
    assert "it has 15 updates (3 epochs of 5), after 25 of the parents whose optimizer it takes over; lower" in warning


def test_a_model_that_dvc_does_not_watch_is_doubted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("models/mine", "elsewhere/mine"):
        (tmp_path / folder).mkdir(parents=True)
    for model in ("models/mine", "./models/mine", str(tmp_path / "models/mine")):
        assert find_warnings(params({"model": model}), MANY) == []
    for model in ("elsewhere/mine", str(tmp_path / "elsewhere/mine")):
        (warning,) = find_warnings(params({"model": model}), MANY)
        assert warning.startswith(f"model: DVC watches only models/ for changes, not {model};")


# --- the machine ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"curriculum.latent_3.thought": "hidden[-9]"},
            r"curriculum\.latent_3\.thought: found layer -9, but the model",
        ),
        (
            {"latent.thought": "suppressed[30]"},
            r"curriculum\.cot\.thought: found layer 30, but the model has [0-9]+ layers",
        ),
        (
            {"curriculum.pause_1": CODI | {"distill_layers": [1, 7]}},
            r"curriculum\.pause_1\.distill_layers: found layer 7",
        ),
    ],
)
def test_every_entry_is_held_against_the_models_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model_config(params(changes))


def test_a_model_whose_config_is_not_here_is_left_to_the_stage_base(tmp_path: Path) -> None:
    for model in ("nobody/nothing", str(tmp_path)):
        check_model_config(params({"model": model, "curriculum.latent_3.thought": "hidden[-9]"}))
    (tmp_path / "config.json").write_text("no json")
    check_model_config(params({"model": str(tmp_path), "curriculum.latent_3.thought": "hidden[-9]"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum.cot.lr": 2e3}, "curriculum: lr of cot (2000) is high for a model, which may"),
        ({"model": "gpt2"}, "curriculum: lr of cot (0.002), "),
        ({}, None),
    ],
)
def test_a_rate_that_is_far_too_high_is_doubted(changes: dict[str, Any], message: str | None) -> None:
    warnings = [warning for warning in find_warnings(params(changes), MANY) if " lr of " in warning]
    assert [warning[: len(message or "")] for warning in warnings] == ([] if message is None else [message])


def test_packages_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_machine(params()) == []
    for package in ("wandb", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)  # So Python marks a module that cannot be imported.
    assert check_machine(params()) == []
    assert check_machine(params({"runtime.tracker": "wandb"})) == [
        "runtime.tracker: wandb is not installed, training will go on without it; run `make trackers`, or set"
        " runtime.tracker: none"
    ]
    with pytest.raises(
        ValueError,
        match=r"curriculum.latent_2.optimizer: found adamw_8bit, but bitsandbytes is not installed;.*'\.\[bitsand",
    ):
        check_machine(params({"curriculum.latent_2.optimizer": "adamw_8bit"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_stage_params_refuses_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    project = make_folder(tmp_path / "project", {"runtime.device": "cuda"})
    error = stage(project, "params").error
    assert error == "params: runtime.device: found cuda, but torch sees no GPU here; use auto or cpu"


def test_the_stage_params_says_what_is_doubted_and_goes_on(tmp_path: Path) -> None:
    project = make_folder(tmp_path / "project", {"train.warmup_updates": 500})
    ended = stage(project, "params")
    assert ended.exit_code == 0
    assert "WARNING | data.tests.test: accuracies will be of 16 examples at most" in ended.terminal
    assert "WARNING | curriculum.cot: ends within the warm-up" in ended.terminal
    assert (project / "outputs/params.checked").read_text() == "params.yaml holds no mistake\n"
