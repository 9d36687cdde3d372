"""Checkpoints as others released them: read, fed back and answered as their own rule says, on random weights."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from coconut import Reasoner
from coconut.checkpoints.origin import find_folder
from coconut.checkpoints.released import find_meta, find_released
from coconut.data.examples import MARKERS
from coconut.evaluation.answers import extract_last_number
from inprocess import make_folder, stage, succeed
from project import write_params

pytestmark = pytest.mark.slow

CODI = "ModalityDance/latent-tts-codi"
COCONUT = "ModalityDance/latent-tts-coconut"
WIDTH = 32
QUESTIONS = [f"what is {a} + {b} ?" for a in range(4) for b in range(3)]


def line_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Words and line ends: a prompt with a line end differs from one without."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", "\n", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    splits = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    core.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


def written(folder: Path, *, with_projector: bool, seed: int = 3) -> Path:
    """A folder in the released form: GPT-2, markers in the vocabulary, `projector.*` among the weights."""
    tokenizer = line_tokenizer([*QUESTIONS, "The answer is: 0 1 2 3 4 5 6 7 8 9", "### #### ,"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=WIDTH, n_layer=2, n_head=2, initializer_range=0.4
    )
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"architectures": ["CODIGPT2" if with_projector else "COCONUTGPT2"], "projector": with_projector}
    (folder / "config.json").write_text(json.dumps(fields))
    if with_projector:
        path = folder / "model.safetensors"
        weights = load_file(path) | {
            f"projector.{place}.{kind}": torch.randn(*((WIDTH, WIDTH) if kind == "weight" and place != 4 else (WIDTH,)))
            for place in (1, 3, 4)
            for kind in ("weight", "bias")
        }
        save_file(weights, path, metadata={"format": "pt"})
    return folder


def with_meta(folder: Path, model: str) -> Path:
    """The same folder with a `coconut.json`, as one writes it for a local copy."""
    meta = find_released(model)
    assert meta is not None
    (folder / "coconut.json").write_text(json.dumps(meta.to_json()))
    return folder


def slow_reading(folder: Path, question: str, *, num_new: int) -> str:
    """The published rule, one row, everything read again for every column."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    is_codi = "projector.1.weight" in weights
    start, end, _ = tokenizer.convert_tokens_to_ids(list(MARKERS))
    text = question if is_codi else f"{question}\n"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], start]
    embed = model.get_input_embeddings()

    def project(hidden: Tensor) -> Tensor:
        if not is_codi:
            return hidden
        inner = functional.gelu(hidden @ weights["projector.1.weight"].T + weights["projector.1.bias"])
        outer = inner @ weights["projector.3.weight"].T + weights["projector.3.bias"]
        return functional.layer_norm(outer, (WIDTH,), weights["projector.4.weight"], weights["projector.4.bias"])

    with torch.no_grad():
        columns = embed(torch.tensor(ids))
        for _ in range(6):
            hidden = model.transformer(inputs_embeds=columns[None]).last_hidden_state[0, -1]
            columns = torch.cat([columns, project(hidden)[None]])
        columns = torch.cat([columns, embed(torch.tensor([end]))])
        said: list[int] = []
        while len(said) < num_new:
            chosen = int(model(inputs_embeds=columns[None]).logits[0, -1].argmax())
            if chosen == tokenizer.eos_token_id:
                break
            said.append(chosen)
            columns = torch.cat([columns, embed(torch.tensor([chosen]))])
    return str(tokenizer.decode(said, skip_special_tokens=True))


