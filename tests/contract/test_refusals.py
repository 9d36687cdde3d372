"""Wrong parameters end before anything runs, with exit code 1 and one message that names the key."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from contract.projects import change_params, make_project, read_params, run, train_entry

COT, LATENT = train_entry("cot"), train_entry("coconut", "cot", 1)
CURRICULUM = {"cot": COT, "latent_1": LATENT, "latent_2": train_entry("coconut", "latent_1", 2)}
REMOVED = object()

REFUSALS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "misspelt key": ({"train.batchsize": 64}, ["train.batchsize", "unknown key", "did you mean batch_size?"]),
    "removed key": ({"runtime.fork_server": True}, ["runtime.fork_server: removed", "take it out"]),
    "misspelt section": ({"curiculum": {}}, ["curiculum", "unknown key", "did you mean curriculum?"]),
    "unknown key": ({"nonsense": 1}, ["nonsense: unknown key", "known here"]),
    "unknown key of an entry": ({"curriculum.cot.rate": 1}, ["curriculum.cot.rate", "unknown key"]),
    "missing key": ({"train.batch_size": REMOVED}, ["train.batch_size", "missing"]),
    "missing section": ({"train": REMOVED}, ["train", "missing"]),
    "missing key of an entry": ({"curriculum.cot.lr": REMOVED}, ["curriculum.cot.lr", "missing"]),
    "unknown method": (
        {"curriculum.cot.method": "nothing"},
        ["curriculum.cot.method", "'nothing'", "wanted one of", "no_cot"],
    ),
    "misspelt method": ({"curriculum.cot.method": "COCONUT"}, ["curriculum.cot.method", "did you mean coconut?"]),
    "key of another method": ({"curriculum.cot.icot_smoothing": 4}, ["curriculum.cot.icot_smoothing", "icot", "cot"]),
    "method without its keys": ({"curriculum.cot.method": "icot"}, ["curriculum.cot", "icot_tokens_per_epoch"]),
    "key that a method cannot have": (
        {"curriculum.i": train_entry("icot", select="best", icot_tokens_per_epoch=4, icot_smoothing=4)},
        ["curriculum.i.select", "'best'", "last"],
    ),
    "stage of a method without stages": (
        {"curriculum.cot.latent_stage": 2},
        ["curriculum.cot.latent_stage", "found 2"],
    ),
    "stage before the parent's": ({"curriculum.latent_2.latent_stage": 0}, ["curriculum.latent_2.latent_stage", "1"]),
    "unknown parent": ({"curriculum.latent_1.parent": "nobody"}, ["curriculum.latent_1.parent", "'nobody'", "base"]),
    "misspelt parent": ({"curriculum.latent_2.parent": "latent1"}, ["did you mean latent_1?"]),
    "cycle": ({"curriculum.cot.parent": "latent_2"}, ["curriculum.cot.parent", "cycle", "cot <- latent_2 <- latent_1"]),
    "own parent": ({"curriculum.cot.parent": "cot"}, ["curriculum.cot.parent", "cycle"]),
    "unusable name": ({"curriculum.report": COT}, ["curriculum.report", "not a usable name"]),
    "text for a number": ({"train.batch_size": "64"}, ["train.batch_size", "'64'", "whole number"]),
    "text for a rate": ({"curriculum.cot.lr": "fast"}, ["curriculum.cot.lr", "'fast'", "number"]),
    "text for a truth value": ({"latent.markers": "yes"}, ["latent.markers", "'yes'", "true or false"]),
    "number for a text": ({"model": 5}, ["model", "found 5", "text"]),
    "list for a mapping": ({"train": [1]}, ["train", "found a list", "mapping"]),
    "number out of range": ({"latent.uniform_prob": 1.2}, ["latent.uniform_prob", "1.2", "between 0 and 1"]),
    "no number": ({"train.weight_decay": float("nan")}, ["train.weight_decay", "finite number"]),
    "unknown choice": ({"train.precision": "fp16"}, ["train.precision", "'fp16'", "fp32", "bf16"]),
    "unknown thought": ({"latent.thought": "hidden"}, ["latent.thought", "'hidden'", "hidden[LAYER]", "normalised"]),
    "unknown thought of an entry": ({"curriculum.latent_1.thought": "x"}, ["curriculum.latent_1.thought", "'x'"]),
    "data without a source": ({"data.train": {"format": "gsm8k"}}, ["data.train", "file", "hub"]),
    "file outside of raw_dir": (
        {"data.train": {"format": "gsm8k", "file": "../a"}},
        ["data.train.file", "'../a'", "below data.raw_dir"],
    ),
    "no test set": ({"data.tests": {}}, ["data.tests", "at least one"]),
    "key of another generator": ({"data.generator.hops": 3}, ["data.generator.hops", "unknown key", "modulus"]),
    "samples that are all the same": (
        {"evaluate.samples": 4, "evaluate.temperature": 0},
        ["evaluate.temperature", "the same"],
    ),
    "empty curriculum": ({"curriculum": None}, ["curriculum", "found null", "mapping"]),
    "missing package": (
        {"train.optimizer": "adamw_8bit"},
        ["optimizer", "adamw_8bit", "bitsandbytes is not installed", "pip install"],
    ),
}
"""What is wrong, by dotted keys; and what the message must hold."""
TEXTS: dict[str, tuple[str, str, list[str]]] = {
    "key that stands twice": ("seed: 0\n", "seed: 0\nseed: 1\n", ["params.yaml: line", "'seed'", "already on line"]),
    "text that is no YAML": ("seed: 0\n", "seed: [0\n", ["params.yaml", "not valid YAML"]),
    "date that is none": ("seed: 0\n", "seed: 2026-13-01\n", ["params.yaml", "2026-13-01"]),
    "number for an entry's name": ("  cot:\n", "  1:\n", ["curriculum", "key 1 is a number", "quote it"]),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose parameters hold no mistake, before its first run."""
    made = make_project(tmp_path_factory.mktemp("refusals") / "project", {"curriculum": CURRICULUM})
    run(made, "python", "stages/digest_code.py")
    checked = run(made, "python", "stages/params.py")
    assert (made / "outputs/params.checked").exists(), checked.stderr
    shutil.rmtree(made / "outputs/logs")
    (made / "outputs/params.checked").unlink()
    shutil.copy(made / "params.yaml", made / "right.yaml")
    return made


