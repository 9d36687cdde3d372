"""`dvc exp run -S key=value` reaches every scalar key of params.yaml."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from contract.projects import ROOT, make_project, read_params, run

pytestmark = pytest.mark.slow

WORDS = {
    "model": "models/tiny",
    "revision": "v1.0",
    "raw_dir": "data/other",
    "task": "search",
    "edges": "triples",
    "prompt": "bare",
    "thought": "hidden[-2]",
    "precision": "bf16",
    "optimizer": "adamw_8bit",
    "schedule": "cosine",
    "select": "best",
    "device": "cpu",
    "sharding": "update",
    "launcher": "srun",
    "tracker": "tensorboard",
    "reference": "cot",
    "format": "generated",
}
"""Another value for keys that hold text, by the last part of the key; `all` and `auto` become a number."""
SAME = {"format", "task"}
"""What is written again as it is: another value would need other keys beside it."""
REFUSED_HERE = {"train.optimizer": ["adamw_8bit", "bitsandbytes is not installed"]}
"""What this machine lacks: the refusal shows that the value has arrived."""


def scalars(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def others(tree: dict[str, Any]) -> dict[str, Any]:
    """Return another valid value for every scalar key; entries get methods with stages and another tree of parents."""
    entries = tree["curriculum"]
    root = next(name for name, entry in entries.items() if entry["parent"] != "base" and entry["latent_stage"] == 0)
    return {key: _other(key, value, root) for key, value in scalars(tree) if key not in REFUSED_HERE}


def _other(key: str, value: Any, root: str) -> Any:
    last = key.rpartition(".")[2]
    if last == "parent":
        return root if value == "base" else "base"
    if last == "method":
        return "no_thoughts" if value == "coconut" else "coconut"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2
    if value in ("all", "auto", "none") and last not in WORDS:
        return 1
    return WORDS[last]


def written(value: Any) -> str:
    """Write a value as `-S` takes it: brackets need quotes of their own."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) and re.search(r"[^\w/.-]", value) else str(value)


def overrides(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in ("-S", f"{key}={written(value)}")]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the shipped params.yaml, comments and all."""
    made = make_project(tmp_path / "project", {}, is_versioned=True)
    shutil.copy(ROOT / "params.yaml", made)
    (made / "data/other").mkdir()
    (made / "data/other/README").touch()
    run(made, "git", "add", "-A")
    run(made, "git", "commit", "-qm", "shipped")
    return made


def test_every_scalar_can_be_overridden_at_once(project: Path) -> None:
    before, text = read_params(project), (project / "params.yaml").read_text(encoding="utf-8")
    values = others(before)
    changed = {key for key, value in scalars(before) if key in values and values[key] != value}
    assert {key for key, _ in scalars(before)} - changed - REFUSED_HERE.keys() <= {
        key for key, _ in scalars(before) if key.rpartition(".")[2] in SAME
    }
    run(project, "dvc", "exp", "run", *overrides(values), "params")
    assert (project / "outputs/params.checked").exists(), "the project took every value"
    assert dict(scalars(read_params(project))) == dict(scalars(before)) | values
    lines = (project / "params.yaml").read_text(encoding="utf-8").split("\n")
    assert [line.partition("#")[2] for line in lines] == [line.partition("#")[2] for line in text.split("\n")]


@pytest.mark.parametrize("key", REFUSED_HERE)
def test_a_value_that_this_machine_lacks_is_refused_by_its_name(project: Path, key: str) -> None:
    done = run(project, "dvc", "exp", "run", "-S", f"{key}={WORDS[key.rpartition('.')[2]]}", "params", is_checked=False)
    assert done.returncode != 0
    assert [word for word in REFUSED_HERE[key] if word not in done.stdout + done.stderr] == []


def test_a_key_that_is_not_there_is_refused(project: Path) -> None:
    done = run(project, "dvc", "exp", "run", "-S", "train.batchsize=64", "params", is_checked=False)
    assert done.returncode != 0
    assert "batchsize" in done.stdout + done.stderr
    assert read_params(project) == yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def test_an_entry_is_added_and_another_taken_out(project: Path) -> None:
    added = "+curriculum.longer={parent: latent_3, method: coconut, latent_stage: 3, epochs: 1, lr: 5e-5}"
    run(project, "dvc", "exp", "run", "-S", added, "-S", "~curriculum.no_cot", "params")
    entries = read_params(project)["curriculum"]
    assert "no_cot" not in entries
    assert entries["longer"]["parent"] == "latent_3"
    assert float(entries["longer"]["lr"]) == 5e-5


def test_a_sweep_queues_an_experiment_for_every_value(project: Path) -> None:
    done = run(project, "dvc", "exp", "run", "--queue", "-S", "seed=0,1,2")
    assert done.stdout.count("Queued experiment") == 3, done.stdout
