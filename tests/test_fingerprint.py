import contextlib
import os
import shutil
from pathlib import Path

import pytest
import yaml

from coconut.files import digest_path
from coconut.pipeline.dvc_file import Stage, canonical, read_pipeline
from coconut.pipeline.inputs import StageInputs, fingerprint

DVC_YAML = """
stages:
  preprocess:
    cmd: exec python stages/preprocess.py
    deps: [outputs/code/preprocess.txt, "${data.raw_dir}"]
    params: [data]
    outs: [data/examples]
    metrics:
    - outputs/preprocess.json: {cache: false}
  train:
    foreach: ${curriculum}
    do:
      desc: "curriculum entry ${key}, from ${item.parent}"
      cmd: exec python stages/train.py ${key}
      deps: [outputs/code/train.txt, data/encoded, "outputs/${item.parent}/checkpoint"]
      params: [seed, latent, train, "curriculum.${key}"]
      outs: ["outputs/${key}/checkpoint"]
"""
PARAMS_YAML = """
seed: 0
data: {raw_dir: data/raw}
latent: {c_thought: 1}
train: {batch_size: 64, beta2: 0.98}
evaluate: {max_new_tokens: 16}
curriculum:
  cot: {parent: base, epochs: 2, lr: 0.0001}
  latent_1: {parent: cot, epochs: 3, lr: 0.0001, min_accuracy: 0.9}
runtime: {save_every_s: 60}
"""


TRAIN = """
import sys
sys.path.insert(0, "src")
from coconut.loop import run

run(sys.argv[1])
"""
FRONT_DOOR = """
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coconut.report import report
"""
LOOP = """
'''The loop.'''

import typing


def run(name: str) -> None:
    \"\"\"Train.\"\"\"
    from coconut.model import latent  # Late: it is slow.

    print(name, latent)


class Loop:
    num_updates: int = 3
    \"\"\"Of all epochs.\"\"\"


if typing.TYPE_CHECKING:
    from coconut.hints import hint
"""


