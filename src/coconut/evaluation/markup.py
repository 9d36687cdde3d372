"""Markdown, LaTeX and typography around answers: none of it carries meaning."""

import re
import unicodedata

from coconut.data.examples import fold
from coconut.evaluation.latex import plain_latex

# A comma between groups of three digits, the first of one to three: `5,000` and `1,234,567.5`,
# but neither the list `1, 2` nor `1,23`. After a bracket it may be a point: `(100,200)`.
_THOUSANDS = re.compile(r"(?<![\d.,(\[])[0-9]{1,3}(?:,[0-9]{3})+(?![\d,])")
# The same with no-break, thin and narrow no-break spaces. An ordinary space separates two numbers.
_THIN_THOUSANDS = re.compile(
    r"(?<![\d.,\xa0\u2009\u202f])[0-9]{1,3}(?:[\xa0\u2009\u202f][0-9]{3})+(?![\d\xa0\u2009\u202f])"
)

# Minus signs and the en dash; quotation marks; signs of division and multiplication.
_TYPOGRAPHY = str.maketrans(
    "\u2212\u2013\ufe63\uff0d\u2018\u2019\u201c\u201d\u2044\u2215\u00f7\u00d7\u00b7", "----''\"\"///xx"
)
_SUPERSCRIPT = re.compile(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_PLAIN_SUPERSCRIPT = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_FRACTIONS = {
    code: " " + unicodedata.normalize("NFKC", chr(code))
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189)
}
"""`¼` and its like, with a space that separates them from the whole part of a mixed number."""
_FOREIGN_DIGIT = re.compile(r"[^\D0-9]")

_BLANK = re.compile(r"(?<=[^\w\s.]) | (?=[^\w\s.])|(?<=[0-9]) (?=[^\W\d_]\b)")
_EMPHASIS = re.compile(r"(?<!\w)(\*\*|\$)(?=\S)([^*$]++)(?<=\S)\1(?!\w)")
"""Bold text and LaTeX's mathematics inside a line, but not the operator of `2**3**2` or the prices `$5 and $6`."""
_INSIDE = r"[^()\[\],]+|[^()\[\],\d]*[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])[^()\[\],]*"
_WRAPPED = re.compile(
    r"(?P<mark>(?P<sign>[*_$`\"'])(?P=sign)*+)(?P<marked>(?:(?!(?P=sign)).)++)(?P=mark)"
    # Brackets with a comma are a point or an interval, where the kind of bracket has a meaning; or a number.
    rf"|\((?P<round>{_INSIDE})\)|\[(?P<square>{_INSIDE})\]"
)


def join_thin_groups(text: str) -> str:
    """Remove no-break and thin spaces between groups of three digits; must come before white space is folded."""
    return text if text.isascii() else _THIN_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match.group()), text)


def normalise(text: str) -> str:
    """Fold white space and remove separators of thousands."""
    return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), fold(join_thin_groups(text)))


def simplify(text: str) -> str:
    r"""Reduce Markdown, LaTeX and typography to plain text; never to nothing.

    >>> simplify("**18!**"), simplify(r"\(\boxed{1\frac{1}{2}\text{ cups}}\)."), simplify("+½")
    ('18', '1 1/2 cups', '+ 1/2')
    """
    plain = plain_markup(text)
    while (inner := _unwrapped(plain)) != plain:
        plain = _without_stop(normalise(inner))
    return plain or text


def plain_markup(text: str) -> str:
    """Do what `simplify` does, but leave quotation marks and brackets around the whole."""
    return _without_stop(normalise(_replace(_EMPHASIS, r"\2", _plain_typography(plain_latex(text)))))


def squeeze(text: str) -> str:
    """Remove blanks that mean nothing: beside a sign, and between a number and a variable.

    >>> squeeze("(3, 4)"), squeeze("6 + 9 i"), squeeze("1, 234"), squeeze("5 6 red eggs")
    ('(3,4)', '6+9i', '1,234', '5 6 red eggs')
    """
    return _BLANK.sub("", text)


def _replace(pattern: re.Pattern[str], template: str, text: str) -> str:
    # `sub` would parse the template on each call, which takes longer than the search.
    return pattern.sub(lambda match: match.expand(template), text)


def _plain_typography(text: str) -> str:
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda match: "^" + match.group().translate(_PLAIN_SUPERSCRIPT), text)
    text = text.translate(_FRACTIONS)
    text = _FOREIGN_DIGIT.sub(lambda match: str(unicodedata.decimal(match.group())), text)
    return text.translate(_TYPOGRAPHY)


def _without_stop(text: str) -> str:
    return (text[:-1].rstrip() if text.endswith((".", "!", ",", ";", "।", "。", "\u06d4", "።")) else text) or text


def _unwrapped(text: str) -> str:
    match = _WRAPPED.fullmatch(text)
    return (match[match.lastgroup or 0].strip() if match else "") or text
