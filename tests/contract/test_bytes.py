"""Every byte of a curriculum's results, against those of the commit before on the same machine.

No digest is stored: processors round differently. `COCONUT_CONTRACT_BASE` names another commit to compare with, and
`COCONUT_CONTRACT=all` compares the recipe `ci` too, which takes some six minutes on two cores.

After a change that is *meant* to change results, `COCONUT_CONTRACT_BASE=HEAD` compares with the change itself; LOG.md
says what changed, and by how much.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from contract.projects import (
    change_params,
    expect_same,
    make_project,
    read_params,
    reference_commit,
    results,
    run,
    run_stages,
    train_entry,
    unpack,
)

STAGES = ("code", "params", "preprocess", "base", "encode", "train", "evaluate")

EVERY_METHOD = {
    "cot": train_entry("cot", epochs=2),
    "latent_1": train_entry("coconut", "cot", 1),
    "latent_2": train_entry("coconut", "latent_1", 2, schedule="linear"),
    "beyond": train_entry("coconut", "latent_2", 3, select="best", epochs=2),
    "no_cot": train_entry("no_cot", schedule="cosine"),
    "no_thoughts_2": train_entry("no_thoughts", "cot", 2, reset_optimizer=True),
    "pause": train_entry("pause", "cot"),
    "pause_2": train_entry("pause_as_thought", "cot", 2),
    "icot": train_entry("icot", "cot", epochs=2, icot_tokens_per_epoch=4, icot_smoothing=4, icot_remove_all_at=7),
    "jacobi": train_entry("coconut", "latent_1", 2, parallel_iterations=2),
    "projector": train_entry("coconut", "cot", 2, thought="projector", uniform_prob=0.0),
    "projector_on": train_entry("coconut", "projector", 2, thought="projector", max_updates=4),
    "marked": train_entry("coconut", "cot", 2, markers=True, c_thought=2, uniform_prob=0.5),
    "unpadded": train_entry("coconut", "cot", 3, pad_latent_to_max=False, max_grad_norm="none"),
    "codi": train_entry("codi", "cot", num_thoughts=3),
    "sim_cot": train_entry("sim_cot", "latent_1", 2),
    "sim_codi": train_entry("sim_codi", "cot", num_thoughts=3),
}
"""A method that is new since the reference has no entry to compare; one that the reference has must stand here."""
THOUGHTS_ONLY = {
    "cot": train_entry("cot"),
    "latent_1": train_entry("coconut", "cot", 1),
    "latent_2": train_entry("coconut", "latent_1", 2),
    "pause_2": train_entry("pause_as_thought", "cot", 2),
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
CURRICULA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every method": (GPT2 | {"n_layer": 3, "activation_function": "relu"}, EVERY_METHOD),
    "dropout": (GPT2 | {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}, THOUGHTS_ONLY),
    "wide": (GPT2 | {"n_embd": 256}, THOUGHTS_ONLY),  # Wide enough for every part of the fast path.
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree of the reference commit."""
    commit = reference_commit()
    return unpack(commit, tmp_path_factory.mktemp("reference") / commit)


@pytest.fixture(scope="module")
def known_methods(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The methods that the reference commit has, as its own refusal of another one lists them."""
    project = make_project(
        tmp_path_factory.mktemp("methods") / "p", {"curriculum": {"one": train_entry("nothing")}}, sources=reference
    )
    run(project, "python", "stages/digest_code.py")
    refusal = run(project, "python", "stages/params.py", is_checked=False).stderr
    listed = re.search(r"curriculum\.one\.method: found 'nothing', wanted one of ([\w, ]+)", refusal)
    assert listed, refusal
    return {name for name in listed[1].split(", ") if " " not in name}  # Prose may follow the names.


@pytest.mark.slow
def test_every_method_of_the_reference_is_compared(known_methods: set[str]) -> None:
    assert known_methods <= {entry["method"] for entry in EVERY_METHOD.values()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "wide" else pytest.mark.long) for name in CURRICULA]
)
def test_a_small_curriculum_leaves_the_bytes_of_the_commit_before(
    reference: Path, known_methods: set[str], tmp_path: Path, name: str
) -> None:
    model, entries = CURRICULA[name]
    entries = {entry: fields for entry, fields in entries.items() if fields["method"] in known_methods}
    changes = {"model": "models/of-the-test", "curriculum": entries}
    ours, theirs = (
        make_project(tmp_path / side, changes, sources=sources)
        for side, sources in (("ours", Path(__file__).parents[2]), ("theirs", reference))
    )
    for project in (ours, theirs):
        (project / "models/of-the-test").mkdir()
        (project / "models/of-the-test/config.json").write_text(json.dumps(model))
    run_stages([ours, theirs], *STAGES)
    expected = results(theirs, ["base", *entries])
    assert len([file for file in expected if file.endswith("/checkpoint/model.safetensors")]) == 1 + len(entries)
    for file in ("checkpoint/coconut.json", "optimizer.safetensors", "updates.csv", "predictions.jsonl"):
        assert {f"outputs/{entry}/{file}" for entry in entries} <= expected.keys()
    expect_same(results(ours, ["base", *entries]), expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.environ.get("COCONUT_CONTRACT") != "all", reason="six minutes; COCONUT_CONTRACT=all runs it")
def test_the_recipe_of_ci_leaves_the_bytes_of_the_commit_before(reference: Path, tmp_path: Path) -> None:
    found, recipe = [], make_project(tmp_path / "recipe", {}, is_versioned=True)
    run(recipe, "python", "-m", "coconut", "recipe", "ci", "--force")
    for side, sources in (("theirs", reference), ("ours", Path(__file__).parents[2])):
        project = make_project(tmp_path / side, {}, sources=sources, is_versioned=True)
        shutil.copy(recipe / "params.yaml", project)
        change_params(project, {"runtime.device": "cpu", "runtime.threads": 1})
        run(project, "python", "-m", "coconut", "repro", timeout_s=1700)
        entries = ["base", *read_params(project)["curriculum"]]
        assert len(entries) >= 6
        found.append(results(project, entries))
    expected, ours = found
    expect_same(ours, expected)