@pytest.fixture(scope="module", params=[COCONUT, CODI])
def released(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("released") / "model"
    return request.param, with_meta(written(folder, with_projector=request.param == CODI), request.param)


def test_answers_are_those_of_a_slow_reading_of_the_published_rule(released: tuple[str, Path]) -> None:
    model, folder = released
    wanted = [slow_reading(folder, question, num_new=7) for question in QUESTIONS]
    assert len(set(wanted)) > 3, "random weights answer differently"
    solutions = Reasoner.from_pretrained(folder).solve(QUESTIONS, max_new_tokens=7, batch_size=5)
    assert [one.text for one in solutions] == wanted
    assert {one.num_thoughts for one in solutions} == {6}
    if model == CODI:
        assert [one.answer for one in solutions] == [extract_last_number(text) for text in wanted]


def test_the_pipeline_scores_it_as_it_is_and_a_curriculum_may_be_empty(
    released: tuple[str, Path], tmp_path: Path
) -> None:
    model, folder = released
    rows = [{"question": question, "steps": ["1"], "answer": str(n % 10)} for n, question in enumerate(QUESTIONS)]
    source = {"format": "canonical", "file": "rows.json"}
    is_codi = model == CODI
    changes = {
        "model": str(folder),
        "data.train": source | {"rows": 2},
        "data.valid": source | {"start": 2, "rows": 2},
        "data.tests": {"first": source | {"start": 4, "rows": 4}, "second": source | {"start": 8}},
        "evaluate.max_new_tokens": 7,
        "evaluate.expected": {"first": 0.5, "second": 0.25},
        "encode.prompt": "bare" if is_codi else "plain",
        "curriculum": {},
    }
    project = make_folder(tmp_path / "project", changes)
    (project / "data/raw/rows.json").write_text(json.dumps(rows))
    succeed(project, *("digest_code", "params", "preprocess", "base", "encode"), "evaluate@base", "probe@base")
    predictions = [
        json.loads(line)
        for file in ("predictions.jsonl", "predictions/second.jsonl")
        for line in (project / "outputs/base" / file).read_text().splitlines()
    ]
    assert [row["text"] for row in predictions] == [slow_reading(folder, q, num_new=7) for q in QUESTIONS[4:]]
    metrics = json.loads((project / "outputs/base/metrics.json").read_text())
    assert (metrics["thoughts"], metrics["expected"], metrics["second.expected"]) == (6, 0.5, 0.25)
    thoughts = json.loads((project / "outputs/base/thoughts.json").read_text())
    assert thoughts["num_thoughts"] == 6
    succeed(project, "report")
    page = (project / "outputs/report/report.html").read_text()
    assert "Expected figures" in page
    write_params(project, {"encode.prompt": "plain" if is_codi else "bare"})
    assert re.search(
        r"encode\.prompt: found \w+, wanted \w+, by which .*coconut\.json", stage(project, "evaluate@base").error
    )


def test_an_entry_starts_from_it_with_its_network(tmp_path: Path) -> None:
    folder = with_meta(written(tmp_path / "model", with_projector=True), CODI)
    rows = [{"question": question, "steps": ["1"], "answer": str(n % 10)} for n, question in enumerate(QUESTIONS)]
    source = {"format": "canonical", "file": "rows.json"}
    entry = {"parent": "base", "method": "coconut", "latent_stage": 1, "epochs": 1, "lr": 0.0}
    changes = {
        "model": str(folder),
        "data.train": source | {"rows": 6},
        "data.valid": source | {"start": 6, "rows": 2},
        "data.tests.test": source | {"start": 8},
        "encode.prompt": "bare",
        "latent": {
            **{"c_thought": 6, "max_latent_stage": 1, "pad_latent_to_max": True, "markers": True, "uniform_prob": 0.0},
            **{"thought": "projector", "parallel_iterations": 0},
        },
        "train.weight_decay": 0.0,
        "curriculum": {"more": entry},
    }
    project = make_folder(tmp_path / "project", changes)
    (project / "data/raw/rows.json").write_text(json.dumps(rows))
    succeed(project, "digest_code", "params", "preprocess", "base", "encode", "train@more", "evaluate@more")
    start = load_file(folder / "model.safetensors")
    trained = load_file(project / "outputs/more/checkpoint/thought.safetensors")
    assert torch.equal(trained["finish.inner.weight"], start["projector.1.weight"])
    assert torch.equal(trained["finish.norm.bias"], start["projector.4.bias"])
    texts = [one.text for one in Reasoner.from_pretrained(folder).solve(QUESTIONS, max_new_tokens=6)]
    child = Reasoner.from_pretrained(project / "outputs/more/checkpoint")
    assert [one.text for one in child.solve(QUESTIONS, max_new_tokens=6)] == texts, "a rate of 0 changes nothing"


def test_a_network_of_another_shape_or_none_at_all_is_refused(tmp_path: Path) -> None:
    folder = with_meta(written(tmp_path / "model", with_projector=True), CODI)
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"projector.1.weight": torch.zeros(2 * WIDTH, WIDTH)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not the weights of thought 'projector' with this model"):
        Reasoner.from_pretrained(folder)
    save_file({k: v for k, v in weights.items() if "projector" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the weights of thought 'projector' cannot be read"):
        Reasoner.from_pretrained(folder)


def test_a_known_id_needs_no_file_of_ours(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", with_projector=False)
    assert find_meta(COCONUT, folder) == find_released(COCONUT)
    assert find_meta("someone/else", folder) is None
    shutil.copytree(folder, tmp_path / "copy")
    assert find_meta(str(tmp_path / "copy"), with_meta(tmp_path / "copy", CODI)) == find_released(CODI)


def test_pickled_weights_are_refused_with_the_cure(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", with_projector=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    project = make_folder(tmp_path / "project", {"model": str(folder)})
    succeed(project, "digest_code", "params", "preprocess")
    assert "pytorch_model.bin, which can run code when opened" in stage(project, "base").error


def test_an_id_of_the_hub_is_looked_up_there_and_a_slip_in_a_path_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_meta(written(tmp_path / "snapshot", with_projector=False), COCONUT)
    asked = []

    def find(model: str, revision: str | None) -> Path:
        asked.append((model, revision))
        return folder

    monkeypatch.setattr("coconut.checkpoints.origin.find_model", find)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    assert find_folder("someone/their-model") == folder
    assert find_folder("outputs/latent_9") == Path("outputs/latent_9")
    assert find_folder(folder) == folder
    assert asked == [("someone/their-model", None)]
    texts = [one.text for one in Reasoner.from_pretrained("someone/their-model").solve(QUESTIONS, max_new_tokens=5)]
    assert texts == [one.text for one in Reasoner.from_pretrained(folder).solve(QUESTIONS, max_new_tokens=5)]
    with pytest.raises(ValueError, match=r"outputs/latent_9: found no such folder"):
        Reasoner.from_pretrained("outputs/latent_9")