@pytest.fixture
def root(tmp_path) -> Path:
    texts = {
        "dvc.yaml": DVC_YAML,
        "params.yaml": PARAMS_YAML,
        "stages/train.py": TRAIN,
        "stages/preprocess.py": "preprocess",
        "src/coconut/__init__.py": FRONT_DOOR,
        "src/coconut/loop.py": LOOP,
        "src/coconut/model/__init__.py": "",
        "src/coconut/model/latent.py": "from . import gates",
        "src/coconut/model/gates.py": "gate = 1",
        "src/coconut/model/table.txt": "1 2 3",
        "src/coconut/report.py": "report = 1",
        "src/coconut/hints.py": "hint = 1",
        "src/coconut/__pycache__/loop.cpython-311.pyc": "cache",
        "data/raw/train.txt": "raw",
        "data/encoded/train.arrow": "encoded",
        "outputs/base/checkpoint/model.safetensors": "base",
        "outputs/cot/checkpoint/model.safetensors": "cot",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_stages_are_unrolled_with_their_templates_filled_in(root):
    stages = read_pipeline(root)
    assert list(stages) == ["preprocess", "train@cot", "train@latent_1"]
    assert stages["preprocess"].deps == ("outputs/code/preprocess.txt", "data/raw")
    assert stages["preprocess"].outs == ("data/examples", "outputs/preprocess.json")
    assert stages["train@latent_1"] == Stage(
        name="train@latent_1",
        cmd="exec python stages/train.py latent_1",
        deps=("outputs/code/train.txt", "data/encoded", "outputs/cot/checkpoint"),
        params=("seed", "latent", "train", "curriculum.latent_1"),
        outs=("outputs/latent_1/checkpoint",),
    )


def assert_read_as_dvc_reads_it(root: Path) -> None:
    repo_module = pytest.importorskip("dvc.repo")
    (root / ".dvc").mkdir(exist_ok=True)
    (root / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    # DVC names stages relative to the working directory.
    with contextlib.chdir(root), repo_module.Repo() as repo:
        theirs = {
            stage.addressing: Stage(
                stage.addressing,
                stage.cmd,
                tuple(dep.def_path for dep in stage.deps if not hasattr(dep, "params")),
                tuple(param for dep in stage.deps if hasattr(dep, "params") for param in dep.params),
                tuple(out.def_path for out in stage.outs),
            )
            for stage in repo.index.stages
        }
    ours = read_pipeline(root)
    assert list(ours) == list(theirs)
    for name, stage in ours.items():
        assert stage.cmd == theirs[name].cmd
        assert sorted(stage.deps) == sorted(theirs[name].deps)
        assert sorted(stage.params) == sorted(theirs[name].params)
        assert sorted(stage.outs) == sorted(theirs[name].outs)


def test_our_reading_of_dvc_yaml_equals_dvcs(root):
    assert_read_as_dvc_reads_it(root)


def test_our_reading_of_the_real_dvc_yaml_equals_dvcs(tmp_path):
    repository = Path(__file__).parents[1]
    if not (repository / "dvc.yaml").exists():
        pytest.skip("dvc.yaml is not there yet")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(repository / name, tmp_path / name)
    assert_read_as_dvc_reads_it(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("params.yaml", "seed: 0", "seed: 1"),
        ("params.yaml", "c_thought: 1", "c_thought: 2"),
        ("params.yaml", "epochs: 3", "epochs: 4"),
        ("params.yaml", "parent: cot", "parent: base"),
        ("stages/train.py", "run(sys.argv[1])", "run(sys.argv[2])"),
        ("src/coconut/loop.py", "= 3", "= 4"),
        ("src/coconut/loop.py", "print(name, latent)", "print(latent, name)"),
        ("src/coconut/loop.py", "'''The loop.'''", "x = '''The loop.'''"),  # No docstring any more.
        ("src/coconut/loop.py", "from coconut.model import latent", "from coconut.report import report as latent"),
        ("src/coconut/model/gates.py", "1", "2"),
        ("src/coconut/model/gates.py", "gate = 1", "gate = ("),  # No Python any more.
        ("src/coconut/model/table.txt", "1", "2"),
        ("data/encoded/train.arrow", "encoded", "encodeD"),
        ("outputs/cot/checkpoint/model.safetensors", "cot", "COT"),
        ("dvc.yaml", "stages/train.py ${key}", "stages/train.py --x ${key}"),
    ],
)
def test_whatever_can_change_the_result_changes_the_fingerprint(root, name, old, new):
    before = fingerprint("train@latent_1", root)
    replace(root / name, old, new)
    assert fingerprint("train@latent_1", root) != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("params.yaml", "min_accuracy: 0.9", "min_accuracy: 0.8"),
        ("params.yaml", ", min_accuracy: 0.9", ""),
        ("params.yaml", "epochs: 2", "epochs: 5"),  # Of the parent: what counts is the checkpoint it left.
        ("params.yaml", "max_new_tokens: 16", "max_new_tokens: 17"),
        ("params.yaml", "save_every_s: 60", "save_every_s: 6"),
        ("params.yaml", "seed: 0", "seed: 0  # a comment"),
        ("params.yaml", "lr: 0.0001", "lr: 1.0e-4"),
        ("params.yaml", "lr: 0.0001", "lr: 1e-4"),  # `dvc exp run -S` writes it so.
        ("params.yaml", "seed: 0", "seed: 000"),
        ("src/coconut/loop.py", "  # Late: it is slow.", ""),
        ("src/coconut/loop.py", "print(name, latent)", "print(name,\n          latent,)  # Both."),
        ("src/coconut/loop.py", '"""Train."""', '"""Train an entry."""'),
        ("src/coconut/loop.py", "'''The loop.'''", ""),
        ("src/coconut/loop.py", '    """Of all epochs."""', ""),
        ("src/coconut/report.py", "1", "2"),  # What the front door offers, the stage does not load.
        ("src/coconut/hints.py", "1", "2"),
        ("params.yaml", "batch_size: 64, beta2: 0.98", "beta2: 9.8e-01, batch_size: 64.0"),
        ("stages/preprocess.py", "preprocess", "other"),
        ("src/coconut/__pycache__/loop.cpython-311.pyc", "cache", "other"),
        ("dvc.yaml", 'desc: "curriculum', 'desc: "entry'),
    ],
)
def test_whatever_cannot_change_the_result_leaves_the_fingerprint(root, name, old, new):
    before = fingerprint("train@latent_1", root)
    replace(root / name, old, new)
    assert fingerprint("train@latent_1", root) == before


