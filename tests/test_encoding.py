"""The text form and its token ids."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from coconut.data.encoded import load_encoded
from coconut.data.encoding import EncodedExample, encode_batch, encode_example, encode_question, example_texts
from coconut.data.examples import MARKERS, Example
from coconut.data.tokenizer import build_word_tokenizer

EXAMPLE = Example("10 - 10 - 5 ?", ["0", "6"], "6")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def words():
    return build_word_tokenizer(["10 - 5 ?", "0 6", "### 6"])


def character_tokenizer(characters: str, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, so that ids can be read off the text; id = place in `characters` + 3."""
    vocabulary = {token: index for index, token in enumerate(("<unk>", "<s>", "</s>", *characters))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_an_example_becomes_its_three_parts(words):
    assert words.get_vocab() == {
        "<unk>": 0, "<pad>": 1, "<eos>": 2, "###": 3, "-": 4, "0": 5, "10": 6, "5": 7, "6": 8, "?": 9,
    }  # fmt: skip
    assert encode_example(words, EXAMPLE) == EncodedExample([6, 4, 6, 4, 7, 9], [[5], [8]], [3, 8, 2])


def test_each_part_ends_its_line_except_the_answer():
    tokenizer = character_tokenizer("ab#\n 1")
    assert encode_example(tokenizer, Example("ab", ["a", "b"], "1")) == EncodedExample(
        [3, 4, 6], [[3, 6], [4, 6]], [5, 5, 5, 7, 8, 2]
    )


def test_an_example_without_steps_has_two_parts(words):
    assert encode_example(words, Example("5 ?", [], "6")) == EncodedExample([7, 9], [], [3, 8, 2])


def test_the_begin_token_opens_the_question_only_where_the_tokenizer_adds_one():
    example = Example("a", ["b"], "1")
    plain, opened = character_tokenizer("ab#\n 1"), character_tokenizer("ab#\n 1", bos=True)
    assert encode_example(plain, example).question_ids == [3, 6]
    assert encode_example(opened, example) == EncodedExample([1, 3, 6], [[4, 6]], [5, 5, 5, 7, 8, 2])
    assert encode_question(opened, "a") == [1, 3, 6]


def test_a_question_alone_has_the_ids_it_has_in_an_example(words):
    assert encode_question(words, EXAMPLE.question) == encode_example(words, EXAMPLE).question_ids


def test_a_batch_equals_its_examples_one_by_one(words):
    examples = [EXAMPLE, Example("5 ?", [], "0"), Example("0 - 5 ?", ["6"], "6"), EXAMPLE]
    assert encode_batch(words, examples) == [encode_example(words, example) for example in examples]
    assert encode_batch(words, []) == []


def test_dropping_steps_leaves_the_other_ids_as_they_were():
    """What makes cutting steps off safe: no token spans two parts."""
    tokenizer = character_tokenizer("ab#\n 1")
    whole = encode_example(tokenizer, Example("a", ["a", "b"], "1"))
    assert encode_example(tokenizer, Example("a", ["b"], "1")) == whole._replace(steps_ids=whole.steps_ids[1:])


# --- chat -----------------------------------------------------------------------------------


def test_chat_puts_the_template_around_the_question_and_leaves_the_rest():
    tokenizer = character_tokenizer("ab#\n 1")
    tokenizer.chat_template = CHATML
    assert example_texts(tokenizer, Example("a b", ["b"], "1"), "chat") == [
        "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n",
        "b\n",
        "### 1",
    ]


def test_chat_ids_are_those_of_the_template():
    tokenizer = character_tokenizer("ab#\n 1", bos=True)
    tokenizer.chat_template = "[{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
    tokenizer.add_tokens(["[", "]", ">"])
    example = Example("a b", ["b"], "1")
    wanted = EncodedExample([9, 3, 7, 4, 10, 11], [[4, 6]], [5, 5, 5, 7, 8, 2])
    assert encode_example(tokenizer, example, "chat") == wanted, "no begin token: it is the template's business"
    assert encode_question(tokenizer, "a b", "chat") == wanted.question_ids


def test_chat_without_a_template_is_an_error_with_the_cure(words):
    with pytest.raises(ValueError, match=r"encode\.prompt: found 'chat', but .* no chat template; use 'plain'"):
        encode_example(words, EXAMPLE, "chat")


def test_todays_date_does_not_get_into_the_prompt(words):
    words.chat_template = "{{ date_string if date_string is defined else strftime_now('%d') }}"
    assert example_texts(words, EXAMPLE, "chat")[0] == "26 Jul 2024"


@pytest.mark.parametrize(
    ("template", "date"),
    [
        ("{{ strftime_now('%d %B %Y') }} {{ messages[0].content }}", "26 July 2024"),  # as in SmolLM 3
        ("Today's Date: {{ strftime_now('%B %d, %Y') }}.\n{{ messages[0].content }}", "July 26, 2024"),  # Granite
        ("{% set today = strftime_now('%Y-%m-%d') %}{{ today }}{{ messages[0].content }}", "2024-07-26"),  # Mistral
        ("{{ strftime_now('%H:%M:%S %s'[:8]) }}{{ messages[0].content }}", "00:00:00"),
        ("{% if not date_string is defined %}{% set date_string = 'no' %}{% endif %}{{ date_string }}", "26 Jul 2024"),
        ("{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}{{ d }}", "26 Jul 2024"),
    ],
)  # fmt: skip
def test_no_template_sees_the_clock(words, template, date):
    words.chat_template = template
    assert date in example_texts(words, EXAMPLE, "chat")[0]


def test_a_template_that_draws_at_random_gives_one_prompt(words):
    words.chat_template = "{{ messages[0].content }} {{ range(1000) | random }} {{ lipsum() }}"
    texts = {example_texts(words, EXAMPLE, "chat")[0] for _ in range(3)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "cannot be rendered .*: 'System role not supported'"),
        ("{{ messages[", "cannot be rendered for a question of the user: .unexpected"),
        ("{{ messages[7].content.x }}", "cannot be rendered for a question of the user: .*has no element 7"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered for a question of the user: .*unsafe"),
        ("{{ messages[0].append(1) }}", "cannot be rendered .*"),
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError: 'division by zero'"),
        ("{{ range(10 ** 9) | list }}", "fails with OverflowError: 'Range too big"),
        ("{% include 'other' %}", "fails with TypeError|cannot be rendered"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails with RecursionError"),
        ("{{ 'a' * 10 ** 7 }}", "makes a prompt of 10,000,000 characters of a question of 13"),
        ("{{ '\x1b[31m\u202e' ~ raise_exception('\x1b[31m\u202e') }}", r"'\\x1b\[31m\\u202e'"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_one_sentence_that_names_it(words, template, message):
    words.chat_template = template
    with pytest.raises(
        ValueError, match=f"its chat template .*{message}.*; use encode.prompt: plain, or correct"
    ) as error:
        encode_question(words, EXAMPLE.question, "chat")
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


def test_rendering_leaves_the_random_numbers_of_this_process(words):
    words.chat_template = "{{ messages[0].content }}{{ [1, 2] | random }}"
    random.seed(5)
    before = random.getstate()
    encode_question(words, EXAMPLE.question, "chat")
    assert before == random.getstate()


def test_a_template_that_leaves_the_question_out_is_said(words, log_lines):
    words.chat_template = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}."
    encode_question(words, EXAMPLE.question, "chat")
    assert [line for line in log_lines if "its chat template leaves the question out: '.'" in line]


# --- special tokens -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "example",
    [Example("5 <eos> ?", ["6"], "6"), Example("5 ?", ["6", "<eos>"], "6"), Example("5 ?", ["6"], "6<eos>")],
    ids=["question", "step", "answer"],
)
def test_a_text_that_spells_the_end_of_text_is_refused(example, words):
    with pytest.raises(ValueError, match=r"holds <eos>, a special token of the model's tokenizer, wanted plain text"):
        encode_example(words, example)


def test_a_question_cannot_end_its_own_turn_in_a_chat(words):
    words.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<tool>", special=False)])
    words.chat_template = "{{ messages[0].content }} <|im_end|>"
    assert encode_question(words, "5 <tool> ?", "chat")[-1] == words.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(ValueError, match=r"holds <\|im_end\|>, a special token"):
        encode_question(words, "5 <|im_end|> ?", "chat")


@pytest.mark.parametrize("marker", MARKERS)
def test_a_question_that_spells_a_marker_is_refused(marker, words):
    with pytest.raises(ValueError, match=r"question '5 .*: holds <\|.*latent\|>, a special token .* take it out"):
        encode_question(words, f"5 {marker} ?")
    with pytest.raises(ValueError, match=r"question '5 .*: holds <\|.*latent\|>, a special token .* take it out"):
        encode_example(words, Example(f"5 {marker} ?", ["6"], "6"))


def test_opening_what_was_not_encoded_names_the_file_and_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"train\.arrow: no such file; run the encode stage first: dvc repro encode"):
        load_encoded(tmp_path, "train")