def expect_refusal(project: Path, words: list[str]) -> None:
    done = run(project, "python", "stages/params.py", is_checked=False, timeout_s=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (message,) = [line for line in done.stderr.splitlines() if "| ERROR " in line]
    assert message == done.stderr.splitlines()[-1], "the message is the last line"
    assert [word for word in words if word not in message] == [], message
    assert not (project / "outputs/params.checked").exists(), "what waits for the check would run"


def slow_but(fast: str, names: dict[str, Any]) -> list[Any]:
    return [name if name == fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but("unknown method", REFUSALS))
def test_a_mistake_is_refused_in_one_message(project: Path, name: str) -> None:
    changes, words = REFUSALS[name]
    shutil.copy(project / "right.yaml", project / "params.yaml")
    change_params(project, {key: value for key, value in changes.items() if value is not REMOVED})
    tree = read_params(project)
    for dotted_key in (key for key, value in changes.items() if value is REMOVED):
        *keys, last = dotted_key.split(".")
        section = tree
        for key in keys:
            section = section[key]
        del section[last]
    (project / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    expect_refusal(project, words)


@pytest.mark.parametrize("name", slow_but("key that stands twice", TEXTS))
def test_a_file_that_yaml_would_read_otherwise_than_it_looks_is_refused(project: Path, name: str) -> None:
    right, wrong, words = TEXTS[name]
    text = (project / "right.yaml").read_text(encoding="utf-8")
    assert right in text
    (project / "params.yaml").write_text(text.replace(right, wrong, 1), encoding="utf-8")
    expect_refusal(project, words)


@pytest.mark.slow
@pytest.mark.parametrize("command", [("dvc", "repro"), ("python", "-m", "coconut", "repro")], ids=["dvc", "coconut"])
def test_a_refusal_comes_before_anything_runs(tmp_path: Path, command: tuple[str, ...]) -> None:
    project = make_project(tmp_path / "project", {"curriculum": CURRICULUM}, is_versioned=True)
    change_params(project, {"curriculum.latent_2.method": "nothing"})
    done = run(project, *command, is_checked=False)
    assert done.returncode != 0
    assert "curriculum.latent_2.method: found 'nothing', wanted one of" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    left = {path.name for path in (project / "outputs").iterdir()}
    assert left <= {"code", "logs", ".gitignore"}, "a later stage ran"
    assert not (project / "data/examples").exists()
