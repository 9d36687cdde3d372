"""The answer parser: literal pairs, every gold answer of the real files, and properties."""

import json
import random
import re
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.config.params import load_params
from coconut.config.schema import DataConfig, Source
from coconut.data.examples import is_scorable
from coconut.data.generators.multiplication import Multiplication
from coconut.data.sources import read_split
from coconut.evaluation.answers import extract_answer, same_answer
from coconut.evaluation.entry import find_rule

RAW_DIR = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<<1+1=2>>\n### 2", "2"),
        ("0 6 3 9 ### 9", "9"),
        ("### 2\n", "2"),
        ("###2", "2"),
        ("###\n2", "2"),
        ("<<2*2500=5000>> #### 5,000", "5000"),
        ("### 1,234,567.50", "1234567.50"),
        ("### $1,000", "$1000"),
        ("### 1, 2", "1, 2"),
        ("### 1,23", "1,23"),
        ("### Tom is a  lempus.", "Tom is a lempus."),
        ("### 5 5 6 0", "5 5 6 0"),
        ("### 4\n### 7", "7"),
        ("### 4 ### 7", "7"),
        ("### 18\n\nQuestion: how many?", "18"),
        ("### Room #5", "Room #5"),
        ("### C##", "C##"),
        ("so it is # 5", "5"),
        ("## 5", "5"),
    ],
)
def test_the_answer_is_the_first_line_after_the_last_marker(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["", "5", "the answer is 5", "<<1+1=2>>\n", "###", "### ", "### 5\n###", "###\n \n", "#"]
)
def test_no_answer_is_none_and_not_the_text(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    ("found", "gold"),
    [
        ("18", "18"),
        ("18.0", "18"),
        ("18.", "18"),
        ("18.00", "18.0"),
        (".5", "0.5"),
        ("0.50", ".5"),
        ("+5", "5"),
        ("-0", "0"),
        ("\u22123", "-3"),
        ("\u20133", "-3"),
        ("- 3", "-3"),
        ("-$5", "$-5"),
        ("5000", "5,000"),
        ("1,234,567.5", "1234567.50"),
        ("$18", "18"),
        ("$ 18.00", "18"),
        ("18 dollars", "$18"),
        ("50%", "50"),
        ("50 percent", "50%"),
        ("5 hours", "5"),
        ("5 hour", "5 hours"),
        ("60 km/h", "60"),
        ("1/2", ".5"),
        ("1" * 6000, "1" * 6000 + ".0"),
        ("tom is a  lempus", "Tom is a lempus."),
        ("true", "True"),
        ("TRUE.", "True"),
        ("\u2019tis", "'tis"),
        (" 5  5 6 0 ", "5 5 6 0"),
        ("25", "025"),
        ("-7", "-007"),
        ("0", "000"),
        ("3", "03.0"),
    ],
)
def test_two_spellings_of_one_answer_are_the_same(found, gold):
    assert same_answer(found, gold)
    assert same_answer(gold, found)


@pytest.mark.parametrize(
    ("found", "gold"),
    [
        (None, "5"),
        (None, ""),
        ("", ""),
        ("", "0"),
        (".", "0"),
        ("-18", "18"),
        ("1.8", "18"),
        ("1,8", "18"),
        ("180", "18"),
        ("18 19", "18"),
        ("18-19", "18"),
        ("3+4", "7"),
        ("1e1", "1"),
        ("nan", "inf"),
        ("0.1", "0.1000000000000000055511151231257827"),
        ("9007199254740993", "9007199254740992"),
        ("5/0", "5"),
        ("5 million", "5"),
        ("2 and a half", "2"),
        ("5 cm", "5 mm"),
        ("$5", "5 cents"),
        ("the answer is 5", "5"),
        ("True", "False"),
        ("Tom is a rempus.", "Tom is a lempus."),
        ("Tom is a lempus. Tom is a rempus.", "Tom is a lempus."),
        ("5 5 6", "5 5 6 0"),
        ("5 5 6 0 0", "5 5 6 0"),
        ("4 1", "0 4 1"),
        ("0 4 1", "4 1"),
        ("0 6 5 5", "5 5 6 0"),
        ("5 5 6 1", "5560"),
        ("5 5 . 6 0", "5 5 6 0"),
    ],
)
def test_two_answers_are_not_the_same(found, gold):
    assert not same_answer(found, gold)
    assert not found or not same_answer(gold, found)


