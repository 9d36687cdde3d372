"""`dvc exp run -S key=value` writes params.yaml again: only the line of the key changes. And how a value is quoted."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides, to_hydra_overrides

from coconut.config.params import load_params, parse_params
from coconut.config.strict import read_yaml
from coconut.config.thought import parse_thought
from coconut.recipes import find_recipes, whole_params
from marks import slow_but
from project import run

ROOT = Path(__file__).parents[1]


def scalars(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def another(value: Any) -> str:
    if isinstance(value, bool):
        return str(not value).lower()
    return str(value + 1) if isinstance(value, int | float) else "another"


def changed_lines(before: Path, after: Path) -> list[tuple[str, str]]:
    old, new = (path.read_text(encoding="utf-8").split("\n") for path in (before, after))
    assert len(old) == len(new)
    return [(line, other) for line, other in zip(old, new, strict=True) if line != other]


def expect_only_values_changed(lines: list[tuple[str, str]], keys: list[str]) -> None:
    for (old, new), key in zip(lines, keys, strict=True):
        start = re.match(r" *[\w-]+:", old)
        assert start is not None
        assert start[0].strip() == f"{key.rpartition('.')[2]}:"
        assert new.startswith(start[0])
        assert old.partition(" #")[2] == new.partition(" #")[2]


@pytest.mark.parametrize("name", slow_but(["default"], find_recipes(ROOT)))
def test_changing_every_value_changes_its_line_and_no_other(tmp_path: Path, name: str) -> None:
    path = tmp_path / "written.yaml"
    path.write_text(whole_params(name, ROOT), encoding="utf-8")
    values = dict(scalars(read_yaml(path)))
    copy = Path(shutil.copy(path, tmp_path / "params.yaml"))
    apply_overrides(copy, [f"{key}={another(value)}" for key, value in values.items()])
    expect_only_values_changed(changed_lines(path, copy), list(values))


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), scalars(read_yaml(ROOT / "params.yaml")))
def test_changing_one_value_changes_one_line(tmp_path: Path, key: str, value: Any) -> None:
    copy = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    apply_overrides(copy, [f"{key}={another(value)}"])
    expect_only_values_changed(changed_lines(ROOT / "params.yaml", copy), [key])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.max_grad_norm=none", "  max_grad_norm: none       # none: no clipping"),
        ("train.weight_decay=1e-5", "  weight_decay: 1e-05"),
        ("data.max_train=300", "  max_train: 300            # all | examples kept, the first ones"),
        ("latent.thought='hidden[-2]'", "  thought: hidden[-2]"),
        ("latent.thought=projection", "  thought: projection"),
        ("model=Qwen/Qwen2.5-0.5B", "model: Qwen/Qwen2.5-0.5B    # hub id | local Hugging Face folder"),
        ("revision='1234567'", "revision: '1234567'         # branch, tag or commit of a hub model"),
    ],
)
def test_values_of_every_kind_are_written_in_their_line(tmp_path: Path, override: str, line: str) -> None:
    copy = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    apply_overrides(copy, [override])
    ((_, new),) = changed_lines(ROOT / "params.yaml", copy)
    assert new.startswith(line)
    load_params(copy)


def test_an_entry_is_added_and_taken_out_again(tmp_path: Path) -> None:
    copy = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    fields = "{parent: latent_3, method: coconut, latent_stage: 3, epochs: 1, lr: 5e-5}"
    apply_overrides(copy, [f"+curriculum.longer={fields}"])
    assert load_params(copy).curriculum["longer"].lr == 5e-5
    apply_overrides(copy, ["~curriculum.longer"])
    assert load_params(copy) == load_params(ROOT / "params.yaml")


def test_a_value_that_dvc_leaves_blank_means_the_same_as_its_word(tmp_path: Path) -> None:
    copy = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    apply_overrides(copy, ["data.max_train=null", "runtime.num_workers=null"])
    assert "  max_train:                # all" in copy.read_text(encoding="utf-8")
    assert load_params(copy) == load_params(ROOT / "params.yaml")


def test_brackets_need_the_quotes_that_the_error_shows() -> None:
    with pytest.raises(Exception, match=r"mismatched input '\['"):
        to_hydra_overrides(["latent.thought=hidden[-2]"])
    tree = read_yaml(ROOT / "params.yaml")
    tree["latent"]["thought"] = "hidden"
    with pytest.raises(ValueError, match=r"found 'hidden', .*; on a command line") as error:
        parse_params(tree)
    shown = re.search(r'-S ".*?"', str(error.value))
    assert shown is not None
    (_, override) = shlex.split(shown[0])
    value = to_hydra_overrides([override])[0].value()
    assert value == "hidden[-2]"
    assert parse_thought(value).hidden == "-2"


PIPELINE = """\
stages:
  params:
    cmd: echo checked > checked
    deps: [params.yaml]
    outs: [checked]
"""


@pytest.mark.slow
def test_an_experiment_changes_one_line_of_the_file(tmp_path: Path) -> None:
    copy = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    (tmp_path / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, "dvc", "init", "-q")
    run(tmp_path, "git", "add", "-A")
    run(tmp_path, "git", "commit", "-qm", "state")
    run(tmp_path, "dvc", "exp", "run", "-q", "-S", "train.batch_size=32", "-S", "latent.thought='hidden[-2]'")
    lines = changed_lines(ROOT / "params.yaml", copy)
    expect_only_values_changed(lines, ["latent.thought", "train.batch_size"])
