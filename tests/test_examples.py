"""Tests of the canonical form and its files."""

import pytest

from coconut.data.documents import parse_json
from coconut.data.examples import Example, is_scorable, read_examples, write_examples


def test_a_written_example_is_one_readable_line_with_its_keys_in_order(tmp_path):
    path = tmp_path / "train.jsonl"
    write_examples(path, [Example("“Ît” 2 + 2 ?", ["<<2+2=4>>"], "4"), Example("Why?", [], "so")])
    assert (
        path.read_bytes()
        == (
            '{"question": "“Ît” 2 + 2 ?", "steps": ["<<2+2=4>>"], "answer": "4"}\n'
            '{"question": "Why?", "steps": [], "answer": "so"}\n'
        ).encode()
    )


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "a\u2028b\u2029\x85c", 'quote " and \\', "\x00\x1b[31m", "\U0001f600 é é"]
)
def test_any_text_survives_writing_and_reading(tmp_path, text):
    examples = [Example(text, [text, "b"], text), Example("next", [], "line")]
    write_examples(tmp_path / "x.jsonl", examples)
    assert read_examples(tmp_path / "x.jsonl") == examples


def test_steps_given_as_a_list_or_a_tuple_make_equal_hashable_examples():
    assert Example("q", ["a"], "b") == Example("q", ("a",), "b")
    assert len({Example("q", ["a"], "b"), Example("q", ("a",), "b")}) == 1


@pytest.mark.parametrize(
    "line",
    ['{"question": "\\ud800", "steps": [], "answer": "b"}', '{"question": "a", "st', '{"quest": "a"}', '["a"]', ""],
)
def test_reading_a_changed_file_names_file_and_line(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "a", "steps": [], "answer": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:2: .*run the preprocess stage again"):
        read_examples(path)


def test_steps_given_as_a_text_are_refused_and_not_taken_letter_by_letter():
    with pytest.raises(ValueError, match=r"^steps: found the text '34', wanted a list of texts; put \[ \] around it$"):
        Example("1 + 2 + 1 ?", "34", "4")


@pytest.mark.parametrize("answer", ["yes\nsure", "C###", "###", "a\u2028b", "a\x85b", ".", " ", ""])
def test_an_answer_that_is_not_read_back_whole_is_not_scorable(answer):
    assert not is_scorable(answer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1" * 5000, "^it holds a whole number of more than 4300 digits, wanted fewer, or text$"),
        ("[" * 100_000, "^it is nested too deeply$"),
        ("{", "^Expecting property name"),
    ],
    ids=["digits", "nesting", "cut"],
)
def test_json_that_python_cannot_hold_is_said_in_our_words(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
