"""The table of pairs in docs/answers.md, and numbers written in many ways."""

import re
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.evaluation.answers import Comparison, extract_answer, same_answer

PAGE = (Path(__file__).parents[1] / "docs/answers.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `")]
PAIRS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no|one way) \|$", PAGE, re.MULTILINE)
BOTH_WAYS = {"yes": (True, True), "no": (False, False), "one way": (True, False)}


def rule(pair: tuple[str, str, str]) -> Comparison:
    return "digits" if "| `{}` | `{}` | {} |".format(*pair) in PAGE.partition("\n## Digit strings")[2] else None


def test_every_row_of_the_page_is_read():
    assert len(PAIRS) == len(ROWS) > 250
    assert len(set(PAIRS)) == len(PAIRS)


def test_the_page_says_what_is_equal():
    verdicts = {pair: (same_answer(*pair[:2], rule(pair)), same_answer(*pair[1::-1], rule(pair))) for pair in PAIRS}
    assert [pair for pair in PAIRS if verdicts[pair] != BOTH_WAYS[pair[2]]] == []


def test_the_page_holds_for_answers_that_are_extracted():
    pairs = [pair for pair in PAIRS if "#" not in pair[0] + pair[1]]
    extracted = {pair: extract_answer(f"<<1+1=2>>\n### {pair[0]}\nso") for pair in pairs}
    assert [pair for pair in pairs if same_answer(extracted[pair], pair[1], rule(pair)) != BOTH_WAYS[pair[2]][0]] == []


def whole_and_rest(number: Decimal) -> tuple[int, Fraction]:
    return divmod(abs(Fraction(number)), 1)


def mixed(number: Decimal, form: str) -> str:
    whole, rest = whole_and_rest(number)
    sign = "-" if number < 0 else ""
    return sign + form.format(whole, rest.numerator, rest.denominator) if whole and rest else f"{number:f}"


FORMS = {
    "plain": lambda number: f"{number:f}",
    "thousands": lambda number: f"{number:,f}",
    "thin spaces": lambda number: f"{number:,f}".replace(",", "\u2009"),
    "sign": lambda number: f"{number:+f}",
    "minus sign": lambda number: f"{number:f}".replace("-", "\u2212"),
    "decimals": lambda number: f"{number:.12f}",
    "no zero in front": lambda number: re.sub(r"^(-?)0\.(?=\d)", r"\1.", f"{number:f}"),
    "exponent": lambda number: f"{number:e}",
    "large exponent": lambda number: f"{number:E}",
    "times ten": lambda number: f"{number:e}".replace("e", " x 10^"),
    "latex times ten": lambda number: re.sub(r"e(.+)", r" \\times 10^{\1}", f"{number:e}"),
    "fraction": lambda number: f"{Fraction(number).numerator}/{Fraction(number).denominator}",
    "doubled fraction": lambda number: f"{2 * Fraction(number).numerator} / {2 * Fraction(number).denominator}",
    "mixed": lambda number: mixed(number, "{} {}/{}"),
    "latex mixed": lambda number: mixed(number, r"{}\frac{{{}}}{{{}}}"),
    "fullwidth": lambda number: f"{number:f}".translate({ord("0") + digit: 0xFF10 + digit for digit in range(10)}),
}
FRAMES = [
    "{}",
    " {} ",
    "({})",
    "**{}**",
    "*{}*",
    "${}$",
    r"\({}\)",
    r"\boxed{{{}}}",
    r"$\boxed{{\text{{{}}}}}$",
    '"{}"',
    "`{}`",
]
STATEMENTS = ["{}", "{}.", "{}!", "= {}", "x = {}"]
UNITS = ["{}", "{} eggs", "{} km/h", "{}%", "€ {}", "{} dollars", "{} m²"]
numbers = st.builds(
    lambda digits, places: Decimal(digits).scaleb(-places), st.integers(-(10**7), 10**7), st.integers(0, 5)
)


@st.composite
def two_numbers(draw) -> tuple[Decimal, Decimal]:
    """Two numbers that are often equal, and otherwise often differ in sign, in scale, or by one in the last place."""
    one = draw(numbers)
    near = [one, -one, one * 10, one / 10, one + 1, one + one.scaleb(-6), Decimal(str(one)[::-1].strip("-.e") or 0)]
    return one, draw(st.sampled_from([one, *near]) | numbers)