@pytest.mark.parametrize(
    ("found", "gold", "wanted"),
    [
        *[("5560", "5 5 6 0", True), ("99", "9 9", True), ("0 4 1", "041", True), ("0 0", "00", True)],
        *[("12", "1 2", True), ("9 9", "99", True), ("41", "041", False), ("7", "007", False), ("07", "7", False)],
    ],
)
def test_only_a_rule_of_the_set_makes_every_digit_count(found, gold, wanted):
    assert same_answer(found, gold, "digits") is wanted
    assert same_answer(found, gold) is not wanted


SAMPLES = {
    "gsm8k_train.jsonl": ["72", "1,080", "109,200,000", "-7", "5,000"],
    "gsm8k_aug_valid.txt": ["300", ".5", "2.50", "27,200", "-3"],
    "gsm8k_aug_valid_canonical.json": ["300", "0.5", "2.5", "27,200"],
    "mult_4x4_valid.txt": ["5 5 6 0 8 2 0 1", "0 4 1 3 7 4 1 4", "0 0 8 1 8 4 5 0", "8 0 8 9 7 1 0 0"],
    "gsm_hard.jsonl": ["-9867630.0", "3244047.0999999996", "14053029.666666666", "2.0107e-06", "8.3099e-06"],
    "svamp.json": ["51.0", "1.0", "0.0", "1414.0"],
    "multiarith.jsonl": ["39", "8", "0"],
    "aqua_test.json": ["A", "B", "C", "D", "E"],
    "prosqa_valid.json": ["Tom is a lempus.", "Sally is a scrompus."],
    "prontoqa_5hop_raw.json": ["True", "False"],
}
"""A few gold answers of each published form, for where the files are not."""


def after_marker(text: str) -> str:
    return text.rsplit("####", 1)[1].strip()


def real_gold_answers() -> dict[str, list[str]]:
    """All gold answers of the published files; floats are kept as they are written there."""
    read = {name: (RAW_DIR / name).read_text(encoding="utf-8") for name in SAMPLES}
    lines = {
        name: [json.loads(line, parse_float=str) for line in text.splitlines()]
        for name, text in read.items()
        if name.endswith(".jsonl") or name == "aqua_test.json"
    }
    whole = {
        name: json.loads(text, parse_float=str)
        for name, text in read.items()
        if name.endswith(".json") and name not in lines
    }
    return {
        "gsm8k_train.jsonl": [after_marker(row["answer"]) for row in lines["gsm8k_train.jsonl"]],
        "gsm8k_aug_valid.txt": [after_marker(line) for line in read["gsm8k_aug_valid.txt"].splitlines()],
        "gsm8k_aug_valid_canonical.json": [str(row["answer"]) for row in whole["gsm8k_aug_valid_canonical.json"]],
        "mult_4x4_valid.txt": [after_marker(line) for line in read["mult_4x4_valid.txt"].splitlines()],
        "gsm_hard.jsonl": [str(row["target"]) for row in lines["gsm_hard.jsonl"]],
        "svamp.json": [str(row["Answer"]) for row in whole["svamp.json"]],
        "multiarith.jsonl": [str(row["target"]) for row in lines["multiarith.jsonl"]],
        "aqua_test.json": [row["correct"] for row in lines["aqua_test.json"]],
        "prosqa_valid.json": [row["answer"] for row in whole["prosqa_valid.json"]],
        "prontoqa_5hop_raw.json": [row["test_example"]["answer"] for row in whole["prontoqa_5hop_raw.json"].values()],
    }


@pytest.fixture(scope="module")
def gold_answers():
    if not RAW_DIR.is_dir():
        pytest.skip(f"the real data sets are not at {RAW_DIR}")
    return real_gold_answers()


NUM_ROWS = {
    "gsm8k_train.jsonl": 7473,
    "gsm8k_aug_valid.txt": 500,
    "gsm8k_aug_valid_canonical.json": 500,
    "mult_4x4_valid.txt": 1000,
    "gsm_hard.jsonl": 1319,
    "svamp.json": 1000,
    "multiarith.jsonl": 600,
    "aqua_test.json": 254,
    "prosqa_valid.json": 300,
    "prontoqa_5hop_raw.json": 400,
}


def assert_every_answer_is_accepted(answers: list[str]) -> None:
    for written in ("### {}", "<<1+1=2>>\n### {}", "step #1\n### {}\n", "### **{}**", "### \\boxed{{{}}}"):
        assert [gold for gold in answers if not same_answer(extract_answer(written.format(gold)), gold)] == []


def value_of(file: str, answer: str) -> Fraction | str:
    """What an answer means, by an oracle that knows each file's kind: numbers by value, digits and words as written."""
    is_number = file.startswith(("gsm", "svamp", "multiarith"))
    return Fraction(answer.replace(",", "")) if is_number else answer


