"""The answer in a generated text, and whether it says the same as the gold answer; docs/answers.md shows both."""

import re
from typing import NamedTuple

from coconut.data.examples import find_answer_line
from coconut.evaluation.markup import join_thin_groups, normalise, plain_markup, simplify, squeeze
from coconut.evaluation.quantities import Tolerance, read_quantity

_DIGIT_STRING = re.compile(r"[0-9](?: [0-9])+|0[0-9]+")
"""Digits set apart (`5 5 6 0`, the multiplication sets), or with a needless 0 in front."""

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


def same_answer(found: str | None, gold: str, tolerance: Tolerance = None) -> bool:
    """Compare an answer with the gold answer; None is never right.

    The first that applies decides:

    * the texts, without case, white space, Markdown and LaTeX;
    * digit strings, where `gold` is digits set apart (`5 5 6 0`, the multiplication sets) or starts with a
      needless 0: every digit counts, zeros at either end included;
    * options: their letters, so that `(B) 12 km` is B;
    * quantities: exact values, so that `18.0` is 18 and `1/2` is 0.5, unless there is a tolerance; a unit counts only
      where both have one.

    >>> same_answer("$5,000.00", "5000"), same_answer("0 4 1", "4 1"), same_answer("TRUE.", "True")
    (True, False, True)
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
    found, gold = simplify(found), simplify(gold)
    if _DIGIT_STRING.fullmatch(gold):
        return found.replace(" ", "") == gold.replace(" ", "")
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