def test_a_file_added_moved_or_removed_in_a_folder_changes_its_digest(root):
    seen = {digest_path(root / "src")}
    (root / "src/new.py").write_text("")
    seen.add(digest_path(root / "src"))
    (root / "src/new.py").rename(root / "src/newer.py")
    seen.add(digest_path(root / "src"))
    (root / "src/newer.py").unlink()
    assert len(seen) == 3
    assert digest_path(root / "src") in seen


def test_names_and_contents_of_files_cannot_be_mistaken_for_each_other(tmp_path):
    for folder, name, text in [("a", "bc", "d"), ("b", "b", "cd")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    assert digest_path(tmp_path / "a") != digest_path(tmp_path / "b")


def test_a_checkpoint_linked_from_dvcs_cache_has_the_digest_of_a_copy(root):
    before = fingerprint("train@cot", root)
    weights = root / "outputs/base/checkpoint/model.safetensors"
    weights.rename(root / "cached")
    weights.symlink_to(root / "cached")
    assert fingerprint("train@cot", root) == before


def test_two_stages_with_the_same_inputs_have_different_fingerprints(root):
    replace(root / "params.yaml", "latent_1: {parent: cot, epochs: 3", "latent_1: {parent: base, epochs: 2")
    assert fingerprint("train@cot", root) != fingerprint("train@latent_1", root)


@pytest.mark.parametrize(
    ("left", "right"), [(1e-4, 0.0001), (1, 1.0), ({"b": 1, "a": [2.0]}, {"a": [2], "b": 1})], ids=str
)
def test_equal_values_have_one_canonical_text(left, right):
    assert canonical(left) == canonical(right)


@pytest.mark.parametrize(
    ("left", "right"), [("1", 1), (True, 1), (None, "null"), (0.1, 0.1000001), ([1, 2], [2, 1])], ids=str
)
def test_different_values_have_different_canonical_texts(left, right):
    assert canonical(left) != canonical(right)


def test_the_fingerprint_does_not_change_between_releases(root):
    """A change of the scheme throws away every resume state: do it knowingly."""
    text = yaml.safe_load(PARAMS_YAML)
    assert canonical(text["curriculum"]["cot"]) == '{"epochs": 2, "lr": 0.0001, "parent": "base"}'
    assert fingerprint("train@cot", root).startswith("1216da1b7fd2e292")


def test_an_edit_while_the_stage_runs_is_refused_by_name(root):
    inputs = StageInputs.read("train@latent_1", root)
    inputs.refuse_if_changed()
    replace(root / "params.yaml", "seed: 0", "seed: 1")
    replace(root / "src/coconut/loop.py", "= 3", "= 4")
    with pytest.raises(
        ValueError,
        match=r"train@latent_1: changed while it ran: params\.yaml: seed, src/coconut/loop\.py\. Its outputs",
    ):
        inputs.refuse_if_changed()


def test_a_gate_that_is_raised_while_the_stage_runs_is_refused_but_changes_no_fingerprint(root):
    inputs = StageInputs.read("train@latent_1", root)
    replace(root / "params.yaml", "min_accuracy: 0.9", "min_accuracy: 0.95")
    with pytest.raises(ValueError, match=r"changed while it ran: params\.yaml: curriculum\.latent_1\.min_accuracy\."):
        inputs.refuse_if_changed()
    assert StageInputs.read("train@latent_1", root).fingerprint == inputs.fingerprint


def test_a_stage_is_found_by_the_command_that_runs_it(root):
    assert StageInputs.of_command(["python", "stages/train.py", "cot"], root) == StageInputs.read("train@cot", root)
    with pytest.raises(ValueError, match=r"dvc\.yaml: no stage whose cmd is 'python stages/train\.py cat'"):
        StageInputs.of_command(["python", "stages/train.py", "cat"], root)


def test_an_edit_that_is_undone_again_is_not_refused(root):
    inputs = StageInputs.read("train@latent_1", root)
    replace(root / "params.yaml", "seed: 0", "seed: 1")
    replace(root / "params.yaml", "seed: 1", "seed: 0")
    os.utime(root / "params.yaml")
    inputs.refuse_if_changed()


def test_a_comment_edited_while_the_stage_runs_is_not_refused(root):
    inputs = StageInputs.read("train@latent_1", root)
    replace(root / "src/coconut/loop.py", "# Late: it is slow.", "# Late, for it is slow.")
    replace(root / "src/coconut/report.py", "1", "2")
    inputs.refuse_if_changed()


@pytest.mark.parametrize(
    ("name", "content"),
    [("src/coconut/model/new.py", "x = 1"), ("src/coconut/model/latent.py", None)],
    ids=["added, loaded by nobody", "deleted"],
)
def test_a_module_counts_from_when_it_is_loaded(root, name, content):
    before = fingerprint("train@latent_1", root)
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content)
    assert (fingerprint("train@latent_1", root) == before) == (content is not None)


