"""The encode stage: files, shares, and what it refuses."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coconut.config.schema import LatentConfig
from coconut.data import encoder
from coconut.data.encoded import load_encoded
from coconut.data.encoder import encode_splits
from coconut.data.encoding import EncodedExample
from coconut.data.examples import Example, write_examples
from coconut.data.layouts import common_layouts
from coconut.data.tokenizer import build_word_tokenizer
from coconut.data.views import longest_view

DATA_DIR = Path(__file__).parents[2] / "shared" / "data"
LATENT = LatentConfig(
    c_thought=1,
    max_latent_stage=2,
    pad_latent_to_max=True,
    markers=False,
    uniform_prob=0.0,
    thought="hidden[-1]",
    parallel_iterations=0,
)
EXAMPLES = [Example("1 + 2 ?", ["3"], "3"), Example("1 + 2 + 2 ?", ["3", "5"], "5"), Example("5 ?", [], "5")]


@pytest.fixture
def encode(tmp_path):
    """Encode `train`, and `held_out` as valid and test, with a tokenizer for a model of so many positions."""

    def run(
        train: Sequence[Example] = EXAMPLES,
        *,
        held_out: Sequence[Example] = EXAMPLES,
        tokenizer: PreTrainedTokenizerFast | None = None,
        positions: int | None = 64,
        prompt: str = "plain",
        latent: LatentConfig = LATENT,
        num_processes: int = 1,
        name: str = "encoded",
    ):
        checkpoint_dir, examples_dir = tmp_path / f"{name}-checkpoint", tmp_path / f"{name}-examples"
        examples_dir.mkdir()
        for split, examples in (("train", train), ("valid", held_out), ("test", held_out)):
            write_examples(examples_dir / f"{split}.jsonl", examples)
        (tokenizer or build_word_tokenizer(["0 1 2 3 4 5 6 7 8 9 + ? ###"])).save_pretrained(checkpoint_dir)
        config = {"model_type": "gpt2"} | ({} if positions is None else {"n_positions": positions})
        (checkpoint_dir / "config.json").write_text(json.dumps(config))
        return encode_splits(
            examples_dir,
            checkpoint_dir,
            tmp_path / name,
            prompt=prompt,
            latent=latent,
            num_processes=num_processes,
        )

    return run


def bpe_tokenizer(merges: list[tuple[str, str]], normalizer=None) -> PreTrainedTokenizerFast:
    """A tokenizer of characters and merges that may cross lines."""
    tokens = [*"0123456789+?# \n", *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(("<unk>", "<eos>", *tokens))}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if normalizer is not None:
        core.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


# --- files ----------------------------------------------------------------------------------


def test_files_hold_the_three_parts_and_the_example_s_row(encode, tmp_path):
    encode()
    dataset = load_encoded(tmp_path / "encoded", "train")
    # ###: 3, +: 4, 0-9: 5-14, ?: 15
    assert dataset[range(3)] == {
        "index": [0, 1, 2],
        "question_ids": [[6, 4, 7, 15], [6, 4, 7, 4, 7, 15], [10, 15]],
        "steps_ids": [[[8]], [[8], [10]], []],
        "answer_ids": [[3, 8, 2], [3, 10, 2], [3, 10, 2]],
    }
    assert sorted(path.name for path in (tmp_path / "encoded").iterdir()) == [
        "test.arrow",
        "train.arrow",
        "valid.arrow",
    ]


def test_files_are_memory_mapped(encode, tmp_path):
    encode()
    dataset = load_encoded(tmp_path / "encoded", "train")
    assert str(tmp_path / "encoded" / "train.arrow") in Path("/proc/self/maps").read_text()
    assert len(dataset) == 3


def many_examples(num: int) -> list[Example]:
    return [Example(f"{i % 7} + {i % 3} ?", [str(i % 10)] * (i % 4), str(i % 10)) for i in range(num)]


def test_the_number_of_processes_does_not_change_a_byte(encode, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "ROWS_PER_PROCESS", 700)
    metrics = [encode(many_examples(2500), num_processes=num, name=f"by-{num}") for num in (1, 3)]
    assert metrics[0] == metrics[1]
    for name in ("train.arrow", "valid.arrow"):
        assert (tmp_path / "by-1" / name).read_bytes() == (tmp_path / "by-3" / name).read_bytes()
    assert load_encoded(tmp_path / "by-3", "train")[range(2500)]["index"] == list(range(2500))


def test_encoding_again_gives_the_same_bytes(encode, tmp_path):
    encode(name="first")
    encode(name="second")
    assert (tmp_path / "first" / "train.arrow").read_bytes() == (tmp_path / "second" / "train.arrow").read_bytes()


def test_encoding_over_old_files_does_not_write_through_their_hard_links(encode, tmp_path):
    (tmp_path / "encoded").mkdir()
    (tmp_path / "cached").write_text("DVC's copy")
    (tmp_path / "encoded" / "train.arrow").hardlink_to(tmp_path / "cached")
    encode()
    assert (tmp_path / "cached").read_text() == "DVC's copy"
    assert len(load_encoded(tmp_path / "encoded", "train")) == 3


def test_an_output_folder_that_cannot_be_written_is_named(encode, tmp_path):
    (tmp_path / "encoded").write_text("a file")
    with pytest.raises(OSError, match=r"encoded: cannot be written .*; correct the permissions of"):
        encode()


def test_a_base_that_was_not_made_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"base/config\.json: no such file; run the base stage first: dvc repro base"):
        encode_splits(tmp_path, tmp_path / "base", tmp_path, prompt="plain", latent=LATENT, num_processes=1)


def test_an_empty_split_is_refused(encode):
    with pytest.raises(ValueError, match=r"train\.jsonl: no example in it, wanted at least one; run the preprocess"):
        encode([])


# --- metrics --------------------------------------------------------------------------------


def test_metrics_count_tokens_by_part(encode):
    assert encode()["train"] == {
        "num_examples": 3,
        "num_too_long": 0,
        "num_chains_too_long": 0,
        "decoded_differs_share": 0.0,
        "joined_differs_share": 0.0,
        "question_tokens_mean": 4.0,
        "question_tokens_max": 6,
        "steps_tokens_mean": 1.0,
        "steps_tokens_max": 2,
        "answer_tokens_mean": 3.0,
        "answer_tokens_max": 3,
        "view_tokens_max": 11,
    }


def test_tokens_that_would_span_two_parts_are_a_share(encode):
    r"""`\n3` is one token of the whole text; as parts, the line break ends one and `3` opens the next."""
    metrics = encode(tokenizer=bpe_tokenizer([("\n", "3")]))["train"]
    assert (metrics["joined_differs_share"], metrics["decoded_differs_share"]) == (2 / 3, 0.0)


def test_text_that_does_not_come_back_is_a_share(encode):
    metrics = encode(tokenizer=bpe_tokenizer([], normalizers.Replace("2", "1")))["train"]
    assert (metrics["joined_differs_share"], metrics["decoded_differs_share"]) == (0.0, 2 / 3)


def test_lost_white_space_is_no_difference(encode):
    assert encode([Example("1  +   2 ?", ["3"], "3")])["train"]["decoded_differs_share"] == 0.0


NAMES = [Example("Tom knows Ann. Who is reached from Tom, Ann or Max?", ["Ann"], "Ann")]


def test_names_that_are_several_tokens_are_warned_of(encode, log_lines):
    """A vocabulary of whole words has `Ann.` beside `Ann`; one of characters has three tokens for it."""
    whole_words = build_word_tokenizer([f"{NAMES[0].question} Ann ###"])
    encode(NAMES, held_out=NAMES, tokenizer=whole_words, name="words")
    (warning,) = log_lines
    assert "train.jsonl: every step is a name, but 1 of 1 names, such as 'Ann', are several tokens" in warning
    assert warning.endswith("take a model that has these names (SmolLM2), or edges: words")
    core = Tokenizer(models.BPE({"<eos>": 0, **{c: n for n, c in enumerate(map(chr, range(128)), 1)}}, []))
    encode(NAMES, held_out=NAMES, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>"))
    assert len(log_lines) == 2


@pytest.mark.parametrize("kind", ["one token each", "steps of several words", "numbers"])
def test_other_steps_and_names_of_one_token_are_not_warned_of(encode, log_lines, kind):
    words = build_word_tokenizer(["Tom knows Ann . Who is reached from , or Max ? ### and 3"])
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    steps = {"one token each": ["Ann"], "steps of several words": ["Ann and Max"], "numbers": ["3"]}[kind]
    examples = [Example(NAMES[0].question, steps, "Ann")]
    encode(examples, held_out=examples, tokenizer=words)
    assert log_lines == []


# --- too long -------------------------------------------------------------------------------

ROW = EncodedExample([0] * 10, [[0] * 5, [0], [0] * 4], [0] * 3)


@pytest.mark.parametrize(
    ("c_thought", "max_latent_stage", "markers", "num_tokens"),
    [
        (0, 0, False, 10 + 10 + 3),
        (1, 3, False, 10 + 10 + 3),  # no stage is longer than the chain of thought
        (1, 3, True, 10 + 2 + 10 + 3),
        (2, 3, False, 10 + 10 + 3),  # stage 2: 4 thoughts for 6 tokens
        (6, 1, False, 10 + (6 + 5) + 3),  # stage 1: 6 thoughts for 5 tokens
        (6, 3, False, 10 + 18 + 3),  # stage 3: nothing but thoughts
        (6, 5, False, 10 + 30 + 3),  # as many thoughts as at stage 5, in rows of three steps too
    ],
)
def test_the_longest_view_is_over_all_stages(c_thought, max_latent_stage, markers, num_tokens):
    latent = replace(LATENT, c_thought=c_thought, max_latent_stage=max_latent_stage, markers=markers)
    assert longest_view(ROW, common_layouts(latent)) == num_tokens


def test_examples_that_do_not_fit_are_left_out_counted_and_named(encode, tmp_path, log_lines):
    long = [Example(" ".join(["1"] * 60) + " ?", [], "1"), Example(" ".join(["1"] * 70) + " ?", [], "1")]
    metrics = encode([EXAMPLES[0], long[0], EXAMPLES[1], long[1]])["train"]
    assert (metrics["num_examples"], metrics["num_too_long"], metrics["view_tokens_max"]) == (2, 2, 11)
    assert load_encoded(tmp_path / "encoded", "train")[range(2)]["index"] == [0, 2]
    warning = next(line for line in log_lines if "left out" in line)
    assert "train.jsonl: 2 of 4 examples have views longer than the model's 64 positions" in warning
    assert "left out: line 2 (66), line 4 (76)" in warning


@pytest.mark.parametrize("markers", [False, True])
def test_an_evaluation_keeps_a_question_whose_gold_chain_does_not_fit(encode, tmp_path, markers):
    """Without markers the longest prompt has 2 slots, and the answer takes 3 of the 64 positions."""
    long_chain = Example("1 + 2 ?", ["3"] * 70, "3")
    fits = Example(" ".join(["1"] * (58 - 2 * markers)) + " ?", ["3"] * 9, "3")
    too_long = Example(" ".join(["1"] * (59 - 2 * markers)) + " ?", [], "3")
    rows = [EXAMPLES[0], long_chain, fits, too_long]
    latent = replace(LATENT, markers=markers)
    metrics = encode(EXAMPLES, held_out=rows, latent=latent)
    for split in ("valid", "test"):
        assert load_encoded(tmp_path / "encoded", split)[range(3)]["index"] == [0, 1, 2]
        assert (metrics[split]["num_examples"], metrics[split]["num_too_long"]) == (3, 1)
        assert metrics[split]["num_chains_too_long"] == 2
    assert encode(rows, latent=latent, name="trained")["train"]["num_too_long"] == 3


def test_a_view_as_long_as_the_positions_fits(encode):
    question = " ".join(["1"] * 58) + " ?"
    assert encode([Example(question, [], "1")])["train"]["num_too_long"] == 0
    assert encode([Example(question, [], "1")], name="again")["train"]["view_tokens_max"] == 64


def test_a_model_with_too_few_positions_is_an_error(encode):
    with pytest.raises(
        ValueError,
        match=r"train\.jsonl: 3 of 3 examples have views longer than the model's 6 positions \(the longest has 11"
        r" tokens\), wanted most of them to fit; take a model with more positions",
    ):
        encode(positions=6)


def test_a_model_without_a_limit_takes_everything(encode):
    assert encode([Example("1 " * 5000 + "?", [], "1")], positions=None)["train"]["question_tokens_max"] == 5001


def test_more_thoughts_leave_less_room(encode):
    question = " ".join(["1"] * 56) + " ?"
    assert encode([Example(question, [], "1"), *EXAMPLES])["train"]["num_too_long"] == 0
    more = replace(LATENT, c_thought=3)
    assert encode([Example(question, [], "1"), *EXAMPLES], latent=more, name="more")["train"]["num_too_long"] == 1


# --- unknown words --------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(
    "example",
    [Example("1 + 2 zwei ?", ["3"], "3"), Example("1 ?", ["3", "zwei"], "3"), Example("1 ?", [], "zwei")],
    ids=["question", "step", "answer"],
)
def test_an_unknown_word_names_the_example_and_the_word(example, num_processes, encode, monkeypatch):
    monkeypatch.setattr(encoder, "ROWS_PER_PROCESS", 2)
    with pytest.raises(ValueError, match=r"train\.jsonl:3: 'zwei' is unknown to the model's tokenizer; wanted words"):
        encode([*EXAMPLES[:2], example, example], num_processes=num_processes)


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("token", ["<eos>", "<unk>", "<|latent|>"])
def test_text_that_spells_a_special_token_names_the_example(token, num_processes, encode, monkeypatch):
    monkeypatch.setattr(encoder, "ROWS_PER_PROCESS", 2)
    example = Example("1 ?", [], f"1 {token}")
    with pytest.raises(ValueError, match=rf"train\.jsonl:3: holds {re.escape(token)}, a special token"):
        encode([*EXAMPLES[:2], example, example], num_processes=num_processes)


# --- real files -----------------------------------------------------------------------------


@pytest.mark.skipif(not DATA_DIR.is_dir(), reason="needs the real files of ../shared/data")
def test_prosqa_survives_a_word_tokenizer_whole(encode):
    fields = json.loads((DATA_DIR / "prosqa_valid.json").read_text(encoding="utf-8"))
    examples = [Example(row["question"], row["steps"], row["answer"]) for row in fields]
    texts = [text for row in examples for text in (row.question, *row.steps, row.answer)]
    tokenizer = build_word_tokenizer([*texts, "### 0 1 2 3 5 + ?"])
    metrics = encode(examples, tokenizer=tokenizer, positions=1024)["train"]
    assert metrics["num_examples"] == 300
    assert (metrics["decoded_differs_share"], metrics["joined_differs_share"]) == (0.0, 0.0)