def assert_no_answer_is_taken_for_another(file: str, answers: list[str]) -> None:
    for found in answers:
        for gold in answers:
            expected = value_of(file, found) == value_of(file, gold)
            assert same_answer(extract_answer("### " + found), gold) == expected, (file, found, gold)


@pytest.mark.parametrize("file", SAMPLES)
def test_sample_answers_of_every_published_form_are_accepted_and_told_apart(file):
    assert_every_answer_is_accepted(SAMPLES[file])
    assert_no_answer_is_taken_for_another(file, SAMPLES[file])


@pytest.mark.parametrize("file", NUM_ROWS)
def test_every_gold_answer_of_the_real_files_is_accepted(gold_answers, file):
    assert len(gold_answers[file]) == NUM_ROWS[file]
    assert_every_answer_is_accepted(gold_answers[file])


@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("gsm8k", "gsm8k_train.jsonl"),
        ("gsm8k_aug", "gsm8k_aug_valid.txt"),
        ("multiplication", "mult_4x4_valid.txt"),
        ("prosqa", "prosqa_valid.json"),
        ("prontoqa", "prontoqa_5hop_raw.json"),
    ],
)
def test_every_answer_that_our_readers_make_of_the_real_files_is_accepted(gold_answers, form, file):
    source = Source(form, file=file)
    data = DataConfig(0, str(RAW_DIR), source, source, {"test": source}, None, skip_bad_rows=False, max_train=None)
    examples = read_split(data, "test").examples
    assert len(examples) == len(gold_answers[file])
    assert all(
        same_answer(extract_answer(f"### {one.answer}"), gold)
        for one, gold in zip(examples, gold_answers[file], strict=True)
    )


@pytest.mark.parametrize("file", NUM_ROWS)
def test_no_gold_answer_of_the_real_files_is_taken_for_another(gold_answers, file):
    distinct = sorted(set(gold_answers[file]), key=lambda answer: value_of(file, answer))
    assert_no_answer_is_taken_for_another(file, distinct[::7][:150])
    for pair in pairwise(distinct):  # The nearest are the likeliest to be confused.
        assert_no_answer_is_taken_for_another(file, list(pair))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.decimals(allow_nan=False, allow_infinity=False))
def test_plain_numbers_are_the_same_exactly_when_their_values_are(number, other):
    found, gold = f"{number:f}", f"{other:f}"
    assert same_answer(extract_answer(f"### {found}"), found)
    assert same_answer(f"{number:,f}", found)
    assert same_answer(found, gold) == (number == other)


@given(st.text(alphabet="0123456789", min_size=2), st.text(alphabet="0123456789", min_size=2))
def test_spaced_digits_are_the_same_exactly_when_every_digit_is(found, gold):
    assert same_answer(" ".join(found), " ".join(gold)) == (found == gold)
    assert same_answer(found, " ".join(gold), "digits") == (found == gold)


DIGIT_STRING = re.compile(r"0?[0-9]+( [0-9]+)*")


@given(st.text(), st.text())
def test_any_text_is_read_without_a_crash_and_compares_the_same_both_ways(found, gold):
    extract_answer(found)
    if not (DIGIT_STRING.fullmatch(found.strip()) or DIGIT_STRING.fullmatch(gold.strip())):
        assert same_answer(found, gold) == same_answer(gold, found)


@given(st.from_regex(r"[^#\s]([^#\r\n\v\f\x1c-\x1e\x85\u2028\u2029]*[^#\s])?", fullmatch=True))
def test_an_answer_of_one_line_survives_being_written_and_extracted(gold):
    if re.fullmatch(r"\.*", gold):
        return  # Nothing but the full stop that does not count.
    assert same_answer(extract_answer(f"a step\n### {gold}"), gold)
    assert is_scorable(gold)


@given(st.text() | st.text(alphabet="#.,15 a\n\x1c\u2028-$"))
def test_every_answer_that_readers_accept_is_right_when_written(gold):
    assert same_answer(extract_answer(f"### {gold}"), gold) or not is_scorable(gold)


# --- tolerance ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "gold", "tolerance", "wanted"),
    [
        ("3244047.1", "3244047.0999999996", None, False),
        ("3244047.1", "3244047.0999999996", 1e-6, True),
        ("3244047.11", "3244047.0999999996", 1e-6, False),
        ("3.14159", "3.14", "decimals", True),
        ("3.145", "3.14", "decimals", True),
        ("3.1451", "3.14", "decimals", False),
        ("18.4", "18", "decimals", False),
        ("18.0", "18", "decimals", True),
        ("1/3", "0.33", "decimals", True),
        ("$3.141", "3.14 dollars", "decimals", True),
        ("3.141 km", "3.14 kg", "decimals", False),
        ("(B) 3.141", "(C) 3.14", 1.0, False),
        ("0 5 1", "0 5 2", 100.0, False),
        ("yes", "no", 1e9, False),
        ("1e999999999", "1.0", 1e300, False),
        ("1e999999999", "1e999999999", 1e-6, True),
        (None, "1", 1e9, False),
    ],
)
def test_a_tolerance_lets_numbers_differ_and_nothing_else(found, gold, tolerance, wanted):
    assert same_answer(found, gold, tolerance) is wanted


