"""Checkpoints, markers and the output head, on tiny random models."""

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from coconut.checkpoints.folder import load_checkpoint, save_checkpoint
from coconut.checkpoints.markers import add_markers
from coconut.checkpoints.meta import CheckpointMeta
from coconut.checkpoints.support import check_supported
from coconut.data.examples import MARKERS
from coconut.data.tokenizer import build_word_tokenizer
from coconut.model.head import output_logits
from marks import slow_but
from tiny_models import FAMILIES, build_tiny_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
META = CheckpointMeta(
    method="coconut",
    latent_stage=2,
    c_thought=1,
    max_latent_stage=4,
    pad_latent_to_max=True,
    markers=False,
    thought="hidden[-1]",
    parallel_iterations=0,
    prompt="plain",
)


def word_tokenizer(num_words: int = 61, *, like: str = "<<"):
    """A tokenizer of `num_words` + 3 entries; `like` is the last of them."""
    return build_word_tokenizer([" ".join(f"{index:02d}" for index in range(num_words - 1)), like])


def rows_of(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


# --- head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_head_after_body_gives_the_logits_of_the_model(family):
    model = build_tiny_model(family)
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state
        torch.testing.assert_close(output_logits(model, hidden), model(IDS).logits)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("cohere", FAMILIES["llama"] | {"logit_scale": 0.25}),
        ("granite", FAMILIES["llama"] | {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("gemma3_text", {"final_logit_softcapping": 0.5}),
    ],
)
def test_head_scales_and_caps_as_the_family_does(family, values):
    model = build_tiny_model(family, **values)
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state
        torch.testing.assert_close(output_logits(model, hidden), model(IDS).logits)
        bare = model.get_output_embeddings()(hidden)
    assert (bare - output_logits(model, hidden)).abs().max() > 0.1


@pytest.mark.parametrize("family", slow_but(["gpt2", "gemma2", "phi3"], FAMILIES))
def test_each_family_is_supported(family):
    check_supported(build_tiny_model(family))


def test_checking_leaves_the_mode_as_it_was(tiny_gpt2):
    tiny_gpt2.train()
    check_supported(tiny_gpt2)
    assert tiny_gpt2.training


@pytest.mark.parametrize(
    ("family", "values", "words"),
    [
        (
            "bert",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
            r"BertLMHeadModel attends to later columns .*; wanted a decoder-only model",
        ),
        ("hyperclovax", FAMILIES["llama"] | {"logits_scaling": 2.0}, "its head turns into logits by a linear map"),
    ],
    ids=["reads in both directions", "scales its logits in another way"],
)
def test_a_model_outside_the_mathematics_is_refused(family, values, words):
    with pytest.raises(ValueError, match=words):
        check_supported(build_tiny_model(family, **values))


def test_weights_that_are_not_numbers_are_refused(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        check_supported(tiny_llama)


# --- markers --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_marker_rows_start_as_the_row_of_like_and_no_logit_moves(family, tied):
    model = build_tiny_model(family, tie_word_embeddings=tied)
    tokenizer = word_tokenizer()
    with torch.no_grad():
        logits = model(IDS).logits
    like_id = tokenizer.convert_tokens_to_ids("<<")
    add_markers(model, tokenizer)

    assert tokenizer.convert_tokens_to_ids(list(MARKERS)) == [64, 65, 66]
    assert (len(tokenizer), model.config.vocab_size) == (67, 67)
    for rows in rows_of(model):
        assert rows.shape[0] == 67
        assert rows[64:].equal(rows[like_id].expand(3, -1))
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == tied
    with torch.no_grad():
        after = model(IDS).logits
    assert after[..., :64].equal(logits)
    torch.testing.assert_close(after[..., 64:], logits[..., like_id, None].expand(-1, -1, 3))


@pytest.mark.parametrize(("num_words", "num_missing"), [(64, 0), (67, 3), (80, 16)])
def test_tokens_without_a_row_are_named(num_words, num_missing, tiny_llama, log_lines):
    tokenizer = word_tokenizer(num_words - 3)
    num_tokens = len(tokenizer)
    assert num_tokens - 64 == num_missing
    add_markers(tiny_llama, tokenizer)
    named = [line for line in log_lines if "have no row in the embeddings" in line]
    assert len(named) == bool(num_missing)
    assert not named or named[0].startswith(f"{num_missing} tokens of the tokenizer")


def test_marker_rows_start_as_the_mean_row_where_like_is_no_token(tiny_llama):
    tokenizer = word_tokenizer(like="other")
    wanted = [rows.mean(dim=0) for rows in rows_of(tiny_llama)]
    add_markers(tiny_llama, tokenizer)
    for rows, mean in zip(rows_of(tiny_llama), wanted, strict=True):
        torch.testing.assert_close(rows[64:], mean.expand(3, -1))


def test_the_mean_row_leaves_out_rows_that_no_token_uses(tiny_qwen2):
    """Qwen's embedding has rows to spare; they were never trained."""
    tokenizer = word_tokenizer(17, like="other")
    mean = rows_of(tiny_qwen2)[0][:20].mean(dim=0)
    add_markers(tiny_qwen2, tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(MARKERS)) == [20, 21, 22]
    assert rows_of(tiny_qwen2)[0].shape[0] == 64
    torch.testing.assert_close(rows_of(tiny_qwen2)[0][20:23], mean.expand(3, -1))


def test_spare_rows_are_used_and_the_vocabulary_does_not_shrink(tiny_qwen2):
    tokenizer = word_tokenizer(17)
    before = rows_of(tiny_qwen2)[0].clone()
    add_markers(tiny_qwen2, tokenizer)
    rows = rows_of(tiny_qwen2)[0]
    assert rows.shape[0] == tiny_qwen2.config.vocab_size == 64
    assert rows[20:23].equal(before[tokenizer.convert_tokens_to_ids("<<")].expand(3, -1))
    assert rows[:20].equal(before[:20])
    assert rows[23:].equal(before[23:])


def test_markers_that_are_there_keep_their_rows(tiny_llama):
    tokenizer = word_tokenizer()
    add_markers(tiny_llama, tokenizer)
    with torch.no_grad():
        for rows in rows_of(tiny_llama):
            rows[64:] = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    before = [rows.clone() for rows in rows_of(tiny_llama)]
    add_markers(tiny_llama, tokenizer)
    assert len(tokenizer) == 67
    assert all(rows.equal(old) for rows, old in zip(rows_of(tiny_llama), before, strict=True))


def test_one_missing_marker_is_added_without_touching_the_others(tiny_llama):
    tokenizer = word_tokenizer(60)
    tokenizer.add_tokens([MARKERS[1]], special_tokens=True)
    before = [rows.clone() for rows in rows_of(tiny_llama)]
    add_markers(tiny_llama, tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(MARKERS)) == [64, 63, 65]
    assert all(rows[:64].equal(old) for rows, old in zip(rows_of(tiny_llama), before, strict=True))


def test_the_bias_of_a_head_grows_with_it():
    model = build_tiny_model("gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=128)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.arange(64.0))
    tokenizer = word_tokenizer()
    add_markers(model, tokenizer)
    like_id = tokenizer.convert_tokens_to_ids("<<")
    assert model.lm_head.bias.tolist() == [*range(64), like_id, like_id, like_id]


def test_each_marker_is_one_token_inside_a_text():
    tokenizer, model = word_tokenizer(), build_tiny_model("llama")
    add_markers(model, tokenizer)
    text = f"01{MARKERS[0]}{MARKERS[2]} {MARKERS[1]}02"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == [
        "01",
        "<|start-latent|>",
        "<|latent|>",
        "<|end-latent|>",
        "02",
    ]


# --- checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_opens_with_plain_transformers_to_the_same_model(family, tmp_path):
    model, tokenizer = build_tiny_model(family), word_tokenizer()
    add_markers(model, tokenizer)
    save_checkpoint(tmp_path / "checkpoint", model, tokenizer, META)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    text = f"01 02 {MARKERS[2]} << 03"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    # AutoTokenizer overrides what a folder of this family says; `prepare_base` warns of it.
    opener = PreTrainedTokenizerFast if family == "qwen2" else AutoTokenizer
    assert opener.from_pretrained(tmp_path / "checkpoint")(text)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        assert opened(ids).logits.equal(model(ids).logits)


@pytest.mark.parametrize(
    ("family", "tokenizer_class"), [("gpt2", GPT2Tokenizer), ("llama", LlamaTokenizer), ("qwen2", Qwen2Tokenizer)]
)
def test_a_family_s_own_tokenizer_keeps_its_class_and_its_ids(family, tokenizer_class, tmp_path):
    text = "How much is 12 * 3?\n<<12*3=36>>\n### 36"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([text] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    parts = json.loads(core.to_str())["model"]
    merges = [tuple(pair) for pair in parts["merges"]]
    specials = {
        name: index for index, name in enumerate(("<|endoftext|>", "<unk>", "<s>", "</s>"), len(parts["vocab"]))
    }
    tokenizer_class(vocab=parts["vocab"] | specials, merges=merges).save_pretrained(tmp_path / "model")
    build_tiny_model(family, vocab_size=320).save_pretrained(tmp_path / "model")

    model, tokenizer, _ = load_checkpoint(tmp_path / "model")
    ids = tokenizer(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "model")(text)["input_ids"]
    add_markers(model, tokenizer)
    save_checkpoint(tmp_path / "checkpoint", model, tokenizer, META)
    for opened in (load_checkpoint(tmp_path / "checkpoint")[1], AutoTokenizer.from_pretrained(tmp_path / "checkpoint")):
        assert type(opened) is tokenizer_class
        assert opened(text)["input_ids"] == ids
        marker_ids = tokenizer.convert_tokens_to_ids(list(MARKERS))
        assert opened("".join(MARKERS), add_special_tokens=False)["input_ids"] == marker_ids


def test_loading_gives_back_what_was_saved(tiny_lm, tmp_path):
    tokenizer = word_tokenizer()
    save_checkpoint(tmp_path / "checkpoint", tiny_lm, tokenizer, META)
    model, loaded_tokenizer, meta = load_checkpoint(tmp_path / "checkpoint")
    assert meta == META
    assert not model.training
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert all(value.equal(model.state_dict()[name]) for name, value in tiny_lm.state_dict().items())


def test_a_plain_folder_has_no_meta(tiny_gpt2, tmp_path):
    tiny_gpt2.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path)[2] is None


def test_weights_load_in_the_precision_asked_for(tiny_gpt2, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_gpt2.to(torch.bfloat16), word_tokenizer(), META)
    assert load_checkpoint(tmp_path / "checkpoint")[0].dtype == torch.float32
    assert load_checkpoint(tmp_path / "checkpoint", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_saving_what_was_loaded_gives_the_same_bytes(tiny_lm, tmp_path):
    tokenizer = word_tokenizer()
    add_markers(tiny_lm, tokenizer)
    save_checkpoint(tmp_path / "first", tiny_lm, tokenizer, META)
    save_checkpoint(tmp_path / "second", *load_checkpoint(tmp_path / "first"))
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == [
        "coconut.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_every_file_of_a_checkpoint_is_readable_for_all(tiny_gpt2, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_gpt2, word_tokenizer(), META)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "checkpoint").iterdir()} == {0o644}


def test_saving_over_a_checkpoint_does_not_write_through_its_hard_links(tiny_gpt2, tmp_path):
    """DVC's cache is linked to the files of the work tree."""
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, tiny_gpt2, word_tokenizer(), META)
    cached = tmp_path / "cache"
    cached.mkdir()
    for path in folder.iterdir():
        os.link(path, cached / path.name)
    before = {path.name: path.read_bytes() for path in cached.iterdir()}
    other = build_tiny_model("gpt2", seed=1)
    save_checkpoint(folder, other, word_tokenizer(30), None)
    assert {path.name: path.read_bytes() for path in cached.iterdir()} == before
    assert not (folder / "coconut.json").exists()
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_a_failed_save_leaves_the_old_checkpoint(tiny_gpt2, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, tiny_gpt2, word_tokenizer(), META)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    tokenizer = word_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", disk_full)
    with pytest.raises(OSError, match=r"checkpoint: cannot be written \(.*No space left.*\); free disk space"):
        save_checkpoint(folder, build_tiny_model("gpt2", seed=1), tokenizer, META)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_below_a_file_names_the_folder_and_the_cure(tiny_gpt2, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(OSError, match=r"outputs/base/checkpoint: cannot be written .* fix the permissions"):
        save_checkpoint(tmp_path / "outputs" / "base" / "checkpoint", tiny_gpt2, word_tokenizer(), META)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "coconut.json: found no usable JSON"),
        ("[]", "coconut.json: found list, wanted a JSON object"),
        ('{"method": "coconut"}', "coconut.json: found .'method'., wanted exactly the keys"),
        (
            json.dumps({**META.to_json(), "extra": 1}),
            "wanted exactly the keys .*'num_removed_at_end', 'num_removed_tokens', 'num_thoughts'",
        ),
        (json.dumps({**META.to_json(), "c_thought": "1"}), "c_thought: found '1' .text., wanted a whole number"),
        (
            json.dumps({**META.to_json(), "c_thought": True}),
            "c_thought: found True .true/false., wanted a whole number",
        ),
        (json.dumps({**META.to_json(), "markers": 1}), "markers: found 1 .a number., wanted true or false"),
    ],
)
def test_a_damaged_coconut_json_is_named(text, message, tiny_gpt2, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_gpt2, word_tokenizer(), META)
    (tmp_path / "checkpoint" / "coconut.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def saved(tiny_llama, tmp_path) -> Path:
    save_checkpoint(tmp_path / "checkpoint", tiny_llama, word_tokenizer(), META)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("kept", [0, 4, 5000, -1], ids=["empty", "no header", "cut short", "one byte short"])
def test_damaged_safetensors_are_named(kept, saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError,
        match=r"checkpoint/model.safetensors: its safetensors file is damaged or cut short .*; fetch or write",
    ):
        load_checkpoint(saved)


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_weights_of_another_shape_are_refused(saved):
    change_config(saved, intermediate_size=48)
    with pytest.raises(ValueError, match=r"shape \(.*64.*\) in the weights, wanted \(.*48.*\) by config.json"):
        load_checkpoint(saved)


def test_weights_that_lack_a_layer_are_refused(saved):
    change_config(saved, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lack 9 tensors of a LlamaForCausalLM, model.layers.2"):
        load_checkpoint(saved)


def test_an_unknown_family_is_refused_without_running_its_code(saved):
    (saved / "code.py").write_text("raise SystemExit")
    change_config(saved, model_type="own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    with pytest.raises(ValueError, match=r"checkpoint/config.json: cannot be read: .* custom code .*wanted valid JSON"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "a\\\\b.safetensors", "a.bin"])
def test_an_index_that_leads_out_of_the_folder_is_refused(name, saved):
    (saved / "model.safetensors").rename(saved.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: weight_map: found the file .*, wanted the bare name of a"):
        load_checkpoint(saved)


def test_a_pointer_of_git_lfs_in_place_of_weights_says_how_to_get_them(saved):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (saved / "model.safetensors").write_text(text)
    with pytest.raises(ValueError, match=r"model.safetensors: found a Git LFS pointer, .* `git lfs pull`"):
        load_checkpoint(saved)


def test_a_header_of_hundreds_of_thousands_of_tensors_is_refused_at_once(saved):
    path = saved / "model.safetensors"
    with path.open("wb") as file:
        file.write((50 << 20).to_bytes(8, "little"))
        file.truncate(60 << 20)
    with pytest.raises(ValueError, match="found a header of 52428800 bytes, wanted at most 16777216"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["coconut.json", "config.json", "generation_config.json"])
def test_json_that_is_nested_too_deeply_is_refused(name, saved):
    (saved / name).write_text('{"a":' * 200_000)
    with pytest.raises(ValueError, match=rf"{name}: found no usable JSON .*wanted a JSON object"):
        load_checkpoint(saved)


@pytest.mark.parametrize("asked", ["flash_attention_2", "kernels-community/vllm-flash-attn3", "nonsense"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_does_not_choose_the_code_of_attention(asked, key, saved):
    change_config(saved, **{key: asked})
    assert load_checkpoint(saved)[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "found weights quantised with gptq, .* unquantised"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights: found 'adapter_model.bin', wanted"),
        ({"num_hidden_layers": 1_000_000}, r"num_hidden_layers: found 1e\+06, wanted at most 1000"),
        ({"num_hidden_layers": 999, "hidden_size": 65536}, "found sizes that make .* wanted at most this machine's"),
        ({"intermediate_size": 10**10}, "found sizes that make .* billion parameters or more"),
        ({"intermediate_size": 10**17}, "no decoder-only model can be built from it: Storage size"),
        ({"num_attention_heads": 0}, "config.json: .*wanted"),
        ({"vocab_size": "many"}, "config.json: cannot be read: .*vocab_size.*wanted valid JSON"),
        ({"model_type": 5}, "config.json: cannot be read: .*wanted valid JSON with a model_type"),
    ],
)
def test_what_a_config_must_not_ask_for_is_named_at_once(values, message, saved):
    change_config(saved, **values)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved)


@pytest.mark.parametrize("ids", ["2", [2, "x"], -1, 10**9, True, 1.5, [[2]]])
def test_ids_that_end_no_text_are_named(ids, saved):
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=r"checkpoint.*(eos_token_id: found|cannot be loaded).*wanted"):
        load_checkpoint(saved)


def test_weights_that_are_not_finite_are_named(tiny_llama, tmp_path):
    with torch.no_grad():
        tiny_llama.model.norm.weight[3] = float("nan")
    save_checkpoint(tmp_path / "checkpoint", tiny_llama, word_tokenizer(), META)
    with pytest.raises(ValueError, match=r"model.norm.weight: found weights that are infinite or not a number"):
        load_checkpoint(tmp_path / "checkpoint")


def test_a_folder_without_tokenizer_is_refused(saved):
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint: no tokenizer, wanted one of tokenizer\.json"):
        load_checkpoint(saved)


def test_a_folder_with_damaged_tokenizer_is_refused(saved):
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint: its tokenizer cannot be read"):
        load_checkpoint(saved)


def test_a_tokenizer_without_end_of_text_is_refused(saved):
    change_config(saved, eos_token_id=None)
    path = saved / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    with pytest.raises(ValueError, match="no end-of-text token"):
        load_checkpoint(saved)


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(saved):
    path = saved / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    tokenizer = load_checkpoint(saved)[1]
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
