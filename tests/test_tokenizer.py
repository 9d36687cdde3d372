"""Tests of tokenizers from folders: which rules count, and what a damaged or foreign folder says."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from coconut.data.tokenizer import build_word_tokenizer, load_tokenizer

TEXTS = ["Tom has 48/2 = 24 clips.\n", "1234567 <<1+1=2>>", "  it's  WE'LL ### 9", "naïve “数学”"] * 3


def llama_like():
    """Byte fallback and a mark for blanks, as in Llama 2's files."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return core


def bytes_like():
    """Bytes and GPT-2's splitting rule, by which several digits may be one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    return core


def digits_like():
    """The same vocabulary, but the file says that every digit stands alone, as in Qwen 2's files."""
    core = bytes_like()
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return core


@pytest.fixture
def folder(tmp_path):
    """Write a folder with a `tokenizer.json`, a `tokenizer_config.json` and a model's `config.json`."""

    def write(core=None, model_type="gpt2", **config):
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        tokenizer = (
            build_word_tokenizer(["0 1 2 + ? ###"])
            if core is None
            else PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
        )
        tokenizer.save_pretrained(path)
        fields = json.loads((path / "tokenizer_config.json").read_text()) | config
        (path / "tokenizer_config.json").write_text(json.dumps(fields))
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return path

    return write


# --- the class and the file -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("core", "class_name", "model_type"),
    [
        (llama_like, "GPT2Tokenizer", "llama"),
        (llama_like, "LlamaTokenizerFast", "qwen2"),
        (bytes_like, "LlamaTokenizerFast", "qwen2"),
        (digits_like, "GPT2TokenizerFast", "gpt2"),
        (llama_like, "Qwen2Tokenizer", "llama"),
    ],
)
def test_a_class_that_gives_other_ids_than_the_file_is_announced_and_not_used(
    folder, log_lines, core, class_name, model_type
):
    path = folder(core(), model_type, tokenizer_class=class_name)
    bare = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer = load_tokenizer(path)
    for text in [*TEXTS, "9 8 7 other\ttext's"]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == bare.encode(text, add_special_tokens=False).ids
    assert len([line for line in log_lines if "otherwise than tokenizer.json does" in line]) == 1


def test_a_class_that_gives_the_files_ids_is_used_without_a_word(folder, log_lines):
    tokenizer = load_tokenizer(folder(bytes_like(), tokenizer_class="GPT2Tokenizer"))
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
    assert log_lines == []


@pytest.mark.parametrize("eos_id", [2, [2, 1]])
def test_a_bare_file_takes_the_end_of_text_from_the_models_config(folder, eos_id):
    path = folder()
    (path / "tokenizer_config.json").unlink()
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": eos_id}))
    assert load_tokenizer(path).eos_token == "<eos>"


@pytest.mark.parametrize("eos_id", [-1, 99, 10**30, "2", True, [], [None], None])
def test_an_end_of_text_that_is_no_token_is_none(folder, eos_id):
    path = folder()
    (path / "tokenizer_config.json").unlink()
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": eos_id}))
    with pytest.raises(ValueError, match=r"no end-of-text token.*name it as eos_token in tokenizer_config\.json"):
        load_tokenizer(path)


# --- damaged and foreign files --------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"model_max_length": ""}, "'model_max_length': found '', wanted a number; take the key out"),
        ({"model_max_length": [1]}, "'model_max_length': found [1], wanted a number"),
        ({"model_max_length": True}, "'model_max_length': found True, wanted a number"),
        ({"eos_token": ""}, "'eos_token': found '', wanted text that is not empty"),
        ({"bos_token": ""}, "'bos_token': found '', wanted text that is not empty"),
        ({"unk_token": 5}, "'unk_token': found 5, wanted text"),
        ({"pad_token": True}, "'pad_token': found True, wanted text"),
        ({"eos_token": ["</s>"]}, "'eos_token': found ['</s>'], wanted text"),
        ({"eos_token": {"content": ""}}, "'eos_token': found an object, wanted text"),
        ({"chat_template": 5}, "'chat_template': found 5, wanted text, null, or a list"),
        ({"chat_template": [{"name": "default"}]}, "'chat_template': found [{'name': 'default'}], wanted"),
        ({"tokenizer_class": 5}, "'tokenizer_class': found 5, wanted text or null"),
    ],
    ids=str,
)
def test_a_wrong_value_in_the_config_names_file_key_and_cure(folder, field, message):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: ") as caught:
        load_tokenizer(folder(**field))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "field",
    [
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"extra_special_tokens": "ab"},
        {"padding_side": "up"},
        {"eos_token": {"content": "<eos>"}},
        {"encode": 2},
        {"split_special_tokens": "yes"},
    ],
    ids=str,
)
def test_any_other_wrong_value_is_a_message_that_names_the_folder(folder, field):
    with pytest.raises(ValueError, match=r"model: its tokenizer cannot be read: .*; restore its files"):
        load_tokenizer(folder(**field))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_a_pointer_of_git_lfs_in_place_of_a_file_is_named(folder, name):
    path = folder()
    (path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name}: found a Git LFS pointer.*run `git lfs pull`"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", ["", "{}", "[", "null", '{"model": {}}', "[" * 2_000_000, '{"version": "1.0"}'])
def test_a_damaged_tokenizer_json_is_one_sentence(folder, content):
    path = folder()
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"model: its tokenizer cannot be read: .*; restore its files"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": ' * 2_000_000, '{"a": 1, "a": 2}', "\udcff"])
def test_a_damaged_config_is_one_sentence(folder, name, content):
    path = folder()
    if name == "config.json":
        (path / "tokenizer_config.json").unlink()
    (path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{name}"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("name", "package"),
    [("tekken.json", "mistral-common"), ("tokenizer.model", "sentencepiece"), ("spiece.model", "sentencepiece")],
)
def test_a_vocabulary_that_needs_a_package_says_which(tmp_path, name, package):
    (tmp_path / name).write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(
        ValueError, match=rf"{name}: the package that reads it is not installed; run `pip install {package}`"
    ):
        load_tokenizer(tmp_path)
