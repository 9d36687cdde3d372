"""The answer in a generated text, and whether it says the same as the right one."""

import re
from decimal import Decimal
from fractions import Fraction

from coconut.data.examples import find_answer_line

_MINUS = {ord(sign): "-" for sign in "\u2212\u2013\ufe63\uff0d"}
_QUOTES = {ord("\u2018"): "'", ord("\u2019"): "'", ord("\u201c"): '"', ord("\u201d"): '"'}

# A comma between groups of three digits, the first of one to three: `5,000` and `1,234,567.5`,
# but neither the list `1, 2` nor `1,23`.
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")

_DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<currency>[$€£¥]?)\s?(?P<inner>[-+]?)"
    rf"(?P<number>{_DECIMAL})(?:\s?/\s?(?P<denominator>[0-9]+))?"
    # `[^\W\d_]` is a letter of any alphabet.
    r"\s?(?P<unit>%|[$€£¥¢]|°?(?:[^\W\d_]+[²³]?(?:[/ ][^\W\d_]+[²³]?)?)|)"
)
_SPACED_DIGITS = re.compile(r"[0-9](?: [0-9])+")
_PADDED_DIGITS = re.compile(r"0[0-9]+")

_UNIT_NAMES = {"dollar": "$", "usd": "$", "euro": "€", "pound": "£", "cent": "¢", "percent": "%", "per cent": "%"}
_SCALES = frozenset(
    [
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "dozen",
        "k",
        "m",
        "bn",
        "half",
        "and",
        "or",
        "to",
        "x",
        "e",
    ]
)
"""Words that change the value, so that they are no unit: `5 million` is not 5."""


def extract_answer(text: str) -> str | None:
    r"""Find the answer in what a model generated; None when there is none.

    The answer is the first line after the last marker; for markers see `find_answer_line`. So an answer
    may itself hold a `#`. White space is folded and thousands commas are removed.

    Pass the generated text only: a question may hold a `#` of its own.

    >>> extract_answer("<<2*2500=5000>>\n### 5,000")
    '5000'
    >>> extract_answer("### Room #5")
    'Room #5'
    >>> extract_answer("the answer is 5") is None
    True
    """
    line = find_answer_line(text)
    return None if line is None else _remove_thousands_commas(line)


def same_answer(found: str | None, gold: str) -> bool:
    """Whether `found` says the same as `gold`; None never does.

    Compared, in this order, as

    * digit strings, where either is digits set apart (`5 5 6 0`, the multiplication sets) or starts
      with a needless 0: white space is folded, every digit counts, zeros at either end included;
    * quantities: exact values, so `18.0` is 18 and `.5` is 0.5; a unit counts only where both have one;
    * words: case, white space and a full stop at the end do not count.

    >>> same_answer("$5,000.00", "5000"), same_answer("0 4 1", "4 1"), same_answer("TRUE.", "True")
    (True, False, True)
    """
    if found is None:
        return False
    found, gold = _plain(found), _plain(gold)
    if found == gold:
        return found != ""
    if _is_digit_string(found) or _is_digit_string(gold):
        return found.replace(" ", "") == gold.replace(" ", "")
    found_quantity, gold_quantity = _read_quantity(found), _read_quantity(gold)
    if found_quantity is None or gold_quantity is None:
        return False
    (found_value, found_unit), (gold_value, gold_unit) = found_quantity, gold_quantity
    return found_value == gold_value and (found_unit == gold_unit or not (found_unit and gold_unit))


def _fold(text: str) -> str:
    return " ".join(text.split())


def _remove_thousands_commas(text: str) -> str:
    return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)


def _plain(text: str) -> str:
    """Take away what never carries meaning: case, white space, typography, the last full stop."""
    plain = _fold(text).translate(_MINUS).translate(_QUOTES).casefold()
    return _remove_thousands_commas(plain.removesuffix(".").rstrip())


def _is_digit_string(plain: str) -> bool:
    return bool(_SPACED_DIGITS.fullmatch(plain) or _PADDED_DIGITS.fullmatch(plain))


def _read_quantity(plain: str) -> tuple[Fraction, str] | None:
    """Parse `-$1.50`, `3/4 cup`, `50%` into value and unit; None for anything else.

    Decimal reads the digits because int() refuses more than 4,300 of them, and a model that got
    stuck may well write more.
    """
    match = _QUANTITY.fullmatch(plain)
    if match is None or (match["sign"] and match["inner"]):
        return None
    if any(word in _SCALES for word in re.split("[ /]", match["unit"])):
        return None
    value = Fraction(Decimal(match["number"]))
    if match["denominator"]:
        divisor = Fraction(Decimal(match["denominator"]))
        if not divisor:
            return None
        value /= divisor
    if "-" in match["sign"] + match["inner"]:
        value = -value
    # Two letters and less are symbols: the "s" of seconds is no plural.
    unit = match["unit"].removesuffix("s") if len(match["unit"]) > 2 else match["unit"]
    return value, match["currency"] or _UNIT_NAMES.get(unit, unit)
