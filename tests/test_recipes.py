"""Every recipe is a whole params file that DVC can make stages of, and says what it is."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo

from coconut.config.params import load_params
from coconut.config.schema import Entry, Params
from coconut.config.strict import read_yaml
from coconut.config.thought import parse_thought

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
JOURNAL = {
    "journal-gpt2": "openai-community/gpt2",
    "journal-qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "journal-qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "journal-qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B",
    "journal-qwen2.5-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "journal-qwen2.5-0.5b-math-shepherd-prm": "plaguss/Qwen2.5-0.5B-Math-Shepherd-PRM-0.2",
    "journal-qwen2.5-math-1.5b-instruct-prm": "HuggingFaceH4/Qwen2.5-Math-1.5B-Instruct-PRM-0.2",
}

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def load(name: str) -> Params:
    return load_params(ROOT / "recipes" / f"{name}.yaml")


def head(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.fixture(scope="module")
def dvc_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repo")
    Repo.init(str(folder), no_scm=True).close()
    shutil.copy(ROOT / "dvc.yaml", folder)
    return folder


@each_recipe
def test_a_recipe_loads(path: Path) -> None:
    params = load_params(path)
    for entry in params.curriculum.values():
        parse_thought(entry.latent.thought)


@pytest.mark.slow
@each_recipe
def test_dvc_makes_all_stages_of_every_entry(path: Path, dvc_dir: Path) -> None:
    shutil.copy(path, dvc_dir / "params.yaml")
    with Repo(str(dvc_dir)) as repo:
        names = {stage.addressing.rpartition(":")[2] for stage in repo.index.stages}
    wanted = {f"{kind}@{name}" for kind in ("train", "evaluate", "probe") for name in load_params(path).curriculum}
    assert wanted <= names
    assert {name for name in names if "@" in name} == wanted


@each_recipe
def test_a_recipe_says_in_its_head_what_it_is(path: Path) -> None:
    text = head(path)
    assert len(text) > 80
    params = load_params(path)
    needs_gpu = params.train.batch_size == 128 and bool(params.curriculum)
    assert ("NOT RUN here" in text) == (needs_gpu or not params.curriculum)
    assert ("24 GB" in text) == needs_gpu


@each_recipe
def test_a_recipe_holds_every_key_that_the_shipped_file_holds(path: Path) -> None:
    """So that any value can be changed with `dvc exp run -S`, which refuses keys that are not there."""

    def keys(tree: Any, prefix: str = "") -> set[str]:
        skipped = ("curriculum", "generator", "train", "valid", "tests")
        return {
            f"{prefix}{key}{below}"
            for key, value in tree.items()
            for below in (
                keys(value, ".") if isinstance(value, dict) and (key not in skipped or prefix == "") else {""}
            )
            if key not in ("curriculum", "expected")
        }

    shipped = read_yaml(ROOT / "params.yaml")
    assert keys(read_yaml(path)) == keys(shipped)


@pytest.mark.parametrize("name", JOURNAL)
def test_each_of_the_journals_models_has_its_recipe(name: str) -> None:
    params = load(name)
    assert params.model == JOURNAL[name]
    assert params.train.batch_size == 128
    assert params.train.optimizer == ("adamw_8bit" if "1.5b" in name else "adamw")
    assert params.encode.prompt == ("chat" if name.endswith("0.5b-instruct") else "plain")


# --- the paper's table ------------------------------------------------------------------------


def lineage(params: Params, name: str) -> list[Entry]:
    entries = [params.curriculum[name]]
    while entries[-1].parent != "base":
        entries.append(params.curriculum[entries[-1].parent])
    return entries


TABLE_1 = {
    "cot_full": "cot",
    "no_cot": "no_cot",
    "icot": "icot",
    "pause": "pause",
    "latent_4": "coconut",
    "no_curriculum": "coconut",
    "no_thoughts_4": "no_thoughts",
    "paused_4": "pause_as_thought",
}


@pytest.mark.parametrize("name", TABLE_1)
def test_every_arm_of_the_table_does_as_many_updates_after_the_same_warm_up(name: str) -> None:
    params = load("paper-table-1")
    entries = lineage(params, name)
    assert entries[0].method == TABLE_1[name]
    assert entries[-1].name == "cot"
    assert sum(entry.epochs for entry in entries[:-1]) == 10
    assert entries[0].train.schedule == "linear"
    assert {entry.max_updates for entry in entries} == {None}


def test_the_table_has_no_entry_that_belongs_to_no_arm() -> None:
    params = load("paper-table-1")
    assert {entry.name for name in TABLE_1 for entry in lineage(params, name)} == set(params.curriculum)


def test_icot_has_removed_every_token_well_before_the_end() -> None:
    params = load("paper-table-1")
    entry = params.curriculum["icot"]
    num_tokens = 4  # One a step: the tokenizer reads words.
    assert (entry.keys.icot_tokens_per_epoch) * entry.epochs >= num_tokens
    assert num_tokens / (entry.keys.icot_tokens_per_epoch) <= 7
    assert (entry.keys.icot_smoothing, entry.train.reset_optimizer) == (4.0, True)


def test_the_table_shares_model_data_and_warm_up_with_its_task() -> None:
    """So that DVC takes what that has trained from its cache. After a change there: copy its lines here."""
    table, default = load("paper-table-1"), load("arithmetic")
    assert (table.model, table.data, table.encode) == (default.model, default.data, default.encode)
    for name in ("cot", "latent_1", "latent_2", "latent_3", "latent_4"):
        assert table.curriculum[name] == default.curriculum[name]


def test_the_papers_gpt2_recipes_are_the_papers() -> None:
    gsm, prosqa = load("gsm8k-aug-gpt2"), load("prosqa-gpt2")
    for params in (gsm, prosqa):
        assert (params.train.batch_size, params.train.precision, params.train.weight_decay) == (128, "fp32", 0.01)
        assert {entry.lr for entry in params.curriculum.values()} == {1e-4}
        assert all(entry.train.reset_optimizer for entry in params.curriculum.values())
    assert sum(entry.epochs for entry in lineage(gsm, "final")) == 25
    assert sum(entry.epochs for entry in lineage(prosqa, "final")) == 50
    assert (gsm.latent.c_thought, gsm.latent.max_latent_stage) == (2, 3)
    assert (prosqa.latent.c_thought, prosqa.latent.max_latent_stage) == (1, 6)
    assert gsm.curriculum["icot"].keys.icot_tokens_per_epoch == 8
    assert gsm.curriculum["icot"].keys.icot_remove_all_at == 39


def test_the_recipe_for_continuous_integration_is_the_default_with_less_training() -> None:
    params, default = load("ci"), load_params(ROOT / "params.yaml")
    assert (params.model, params.data.generator, params.latent) == (
        default.model,
        default.data.generator,
        default.latent,
    )
    assert set(params.curriculum) == {"cot", "latent_1", "latent_2", "latent_3", "no_cot"}
    for name, entry in params.curriculum.items():
        assert entry.epochs <= default.curriculum[name].epochs
    assert params.curriculum["latent_3"].min_accuracy == 0.9