def test_a_new_module_that_hides_another_one_counts(root):
    """`import math` in the stage's script would load it."""
    replace(root / "stages/train.py", "import sys", "import sys, math")
    before = fingerprint("train@latent_1", root)
    (root / "stages/math.py").write_text("pi = 3")
    assert "stages/math.py" in StageInputs.read("train@latent_1", root).sources
    assert fingerprint("train@latent_1", root) != before


@pytest.mark.parametrize(
    "break_it",
    [
        lambda root: shutil.rmtree(root / "data/encoded"),
        lambda root: (root / "params.yaml").write_text("seed: ["),
        lambda root: (root / "params.yaml").write_text("[" * 100_000),
        lambda root: (root / "dvc.yaml").write_text("stages: 3"),
        lambda root: replace(root / "params.yaml", "latent_1:", "latent_one:"),
    ],
    ids=["data gone", "params torn", "params nested", "no stages", "entry renamed"],
)
def test_inputs_that_cannot_be_read_any_more_are_refused(root, break_it):
    inputs = StageInputs.read("train@latent_1", root)
    break_it(root)
    with pytest.raises(ValueError, match="changed while it ran: its inputs cannot be read any more"):
        inputs.refuse_if_changed()


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("params.yaml", "seed: 0\n", "", r"params\.yaml: seed: missing; dvc\.yaml asks for it"),
        ("dvc.yaml", "seed, latent", "{params.yaml: [seed]}, latent", "wanted text"),
        ("dvc.yaml", "      desc:", "      wdir: x\n      desc:", "train@cot.wdir: not understood"),
        ("dvc.yaml", "foreach: ${curriculum}", "foreach: [a, b]", "foreach: found .*, wanted a mapping"),
        (
            "dvc.yaml",
            "    foreach: ${curriculum}",
            "    matrix: ${curriculum}",
            "train.matrix: not understood|train.do",
        ),
        ("dvc.yaml", "stages:", "stages: [", "not valid YAML"),
    ],
)
def test_what_the_fingerprint_does_not_understand_is_an_error(root, name, old, new, message):
    replace(root / name, old, new)
    with pytest.raises(ValueError, match=message):
        fingerprint("train@cot", root)


def test_a_missing_dependency_and_an_unknown_stage_are_named(root):
    with pytest.raises(ValueError, match=r"no stage 'train@x'; its stages are preprocess, train@cot"):
        fingerprint("train@x", root)
    shutil.rmtree(root / "outputs/cot")
    with pytest.raises(FileNotFoundError, match=r"outputs/cot/checkpoint: a dependency in dvc\.yaml, but no such file"):
        fingerprint("train@latent_1", root)
