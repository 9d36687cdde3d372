"""Where the starting weights come from."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from coconut.checkpoints.folder import load_checkpoint
from coconut.checkpoints.origin import prepare_base
from coconut.checkpoints.weights import load_model
from coconut.config.params import load_params
from coconut.config.schema import Params
from coconut.data.examples import MARKERS, Example
from coconut.data.tokenizer import build_word_tokenizer
from marks import slow_but
from tiny_models import FAMILIES, build_tiny_model

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    Example("10 - 10 - 5 + 8 - 5 ?", ["0", "6", "3", "9"], "9"),
    Example("7 * 2 ?", ["3"], "3"),
]


@pytest.fixture
def params() -> Params:
    return load_params(ROOT / "params.yaml")


@pytest.fixture
def run(params, tmp_path):
    """Prepare the base of a `model`, and open what was written."""

    def prepare(model: Path | str, *, seed: int = 0, name: str = "checkpoint", examples=EXAMPLES):
        prepare_base(replace(params, model=str(model), seed=seed), examples, tmp_path / name)
        return load_checkpoint(tmp_path / name)

    return prepare


def save_folder(folder: Path, model, words: str = "01 02 << 03") -> Path:
    model.save_pretrained(folder)
    build_word_tokenizer([words]).save_pretrained(folder)
    return folder


def never_read() -> Iterator[Example]:
    raise AssertionError("a model with a tokenizer needs no examples")
    yield


# --- random weights -------------------------------------------------------------------------


def test_the_default_model_gets_one_token_for_each_word_of_the_task(run):
    model, tokenizer, meta = run(ROOT / "models" / "tiny")
    words = ["###", "*", "+", "-", "0", "10", "2", "3", "5", "6", "7", "8", "9", "?"]
    vocabulary = ["<unk>", "<pad>", "<eos>", *words, *MARKERS]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == vocabulary
    ids = tokenizer("10 - 10 - 5 + 8 - 5 ?\n0\n6\n3\n9\n### 9<eos>")["input_ids"]
    assert tokenizer.decode(ids) == "10 - 10 - 5 + 8 - 5 ? 0 6 3 9 ### 9 <eos>"
    assert len(ids) == 17
    assert meta is None
    assert model.config.vocab_size == len(vocabulary)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id) == (2, 1, None)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_seed_alone_decides_the_random_weights(run, tmp_path):
    torch.manual_seed(1)
    run(ROOT / "models" / "tiny", name="first")
    torch.manual_seed(2)
    run(ROOT / "models" / "tiny", name="second")
    run(ROOT / "models" / "tiny", name="other", seed=1)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    weights = "model.safetensors"
    assert (tmp_path / "first" / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_drawing_weights_leaves_the_global_generator_alone(run):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    run(ROOT / "models" / "tiny")
    assert torch.rand(3).equal(wanted)


def test_the_vocabulary_does_not_depend_on_the_order_of_the_examples(run):
    vocabularies = [
        run(ROOT / "models" / "tiny", examples=order)[1].get_vocab() for order in (EXAMPLES, EXAMPLES[::-1])
    ]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_config_of_each_family_gives_a_model(family, run, tmp_path):
    build_tiny_model(family).config.save_pretrained(tmp_path / family)
    model, tokenizer, _ = run(tmp_path / family)
    assert model.config.model_type == family
    assert model.config.vocab_size == len(tokenizer) == 20
    assert tokenizer("10 - 5 ?")["input_ids"] == tokenizer.convert_tokens_to_ids(["10", "-", "5", "?"])


def test_a_tokenizer_beside_a_bare_config_is_used(run, tmp_path):
    (tmp_path / "bare").mkdir()
    build_word_tokenizer(["a b c <<"]).backend_tokenizer.save(str(tmp_path / "bare" / "tokenizer.json"))
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "eos_token_id": 2}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    model, tokenizer, _ = run(tmp_path / "bare", examples=never_read())
    assert tokenizer.convert_ids_to_tokens(list(range(10))) == ["<unk>", "<pad>", "<eos>", "<<", *"abc", *MARKERS]
    assert tokenizer.eos_token == "<eos>"
    assert model.config.vocab_size == 10
    rows = model.get_input_embeddings().weight
    assert rows[7:].equal(rows[3].expand(3, -1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json: found no usable JSON .*, wanted a JSON object"),
        ("[]", "config.json: found list, wanted a JSON object"),
        ("{}", "config.json: cannot be read: .*model_type"),
        ('{"model_type": "nothing"}', "config.json: cannot be read: .*nothing"),
        ('{"model_type": "gpt2", "n_embd": "wide"}', "config.json: cannot be read: .*n_embd.* got str"),
        ('{"model_type": "gpt2", "n_embd": 30, "n_head": 4}', "config.json: no decoder-only model .*divisible"),
        ('{"model_type": "t5", "d_model": 32}', "config.json: no decoder-only model can be built"),
    ],
)
def test_a_config_that_makes_no_model_is_named(config, message, run, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "bare")


def test_a_model_that_reads_in_both_directions_is_refused(run, tmp_path):
    (tmp_path / "bare").mkdir()
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"BertLMHeadModel .* wanted a decoder-only model"):
        run(tmp_path / "bare")
    assert not (tmp_path / "checkpoint").exists()


# --- local folders --------------------------------------------------------------------------


def test_a_local_folder_keeps_its_weights_and_needs_no_examples(run, tmp_path, tiny_llama):
    folder = save_folder(tmp_path / "model", tiny_llama)
    model, tokenizer, _ = run(folder, examples=never_read())
    assert model.lm_head.weight[:7].equal(tiny_llama.lm_head.weight[:7])
    assert len(tokenizer) == 10
    assert model.config.vocab_size == 64, "spare rows are used, not cut off"


def test_half_precision_weights_become_float32(run, tmp_path, tiny_llama):
    folder = save_folder(tmp_path / "model", tiny_llama.to(torch.bfloat16))
    model = run(folder)[0]
    assert model.dtype == torch.float32
    assert model.config.dtype == torch.float32


def test_a_trained_checkpoint_as_model_keeps_its_markers(run, tmp_path, tiny_llama):
    model, tokenizer, _ = run(save_folder(tmp_path / "model", tiny_llama))
    marker_ids = tokenizer.convert_tokens_to_ids(list(MARKERS))
    with torch.no_grad():
        model.get_input_embeddings().weight[marker_ids] = 7.0
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    again = run(tmp_path / "trained", name="again")[0]
    assert again.get_input_embeddings().weight[marker_ids].eq(7).all()


@pytest.mark.parametrize("kind", [AutoModelForTokenClassification, AutoModelForSequenceClassification])
@pytest.mark.parametrize("family", slow_but(["gpt2"], ["gpt2", "llama", "qwen2"]))
def test_a_classification_head_is_dropped_with_a_warning_that_names_it(kind, family, run, tmp_path, log_lines):
    reward = kind.from_config(build_tiny_model(family).config)
    folder = save_folder(tmp_path / "reward", reward)
    model, _, _ = run(folder)
    dropped = next(message for message in log_lines if "dropped" in message)
    assert "reward: loaded as" in dropped
    assert any(f"{name}.weight" in dropped for name in ("score", "classifier"))
    embeddings = reward.get_input_embeddings().weight
    assert model.get_input_embeddings().weight[:7].equal(embeddings[:7])
    assert model.get_output_embeddings().weight[:7].equal(embeddings[:7])
    has_own_head = not model.config.tie_word_embeddings
    assert any("has no language-model head" in message for message in log_lines) == has_own_head


@pytest.mark.parametrize("family", slow_but(["gpt2", "qwen2"], FAMILIES))
@pytest.mark.parametrize("differs", [True, False], ids=["another head", "equal head"])
def test_a_head_that_differs_from_tied_embeddings_is_kept(family, differs, run, tmp_path, log_lines):
    folder = save_folder(tmp_path / "model", build_tiny_model(family, tie_word_embeddings=True))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    embeddings = next(tensor for name, tensor in tensors.items() if re.search(r"(wte|embed_tokens)\.weight$", name))
    tensors["lm_head.weight"] = embeddings.flip(0) if differs else embeddings.clone()
    save_file(tensors, path, {"format": "pt"})

    model, _, _ = run(folder)
    head = model.get_output_embeddings().weight
    assert (head is not model.get_input_embeddings().weight) == differs
    assert head[:7].equal(tensors["lm_head.weight"][:7])
    assert model.config.tie_word_embeddings != differs
    said = [line for line in log_lines if "hold a head" in line]
    assert len(said) == differs


def _wrap(tensors, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _wrap_layers(tensors, _):
    return {re.sub(r"((?:layers|h)\.\d+\.)", r"\1_orig_mod.", f"module.{name}"): one for name, one in tensors.items()}


WRAPPERS = ["base_causallm.", "module.", "_orig_mod.", "model.", "codi.", "base_model.model.", "module._orig_mod."]


@pytest.mark.parametrize("family", slow_but(["gpt2"], FAMILIES))
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [*((_wrap, prefix) for prefix in [*WRAPPERS, "_fsdp_wrapped_module.", "a.b.c.d."]), (_wrap_layers, "_orig_mod.")],
)
def test_weights_from_within_a_wrapper_are_those_of_the_model(family, wrap, prefix, tmp_path, log_lines):
    model = build_tiny_model(family)
    folder = save_folder(tmp_path / "model", model)
    tensors = wrap(load_file(folder / "model.safetensors"), prefix) | {"value_head.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    read = load_model(folder)
    assert all(one.equal(read.state_dict()[name]) for name, one in model.state_dict().items())
    assert any("named as in a wrapper" in line and prefix.split(".")[0] in line for line in log_lines)
    assert any("value_head.weight" in line for line in log_lines)


@pytest.mark.parametrize("family", slow_but(["gpt2"], ["gpt2", "llama"]))
def test_a_wrapped_model_without_its_head_is_read_like_one_without_wrapper(family, tmp_path):
    model = build_tiny_model(family, tie_word_embeddings=True)
    folder = save_folder(tmp_path / "model", model)
    tensors = load_file(folder / "model.safetensors")
    bare = {f"module.{name.partition('.')[2]}": tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    assert all(one.equal(load_model(folder).state_dict()[name]) for name, one in model.state_dict().items())


def test_names_of_which_only_some_have_a_prefix_are_left_alone(tmp_path, tiny_llama):
    folder = save_folder(tmp_path / "model", tiny_llama)
    tensors = load_file(folder / "model.safetensors")
    tensors["module.model.norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors of a LlamaForCausalLM, model\.norm\.weight among them"):
        load_model(folder)


def test_plain_autotokenizer_s_own_mind_is_a_warning(run, tmp_path, log_lines):
    build_tiny_model("qwen2").config.save_pretrained(tmp_path / "qwen2")
    run(tmp_path / "qwen2")
    assert any("AutoTokenizer would read" in message and "as Qwen2Tokenizer" in message for message in log_lines)


def test_an_ordinary_model_warns_of_nothing(run, tmp_path, tiny_llama, log_lines):
    run(ROOT / "models" / "tiny")
    run(save_folder(tmp_path / "model", tiny_llama))
    assert log_lines == []


def test_damaged_weights_are_named_and_nothing_is_written(run, tmp_path, tiny_llama):
    folder = save_folder(tmp_path / "model", tiny_llama)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model/model.safetensors: its safetensors file is damaged or cut short"):
        run(folder)
    assert not (tmp_path / "checkpoint").exists()


def test_a_shard_that_is_missing_is_named(run, tmp_path, tiny_llama):
    folder = save_folder(tmp_path / "model", tiny_llama)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors"):
        run(folder)


def test_pickled_weights_are_refused(run, tmp_path, tiny_llama):
    folder = save_folder(tmp_path / "model", tiny_llama)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as pytorch_model\.bin, .* wanted model\.safetensors"):
        run(folder)


def test_a_folder_without_config_is_named(run, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json; wanted a Hugging Face folder"):
        run(tmp_path)


def test_an_output_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(OSError, match=r"outputs/base: cannot be written"):
        run(ROOT / "models" / "tiny", name="outputs/base")


# --- the hub --------------------------------------------------------------------------------


def test_a_hub_model_out_of_reach_is_named_with_the_cure(run):
    with pytest.raises(ValueError, match=r"model: 'Qwen/Qwen2\.5-0\.5B', revision main, .* go online, correct the id"):
        run("Qwen/Qwen2.5-0.5B")


@pytest.mark.parametrize("model", ["./models/none", "a/b/c", "../none", "~/none-such", "with space"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_named(model, run):
    with pytest.raises(ValueError, match=r"model: found .*, which is no folder here and no hub id"):
        run(model)


def test_a_hub_model_out_of_reach_comes_from_the_local_cache(run, tmp_path, tiny_llama, monkeypatch, log_lines):
    commit = "a1" * 20
    repository = tmp_path / "hub" / "models--someone--tiny"
    save_folder(repository / "snapshots" / commit, tiny_llama)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = run("someone/tiny")[0]
    assert model.lm_head.weight[:7].equal(tiny_llama.lm_head.weight[:7])
    assert any("the hub was not reached" in message and commit in message for message in log_lines)
