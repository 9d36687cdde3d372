"""Every recipe gives a whole params file that DVC can make stages of, and says what it is; `coconut recipe`."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from dvc.repo import Repo
from typer.testing import CliRunner

from coconut.cli import app
from coconut.config.params import load_params, parse_params
from coconut.config.schema import Entry, Params
from coconut.config.strict import parse_yaml, read_yaml
from coconut.config.thought import parse_thought
from coconut.recipes import DEFAULT, find_recipes, read_about, whole_params
from project import commit, run

ROOT = Path(__file__).parents[1]
RECIPES = find_recipes(ROOT)
JOURNAL = {
    "journal-gpt2": "openai-community/gpt2",
    "journal-qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "journal-qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "journal-qwen2.5-coder-0.5b": "Qwen/Qwen2.5-Coder-0.5B",
    "journal-qwen2.5-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "journal-qwen2.5-0.5b-math-shepherd-prm": "plaguss/Qwen2.5-0.5B-Math-Shepherd-PRM-0.2",
    "journal-qwen2.5-math-1.5b-instruct-prm": "HuggingFaceH4/Qwen2.5-Math-1.5B-Instruct-PRM-0.2",
}

ABOUT = "about:\n  what: what it is\n  model: GPT-2\n  data: nothing\n  machine: a CPU\n  hours: 0.5\n  ran: no\n"

each_recipe = pytest.mark.parametrize("name", RECIPES)


def load(name: str) -> Params:
    return parse_params(parse_yaml(whole_params(name, ROOT), name))


def head(name: str) -> str:
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.fixture(scope="module")
def dvc_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repo")
    Repo.init(str(folder), no_scm=True).close()
    shutil.copy(ROOT / "dvc.yaml", folder)
    return folder


@each_recipe
def test_a_recipe_gives_params_that_load_with_known_thoughts(name: str) -> None:
    for entry in load(name).curriculum.values():
        parse_thought(entry.latent.thought)


@each_recipe
def test_what_a_recipe_gives_holds_its_values_and_else_the_shipped_ones(name: str) -> None:
    given, recipe = parse_yaml(whole_params(name, ROOT), name), read_yaml(RECIPES[name])
    expected = read_yaml(ROOT / "params.yaml")
    for section, value in recipe.items():
        merges = isinstance(value, dict) and section != "curriculum"
        expected[section] = expected.get(section, {}) | value if merges else value
    del expected["about"]
    assert given == expected
    assert list(given["curriculum"]) == list(expected["curriculum"])
    assert list(given["data"]["tests"]) == list(expected["data"]["tests"])


@each_recipe
def test_a_recipe_holds_nothing_that_is_as_shipped(name: str) -> None:
    shipped = read_yaml(ROOT / "params.yaml")
    assert name == DEFAULT or [
        (section, key)
        for section, value in read_yaml(RECIPES[name]).items()
        for key in (value if isinstance(value, dict) and section not in ("about", "curriculum") else [None])
        if (value[key] == shipped[section].get(key) if key else value == shipped.get(section))
    ] == []  # fmt: skip


def test_the_shipped_params_are_those_of_the_default() -> None:
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") == whole_params(DEFAULT, ROOT)


@pytest.mark.slow
@each_recipe
def test_dvc_makes_all_stages_of_every_entry(name: str, dvc_dir: Path) -> None:
    (dvc_dir / "params.yaml").write_text(whole_params(name, ROOT), encoding="utf-8")
    with Repo(str(dvc_dir)) as repo:
        names = {stage.addressing.rpartition(":")[2] for stage in repo.index.stages}
    wanted = {f"{kind}@{entry}" for kind in ("train", "evaluate", "probe") for entry in load(name).curriculum}
    assert wanted <= names
    assert {name for name in names if "@" in name} == wanted


@each_recipe
def test_a_recipe_says_in_its_head_what_it_is(name: str) -> None:
    text, about = head(name), read_about(RECIPES[name])
    assert len(text) > 80
    assert ("NOT RUN here" in text) == (about.ran == "no") == (about.hours == "unknown")
    assert (
        ("24 GB" in text)
        == (about.machine == "24 GB GPU")
        == (load(name).train.batch_size == 128 and bool(load(name).curriculum))
    )


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
    params, default = load("ci"), load(DEFAULT)
    assert (params.model, params.data.generator, params.latent) == (
        default.model,
        default.data.generator,
        default.latent,
    )
    assert set(params.curriculum) == {"cot", "latent_1", "latent_2", "latent_3", "no_cot"}
    for name, entry in params.curriculum.items():
        assert entry.epochs <= default.curriculum[name].epochs
    assert params.curriculum["latent_3"].min_accuracy == 0.9


# --- coconut recipe ---------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes and the shipped params.yaml, committed; the tests work in it."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "git", "init", "-q")
    commit(tmp_path)
    return tmp_path


def recipe(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["recipe", *arguments])


def write_recipe(folder: Path, text: str, *, about: str = ABOUT) -> None:
    (folder / "recipes/mine.yaml").write_text(f"# Mine.\n\n{about}\n{text}", encoding="utf-8")


def test_the_list_shows_every_recipe_with_what_it_says_of_itself(project: Path) -> None:
    write_recipe(project, "seed: 1\n")
    first, *lines = recipe().stdout.splitlines()
    assert first.split() == ["recipe", "model", "data", "machine", "hours", "ran", "what"]
    assert {line.split()[0] for line in lines} == {*RECIPES, "mine"}
    assert lines[0].startswith("default ")
    (line,) = [line for line in lines if line.startswith("mine ")]
    assert re.split("  +", line) == ["mine", "GPT-2", "nothing", "a CPU", "0.5", "no", "what it is"]


def test_a_recipe_is_written_and_the_shipped_one_brought_back(project: Path) -> None:
    shipped = (project / "params.yaml").read_text()
    for name in ("ci", "thought-forms"):
        assert recipe(name).stdout == f"params.yaml is now that of recipes/{name}.yaml\n"
        assert load_params("params.yaml") == load(name)
    assert recipe(DEFAULT).exit_code == 0
    assert (project / "params.yaml").read_text() == shipped
    (project / "params.yaml").unlink()
    assert recipe(DEFAULT).exit_code == 0
    assert (project / "params.yaml").read_text() == shipped


def test_comments_are_kept_and_those_of_the_recipe_win(project: Path) -> None:
    text = """\
