"""The answer in a generated text, and whether it says the same as the gold answer; docs/answers.md shows both."""

import re
from typing import Literal, NamedTuple

from coconut.data.examples import find_answer_line
from coconut.evaluation.markup import join_thin_groups, normalise, plain_markup, simplify, squeeze
from coconut.evaluation.mathematics import verify
from coconut.evaluation.quantities import Tolerance, read_quantity

Comparison = Tolerance | Literal["digits", "math_verify"]
"""How two answers are compared: as texts and quantities; digit by digit; or by the package math-verify."""
_DIGIT_STRING = re.compile(r"[0-9](?: ?[0-9])*")

_NUMBER = re.compile(r"-?[0-9]+\.?[0-9]*")

_OPTION = re.compile(
    r"(?:(?:option|choice|answer):? )?(?:(?P<bare>[a-j])|\((?P<round>[a-j])\)[:.]?|(?P<marked>[a-j])(?:[):]|\.(?= )))"
    r"(?:(?<!\w) ?(?P<content>.+))?",
    re.IGNORECASE,
)
_OTHER_OPTION = re.compile(r"\b(?:[A-J]|(?i:or|and|not|nor|no|but|if|is|isn't|are|wrong|incorrect|false|maybe))\b")
"""In what follows an option's letter: the text says more than which option it takes."""


def extract_answer(text: str) -> str | None:
    r"""Find the answer in what a model generated; None when there is none.

    The answer is the first line after the last marker; for markers see `find_answer_line`. So an answer
    may itself hold a `#`. White space is folded and separators of thousands are removed.

    Pass the generated text only: a question may hold a `#` of its own.

    >>> extract_answer("<<2*2500=5000>>\n### 5,000")
    '5000'
    >>> extract_answer("### Room #5")
    'Room #5'
    >>> extract_answer("the answer is 5") is None
    True
    """
    line = find_answer_line(join_thin_groups(text))
    return None if line is None else normalise(line)


def extract_last_number(text: str) -> str | None:
    """Find the last number in what a model generated, as the evaluations of CODI do; None when there is none.

    >>> extract_last_number("12 eggs cost 3,000.50. The answer is: -1,234.")
    '-1234'
    >>> extract_last_number("none") is None
    True
    """
    found = _NUMBER.findall(text.replace(",", ""))
    return found[-1].rstrip(".") if found else None


def same_answer(found: str | None, gold: str, comparison: Comparison = None) -> bool:
    """Compare an answer with the gold answer; None is never right.

    The first that applies decides:

    * the texts, without case, white space, Markdown and LaTeX;
    * with `digits`, a gold answer of digits, set apart or not: every digit counts, zeros at either end included;
    * options: their letters, so that `(B) 12 km` is B;
    * quantities: exact values, so that `18.0` is 18 and `1/2` is 0.5, unless there is a tolerance; a unit counts only
      where both have one.

    With `math_verify`, only equal texts come before the judgement of that package.

    >>> same_answer("$5,000.00", "5000"), same_answer("25", "025"), same_answer("25", "025", "digits")
    (True, True, False)

    Raises:
        ValueError: math-verify is asked for and not installed.
    """
    if found is None:
        return False
    found, gold = normalise(found), normalise(gold)
    if not found or not gold:
        return False
    if found == gold:
        return True
    if squeeze(plain_markup(found)).casefold() == squeeze(plain_markup(gold)).casefold():
        return True
    if comparison == "math_verify":
        return found.casefold() == gold.casefold() or verify(found, gold)
    found, gold = simplify(found), simplify(gold)
    if comparison == "digits" and _DIGIT_STRING.fullmatch(gold):
        return found.replace(" ", "") == gold.replace(" ", "")
    tolerance = None if comparison == "digits" else comparison
    return _same_options(found, gold) or _same_values(found, gold, tolerance)


def _same_values(found: str, gold: str, tolerance: Tolerance) -> bool:
    if squeeze(found).casefold() == squeeze(gold).casefold():
        return True
    found_quantity, gold_quantity = read_quantity(found), read_quantity(gold)
    return found_quantity is not None and gold_quantity is not None and found_quantity.agrees(gold_quantity, tolerance)


class _Option(NamedTuple):
    letter: str
    content: str


def _read_option(text: str) -> _Option | None:
    match = _OPTION.fullmatch(text)
    if match is None or _OTHER_OPTION.search(match["content"] or ""):
        return None
    letter = match["bare"] or match["round"] or match["marked"]
    return _Option(letter.casefold(), match["content"] or "")


def _same_options(found: str, gold: str) -> bool:
    """Compare two options by letter; what stands after the letters counts only where it does after both."""
    found_option, gold_option = _read_option(found), _read_option(gold)
    if found_option is None or gold_option is None or found_option.letter != gold_option.letter:
        return False
    return not (found_option.content and gold_option.content) or _same_values(
        simplify(found_option.content), simplify(gold_option.content), None
    )
