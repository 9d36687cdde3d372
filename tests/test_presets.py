"""Presets: the published files whole, small files of each published form, and the rules of maps in params.yaml."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from loguru import logger

from coconut.config.extensions import find_presets
from coconut.config.field_map import Fields
from coconut.config.params import parse_params
from coconut.data.examples import Example
from coconut.data.preprocessing import preprocess
from coconut.data.presets.published import PRESETS
from coconut.evaluation.answers import extract_answer, same_answer
from test_fields import read, read_rows
from test_preprocess import file, generated
from test_sources import config, shared

ROOT = Path(__file__).parents[1]

# --- published files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_format", "name", "num_rows"),
    [
        ("gsm_hard", "gsm_hard.jsonl", 1319),
        ("svamp", "svamp.json", 1000),
        ("multiarith", "multiarith.jsonl", 600),
        ("aqua", "aqua_test.json", 254),
        ("gsm8k_platinum", "gsm8k_train.jsonl", 7473),
        ("gsm8k_aug", "gsm8k_aug_valid.txt", 500),
        ("gsm8k_aug", "gsm8k_aug_valid_canonical.json", 500),
        ("prosqa", "prosqa_valid.json", 300),
        ("multiplication", "mult_4x4_valid.txt", 1000),
    ],
)
def test_every_row_of_a_published_file_is_read_and_every_gold_is_right_by_itself(file_format, name, num_rows):
    reading = read(shared(name), file_format)
    assert (reading.num_rows, len(reading.examples), reading.malformed) == (num_rows, num_rows, {})
    wrong = [e.answer for e in reading.examples if not same_answer(extract_answer(f"### {e.answer}"), e.answer)]
    assert wrong == []


@pytest.mark.parametrize(
    ("file_format", "name", "key"),
    [
        ("gsm_hard", "gsm_hard.jsonl", "target"),
        ("svamp", "svamp.json", "Answer"),
        ("aqua", "aqua_test.json", "correct"),
    ],
)
def test_an_answer_of_a_published_file_stands_in_it_letter_by_letter(file_format, name, key):
    path = shared(name)
    literals = re.findall(rf'"{key}":\s*"?([^",}}\s]+)', path.read_text())
    answers = [example.answer for example in read(path, file_format).examples]
    assert answers == literals[-len(answers) :]


def test_a_map_of_gsm8k_gives_what_the_format_gives():
    path = shared("gsm8k_train.jsonl")
    assert read(path, "gsm8k_platinum") == read(path, "gsm8k")


def test_aqua_has_its_choices_below_the_question_and_sentences_as_steps():
    example = read(shared("aqua_test.json"), "aqua").examples[0]
    assert example.question.splitlines()[1:] == [
        *("A) 5(√3 + 1)", "B) 6(√3 + √2)", "C) 7(√3 \u2013 1)", "D) 8(√3 \u2013 2)", "E) None of these"),
    ]
    assert example.steps[1] == "Let the height of the building be h."


# --- published forms ------------------------------------------------------------------------

LABELLED = [{"label": "A", "text": "sea"}, {"label": "B", "text": "sand"}]
CHOICES = "What is dry?\nA) sea\nB) sand"
FORMS = [
    (
        "aqua",
        {"question": "How far?", "options": ["A)21", "B)21.5"], "rationale": "It is 21.\nAnswer: A", "correct": "A"},
        Example("How far?\nA) 21\nB) 21.5", ["It is 21.", "Answer: A"], "A"),
    ),
    (
        "asdiv",
        {"body": "Seven red.", "question": "How many?", "formula": "7+2=9", "answer": "9 (apples)"},
        Example("Seven red. How many?", [], "9"),
    ),
    ("asdiv", {"Body": "Seven red.", "Question": "How many?", "Answer": "9"}, Example("Seven red. How many?", [], "9")),
    ("asdiv_aug", {"question": "q", "answer": "So <<7+2=9>>9.\n#### 9"}, Example("q", ["<<7+2=9>>"], "9")),
    (
        "commonsense_qa",
        {"question": CHOICES, "cot": "Sand is dry. So it is B.", "answer": "B"},
        Example(CHOICES, ["Sand is dry.", "So it is B."], "B"),
    ),
    (
        "commonsense_qa",
        {"question": "What is dry?", "choices": {"label": ["A", "B"], "text": ["sea", "sand"]}, "answerKey": "B"},
        Example(CHOICES, [], "B"),
    ),
    (
        "commonsense_qa",
        {
            "question": {"stem": "What is dry?", "choices": LABELLED},
            "answerKey": "B",
        },
        Example(CHOICES, [], "B"),
    ),
    (
        "gsm8k_aug_nl",
        {"question": "q", "steps": ["He has 2.", "So 4."], "answer": "4"},
        Example("q", ["He has 2.", "So 4."], "4"),
    ),
    (
        "gsm8k_aug_nl",
        {"question": "q", "cot": "He has 2. So 4. ", "answer": "#### 4"},
        Example("q", ["He has 2.", "So 4."], "4"),
    ),
    (
        "gsm8k_platinum",
        {"question": "q", "answer": "So <<7+2=9>>9.\n#### 9", "cleaning_status": "consensus"},
        Example("q", ["<<7+2=9>>"], "9"),
    ),
    ("gsm_hard", {"input": "q", "code": "def solution():\n", "target": -9867630.0}, Example("q", [], "-9867630.0")),
    (
        "gsm_plus",
        {"question": "q", "answer": "18", "perturbation_type": "reversal"},
        Example("q", [], "18", "reversal"),
    ),
    ("multiarith", {"question": "q", "final_ans": "39"}, Example("q", [], "39")),
    ("multiarith", {"input": "q", "target": 39}, Example("q", [], "39")),
    ("strategy_qa", {"question": "q", "cot": "So. Yes.", "answer": True}, Example("q", ["So.", "Yes."], "true")),
    ("strategy_qa", {"qid": "1", "term": "t", "question": "q", "answer": False}, Example("q", [], "false")),
    (
        "svamp",
        {"Body": "Tom has 2", "Question": "How many?", "Equation": "2", "Answer": "2.0", "question_concat": "other"},
        Example("Tom has 2 How many?", [], "2.0"),
    ),
    ("svamp", {"question_concat": "Tom has 2 How many?", "Answer": 2.0}, Example("Tom has 2 How many?", [], "2.0")),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "row", "example"), FORMS)
def test_a_row_of_each_published_form(tmp_path, preset, row, example):
    assert read_rows(tmp_path, [row, row], preset, None).examples == [example, example]


def test_every_preset_is_a_name_of_the_schema_is_tested_in_each_form_and_stands_in_the_docs():
    assert set(PRESETS) == set(find_presets()) == {preset for preset, _, _ in FORMS}
    assert all(sum(preset == name for name, _, _ in FORMS) >= len(maps) for preset, maps in PRESETS.items())
    table = (ROOT / "docs/data.md").read_text()
    assert [
        preset for preset in PRESETS if not re.search(rf"^\| `{preset}` \*? ?\| `[\w-]+/[\w.-]+`", table, re.M)
    ] == []


def test_the_kind_without_an_answer_is_left_out_of_gsm_plus_and_another_kind_can_be_chosen(tmp_path):
    answers = {"reversal": "1", "critical thinking": "None", "digit expansion": "2"}
    rows = [{"question": kind, "answer": answer, "perturbation_type": kind} for kind, answer in answers.items()]
    assert [e.question for e in read_rows(tmp_path, rows, "gsm_plus", None).examples] == ["reversal", "digit expansion"]
    chosen = Fields(where={"perturbation_type": "digit expansion"})
    assert [e.answer for e in read_rows(tmp_path, rows, "gsm_plus", chosen).examples] == ["2"]


def test_two_answers_of_asdiv_are_refused(tmp_path):
    rows = [{"body": "b", "question": "q", "answer": answer} for answer in ("9 (boys)", "7 (boys); 5 (girls)")]
    assert read_rows(tmp_path, rows, "asdiv", None, skip=True).malformed == {"several answers": 1}


def test_a_preset_on_another_set_names_the_field_and_the_format(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"fields\.question: no row has the field 'question_concat'.*data\.tests\.test\.format \(svamp\)",
    ):
        read_rows(tmp_path, [{"question": "q", "answer": 1}], "svamp", None)


# --- preprocessing --------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    train = [{"question": f"t{i}", "steps": ["s"], "answer": "1"} for i in range(3)]
    test = [{"input": f"q{i}", "target": i, "kind": "ab"[i % 2]} for i in range(5)]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, [*test, {"input": "t0", "target": 1, "kind": "a"}])))
    source = file("test.jsonl", "gsm_hard", fields=Fields(where={"kind": "a"}))
    return replace(
        config(tmp_path, source), train=file("train.json"), valid=file("test.jsonl", "gsm_hard", start=1, rows=1)
    )


@pytest.fixture
def warnings():
    messages: list[str] = []
    handler = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(handler)


def test_what_a_filter_leaves_out_is_counted_and_answer_only_splits_are_no_surprise(data, tmp_path, warnings):
    metrics = preprocess(data, tmp_path / "out", tmp_path / "out.json")
    assert (metrics["test"]["rows_read"], metrics["test"]["kept"]) == (6, 4)
    assert metrics["test"]["dropped"] == {"left out by where": 2}
    assert metrics["test"]["steps_per_example"] == {"0": 4}
    assert metrics["train"]["dropped"] == {"in_test": 1, "in_valid": 0}
    assert warnings == []


def test_a_form_without_steps_is_a_surprise_in_train_only(data, tmp_path, warnings):
    rows = [{"question": f"c{i}", "choices": ["x", "y"], "answerKey": "B"} for i in range(4)]
    (tmp_path / "csqa.json").write_text(json.dumps(rows))
    source = file("csqa.json", "commonsense_qa", rows=2)
    preprocess(replace(data, tests={"test": source}), tmp_path / "out", tmp_path / "out.json")
    assert warnings == []
    preprocess(
        replace(data, train=replace(source, start=2), tests={"test": source}), tmp_path / "out", tmp_path / "out.json"
    )
    assert len(warnings) == 1
    assert warnings[0].startswith("train: not one example has a step in csqa.json as format commonsense_qa reads it")


# --- rules ----------------------------------------------------------------------------------

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def params(split, source, method=None):
    tree = deepcopy(PARAMS)
    (tree["data"]["tests"] if split == "test" else tree["data"])[split] = source
    if method is not None:
        entry = {"parent": "base", "method": method, "latent_stage": 0, "epochs": 1, "lr": 1.0e-3}
        tree["curriculum"] = {
            "only": entry | ({"icot_tokens_per_epoch": 1, "icot_smoothing": 4} if method == "icot" else {})
        }
    return parse_params(tree)


def mapped(**fields):
    return {"format": "fields", "file": "x.csv", "fields": {"question": "q", "answer": "a"} | fields}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"format": "fields", "file": "x"}, "data.tests.test.fields.question: missing; name the field that holds it"),
        ({"format": "fields", "file": "x", "fields": {"question": "q"}}, "data.tests.test.fields.answer: missing"),
        ({"format": "fields", "fields": {"question": "q", "answer": "a"}}, "wanted exactly one of file"),
        ({"format": "canonical", "file": "x", "fields": {}}, "data.tests.test.fields: found beside format canonical"),
        ({"format": "svmap", "file": "x"}, "did you mean svamp?"),
        (mapped(qestion="x"), "data.tests.test.fields.qestion: unknown key"),
        (mapped(question="{q"), "data.tests.test.fields.question: found '{q', where the { at character 1"),
        (mapped(answer=["a"]), "data.tests.test.fields.answer: found ['a'] (a list)"),
        (mapped(steps="s", split_steps="lines"), "data.tests.test.fields.split_steps: found 'lines', wanted one of"),
        (mapped(split_steps="list"), "data.tests.test.fields.split_steps: found list, but steps is none"),
        (mapped(steps="s", split_steps="separator"), "data.tests.test.fields.separator: wanted beside split_steps"),
        (mapped(steps="s", separator="|"), "data.tests.test.fields.separator: wanted beside"),
        (mapped(steps="s", split_steps="separator", separator=""), "data.tests.test.fields.separator: found an empty"),
        (mapped(answer_after=""), "data.tests.test.fields.answer_after: found an empty text"),
        (mapped(steps="{s} {t}"), "data.tests.test.fields.steps: found the template"),
        (mapped(answer_as="text"), "data.tests.test.fields.answer_as: only beside choices"),
        (mapped(choices="c", booleans="yes_no"), "data.tests.test.fields.booleans: not beside choices"),
        (mapped(choices="{c}.d."), "data.tests.test.fields.choices: found '{c}.d.'"),
        (mapped(where={1: "x"}), "data.tests.test.fields.where: key 1 is a number, wanted the name of a field"),
        (mapped(where={"a..b": "x"}), "data.tests.test.fields.where: found 'a..b'"),
    ],
)  # fmt: skip
def test_a_wrong_map_is_an_error_before_anything_is_read(source, message):
    with pytest.raises(ValueError, match=r"data\.test") as caught:
        params("test", source)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["cot", "coconut", "no_thoughts", "pause_as_thought", "icot"])
@pytest.mark.parametrize("source", [mapped(), {"format": "svamp", "file": "x"}, mapped(steps="none")])
def test_a_train_split_without_steps_is_refused_for_methods_that_train_on_them(source, method):
    with pytest.raises(
        ValueError, match=rf"data\.train\.fields\.steps: none .*curriculum\.only trains by method {method}"
    ):
        params("train", source, method)


@pytest.mark.parametrize(
    ("split", "source", "method"),
    [
        ("train", mapped(), "no_cot"),
        ("train", mapped(), "pause"),
        ("train", mapped(steps="s"), "coconut"),
        ("train", {"format": "aqua", "file": "x"}, "coconut"),
        ("train", {"format": "svamp", "file": "x", "fields": {"steps": "E", "split_steps": "chain"}}, "coconut"),
        ("valid", mapped(), "coconut"),
        ("test", mapped(), "coconut"),
    ],
)
def test_a_split_without_steps_is_allowed_where_no_step_is_trained_on(split, source, method):
    assert params(split, source, method).data.splits[split].format == source["format"]


@pytest.mark.usefixtures("data")
def test_generated_and_mapped_splits_may_be_mixed(tmp_path):
    tree = params("test", {"format": "gsm_hard", "file": "test.jsonl"}).data
    mixed = replace(tree, raw_dir=str(tmp_path), train=generated(5), valid=generated(2))
    assert preprocess(mixed, tmp_path / "out", tmp_path / "out.json")["test"]["kept"] == 6