@settings(max_examples=500)
@given(
    two_numbers(),
    st.tuples(st.sampled_from(list(FORMS)), st.sampled_from(FRAMES), st.sampled_from(STATEMENTS)),
    st.tuples(st.sampled_from(list(FORMS)), st.sampled_from(FRAMES), st.sampled_from(STATEMENTS)),
    st.sampled_from(UNITS),
)
def test_numbers_in_all_their_forms_are_equal_exactly_when_their_values_are(pair, found_way, gold_way, unit):
    (found_form, found_frame, found_statement), (gold_form, gold_frame, gold_statement) = found_way, gold_way
    found = found_frame.format(found_statement.format(unit.format(FORMS[found_form](pair[0]))))
    gold = gold_frame.format(gold_statement.format(FORMS[gold_form](pair[1])))
    assert same_answer(found, gold) == (pair[0] == pair[1]), (found, gold)
    assert same_answer(gold, found) == (pair[0] == pair[1]), (gold, found)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 10**6))
def test_needless_zeros_in_front_of_what_was_found_do_not_count(value, num_zeros, gold):
    assert same_answer("0" * num_zeros + str(value), str(gold)) == (value == gold)


@given(
    st.lists(st.integers(0, 10**4).map(str), min_size=2, max_size=5),
    st.sampled_from([" ", ", ", "-", " or ", "; ", " + ", " = "]),
)
def test_several_numbers_are_no_number(parts, separator):
    """Neither one of them, nor what they make when they are run together."""
    for gold in (*parts, "".join(parts).lstrip("0") or "0"):
        assert not same_answer(separator.join(parts), gold)


NUMBER_WORDS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen nineteen twenty ninety hundred thousand
million billion trillion zillion milliard lakh crore dozen score gross pair couple double triple half third quarter
fourth fifth sixth tenth twelfth thirteenth twentieth hundredth thousandth millionth time fold power factorial myriad
"""
PLURALS = """
zeros zeroes ones sixes nineteens twenties twentys halves halfs hundreths dozens grosses squares cubes roots
"""
OTHER_WORDS = """
plus minus less more fewer squared cubed or and to not no never over under above below about approximately off first
second-hand th st nd rd k bn x e i pi modulo mod divided times negative percentile half-hour each of
"""
WORDS = [*NUMBER_WORDS.split(), *(word + "s" for word in NUMBER_WORDS.split()), *PLURALS.split(), *OTHER_WORDS.split()]


@pytest.mark.parametrize("word", dict.fromkeys(WORDS))
def test_a_word_that_changes_the_number_is_no_unit(word):
    for found in (f"5 {word}", f"5 {word.title()}", f"5{word}", f"${5} {word}", f"5 {word} km", f"**5 {word}**."):
        assert not same_answer(found, "5"), found
        assert not same_answer("5", found), found


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("1e999999999", "10e999999998", True),
        ("1e999999999", "2e999999999", False),
        ("1e999999999", "1/3", False),
        ("1e-999999999", "0", False),
        ("1e9999999999", "1", False),
        ("9" * 100_000, "9" * 100_000 + ".0", True),
        ("9" * 100_000, "9" * 99_999 + "8", False),
        ("9" * 100_000 + "/3", "3" * 100_000, False),
        ("9" * 100_000 + "x", "5", False),
        ("0." + "0" * 100_000 + "1", "1e-100001", True),
        ("5 m\u0130llion", "5000000", False),  # A letter that Python takes for an i when it ignores case.
    ],
    ids=range(11),
)
@pytest.mark.timeout(20)
def test_absurd_numbers_are_compared_at_once(one, other, expected):
    assert same_answer(one, other) == same_answer(other, one) == expected


@pytest.mark.slow
@pytest.mark.timeout(60)  # Milliseconds; a pattern that tracks back would need many minutes.
@pytest.mark.parametrize(
    "junk",
    [
        *("#" * 200_000, "### " * 50_000, "1," * 100_000, "9 " * 100_000, "1,000" * 40_000, "1\u2009000" * 40_000),
        *("(" * 200_000, "(1)" * 60_000, "*" * 200_000, "*_" * 100_000, '"' * 200_001, "$1" * 100_000),
        *("\\text{" * 30_000, "\\boxed{" * 30_000 + "}" * 30_000, "\\frac{1}" * 30_000, "\\" * 200_000),
        *("5 " + "illion" * 30_000, "5 " + "teen" * 50_000, "5 " + "per " * 50_000, "5 km" + "/km" * 60_000),
        *("5 " + "s" * 200_000, "B) " * 60_000, "½" * 100_000, "²" * 100_000, "10^" * 60_000, "x = " * 50_000),
    ],
    ids=lambda junk: junk[:9],
)
def test_a_model_that_got_stuck_costs_no_time(junk):
    started = time.process_time()
    extract_answer(junk)
    same_answer(junk, "5")
    same_answer("### 5", junk)
    same_answer(junk + "x", junk)
    assert time.process_time() - started < 3


def test_a_thousand_answers_are_compared_in_a_tenth_of_a_second():
    pairs = [(f"### {found}", gold) for found, gold, _ in PAIRS * 4][:1000]
    seconds = []
    for _ in range(5):
        started = time.process_time()
        for found, gold in pairs:
            same_answer(extract_answer(found), gold)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.1