@pytest.mark.parametrize("seed", range(50))
def test_a_tolerance_is_a_distance_between_exact_values(seed):
    draw = random.Random(seed)
    gold, off, tolerance = (Decimal(draw.randint(-(10**9), 10**9)).scaleb(-draw.randint(0, 8)) for _ in range(3))
    tolerance = float(abs(tolerance) or Decimal(1))
    found = gold + off
    wanted = found == gold or abs(Fraction(found) - Fraction(gold)) <= Fraction(tolerance)
    assert same_answer(f"{found:f}", f"{gold:f}", tolerance) is wanted


MATHEMATICS = [
    *(r"\sqrt{51}", r"11\sqrt2", r"\left( 3, \frac{\pi}{2} \right)", "6+9i", "-2 + 7i", "3, 5, 7", "(3,4)", r"52_8"),
    *(r"\frac34", r"\dfrac{9}{7}", r"[-2,7]", r"(0,9)\cup(9,36)", r"1 \pm \sqrt{19}", r"10,\!080", r"\$18.90", "8\\%"),
    *(r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\text{(C)}", r"90^\circ", r"\sqrt[3]{4}", r"0.\overline{3}"),
    *(r"\left[ 0, \frac{1}{3} \right)", r"864 \mbox{ inches}^2", r"\{-1,0,1\}", r"e^{i\pi/3}", "x^3 - 6x^2 + 11x - 6"),
    *(r"\frac{\sqrt{3}+1}{2}", r"1\frac{4}{5}", r"x \in (-\infty,-4]", "(100,200)", r"\binom{10}{3}", ".35625"),
]


@pytest.mark.parametrize("gold", MATHEMATICS)
def test_a_gold_answer_of_mathematics_is_right_in_every_frame(gold):
    frames = [
        r"\boxed{%s}",
        "$%s$",
        "$ %s $",
        "$$%s$$",
        r"\( %s \)",
        r"$\boxed{%s}$.",
        r"$\displaystyle %s.$",
        "**%s**",
    ]
    for frame in frames:
        found = extract_answer("### " + frame % gold)
        assert same_answer(found, gold), frame
        assert same_answer(gold, found), frame


def test_no_gold_answer_of_mathematics_is_taken_for_another():
    pairs = [(one, other) for one in MATHEMATICS for other in MATHEMATICS if one != other]
    assert [pair for pair in pairs if same_answer(*pair)] == []


# --- rules of a set -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "gold", "wanted"),
    [
        ("x+1", "1 + x", True),
        (r"2\sqrt{2}", r"\sqrt8", True),
        (r"$\frac{2}{4}$", "0.5", True),
        (r"\boxed{\text{Evelyn}}", "Evelyn", True),
        ("East", "east", True),
        ("$5", "5", True),
        (r"\sqrt{2}", "2", False),
        ("(3,4)", "(4,3)", False),
        (None, "1", False),
    ],
)
def test_math_verify_judges_where_a_set_asks_for_it(found, gold, wanted):
    pytest.importorskip("math_verify")
    assert same_answer(found, gold, "math_verify") is wanted


def test_math_verify_that_is_not_installed_is_named_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"math-verify is not installed; run pip install -e '\.\[math\]'"):
        same_answer("x+1", "1+x", "math_verify")


def test_the_rule_of_a_set_is_its_own_or_that_of_multiplication():
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    generated, file = (
        Source("generated", rows=9, generator=Multiplication("multiplication", 4)),
        Source("multiplication"),
    )
    tests = {"plain": Source("canonical", file="a.json"), "mine": file, "far": generated, "math": Source("fields")}
    evaluate = replace(params.evaluate, answer_rules={"math": "math_verify", "mine": "marked"})
    params = replace(params, data=replace(params.data, tests=tests, valid=file), evaluate=evaluate)
    assert {split: find_rule(params, split) for split in params.data.splits} == {
        "train": None,
        "valid": "digits",
        "test": None,
        "tests/mine": "marked",
        "tests/far": "digits",
        "tests/math": "math_verify",
    }