seed: 5

data:
  train: {format: generated, rows: 7}

train:
  optimizer: adamw_8bit       # needs a package
  batch_size: 2

evaluate:
  tolerance: 0.5

curriculum:
  # The only one.
  cot: {parent: base, method: cot, latent_stage: 0, epochs: 1, lr: 1.0e-3}

  no_cot: {parent: base, method: no_cot, latent_stage: 0, epochs: 1, lr: 1.0e-3}
"""
    write_recipe(project, text)
    assert recipe("mine").exit_code == 0
    lines = (project / "params.yaml").read_text().splitlines()
    assert lines[:2] == [
        "# Mine.",
        "# `coconut recipe mine` writes this file. Every value of the pipeline stands here.",
    ]
    shipped = (ROOT / "params.yaml").read_text().splitlines()
    assert {line for line in shipped if line.startswith(("model:", "  precision:", "runtime:"))} <= set(lines)
    (seed,) = [line for line in shipped if line.startswith("seed: ")]
    assert seed.replace("seed: 0", "seed: 5") in lines
    assert "  optimizer: adamw_8bit       # needs a package" in lines
    assert "  batch_size: 2             # examples per update over all devices" in lines
    text = "\n".join(lines)
    assert "  train:\n    format: generated\n    rows: 7\n  valid:\n" in text
    assert "\n  tolerance: 0.5\n\nprobe:" in text
    assert "\n  # The only one.\n  cot:\n    parent: base\n" in text
    assert "\n    lr: 1.0e-3\n\n  no_cot:\n    parent: base\n" in text


@pytest.mark.parametrize("is_versioned", [True, False])
def test_changes_are_not_overwritten_without_a_yes(project: Path, *, is_versioned: bool) -> None:
    if not is_versioned:
        shutil.rmtree(project / ".git")
    assert recipe("ci").exit_code == 0
    path = project / "params.yaml"
    path.write_text(edited := path.read_text().replace("seed: 0", "seed: 1"))
    refused = recipe("arithmetic")
    assert refused.exit_code == 1
    assert refused.stderr.startswith(
        "coconut: params.yaml: found changes that are neither in git nor a recipe's; commit"
    )
    assert path.read_text() == edited
    assert recipe("arithmetic", "--force").exit_code == 0
    assert load_params(path) == load("arithmetic")


def test_what_is_committed_is_overwritten(project: Path) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    commit(project)
    assert recipe("ci").exit_code == 0
    assert load_params(path) == load("ci")


@pytest.mark.parametrize(("answer", "is_written"), [("y", True), ("n", False)])
def test_on_a_terminal_it_asks(project: Path, answer: str, *, is_written: bool) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text() + "# mine\n")
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    command = [sys.executable, "-m", "coconut", "recipe", "ci"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, env=environment, check=False)
    os.close(ours)
    os.close(theirs)
    assert "Overwrite it? [y/N]" in done.stdout + done.stderr
    assert done.returncode == (not is_written)
    assert path.read_text().endswith("# mine\n") != is_written


def test_the_recipe_of_the_documents_can_be_written(project: Path) -> None:
    (text,) = re.findall(r"```yaml\n(#.*?)```", (ROOT / "docs/recipes.md").read_text(encoding="utf-8"), re.S)
    (project / "recipes/mine.yaml").write_text(text)
    assert recipe("mine").exit_code == 0
    params = load_params("params.yaml")
    assert (params.data.max_train, params.train.warmup_updates) == (10_000, 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  batchsize: 3\n", "train.batchsize: unknown key; known here: .*; did you mean batch_size?"),
        ("trian:\n  batch_size: 3\n", "trian: unknown key; known here: .*; did you mean train?"),
        ("data:\n  train: {rows: 3}\n", "data.train.format: missing"),
        ("data:\n", "data: found null, wanted a mapping"),
        ("model: {a: 1}\n", "model: found .*a mapping.*, wanted text"),
        ("train: 3\n", "train: found a number, wanted a mapping"),
        ("seed: 1\nseed: 2\n", "line .*: key 'seed' stands already on line"),
        ("about: x\n", "line .*: key 'about' stands already"),
    ],
)
def test_a_mistake_names_the_recipes_file(project: Path, text: str, message: str) -> None:
    write_recipe(project, text)
    found = recipe("mine")
    assert found.exit_code == 1
    assert re.match(f"coconut: recipes/mine.yaml: {message}", found.stderr), found.stderr
    assert (project / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("", "about: missing"),
        ("about: 3", "about: found a number, wanted a mapping"),
        (ABOUT.replace("0.5", "long"), "about.hours: found 'long', wanted .*"),
        (ABOUT.replace("  ran: no\n", ""), "about.ran: missing"),
    ],
)
def test_a_recipe_must_say_what_it_is(project: Path, about: str, message: str) -> None:
    write_recipe(project, "seed: 1\n", about=about)
    for arguments in ((), ("mine",)):
        assert re.match(f"coconut: recipes/mine.yaml: {message}", recipe(*arguments).stderr)


def test_an_unknown_recipe_is_named_with_one_that_was_meant(project: Path) -> None:
    del project
    found = recipe("thoughtforms")
    assert (found.exit_code, found.stdout) == (1, "")
    assert re.match("coconut: recipe 'thoughtforms': unknown; .*; did you mean thought-forms?", found.stderr)


def test_outside_of_the_repository_it_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ((), ("ci",)):
        assert recipe(*arguments).stderr.startswith("coconut: recipes/default.yaml: no such file; run from the")
