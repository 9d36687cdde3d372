"""Turns values into text for tables, pages and a terminal."""

import math
import re
import unicodedata

from coconut.evaluation.statistics import format_ratio

NOT_THERE = "not there"
"""Shown where a file is missing, as after a failed pipeline stage."""
NOTHING = "-"

_JOINERS = "\u200c\u200d"
"""Format characters that ordinary text of some scripts, and emoji, contain."""


def visible(text: str) -> str:
    r"""Escape what a terminal or a browser would obey instead of showing: control and format characters.

    Lone surrogates are escaped too: UTF-8 has no bytes for them.

    >>> print(visible("a\x1b[31mb\n\u202e5\ud800, naïve 数"))
    a\x1b[31mb\n\u202e5\ud800, naïve 数
    """
    return "".join(_escape(character) if _is_hidden(character) else character for character in text)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shorten(text: str) -> str:
    r"""Put a text on one line of at most 120 characters.

    >>> shorten("4\n### 5")
    '4 ⏎ ### 5'
    """
    parts = (re.sub(r"[ \t]+", " ", part).strip() for part in re.split(r"\r?\n", text.strip()))
    line = visible(" ⏎ ".join(parts))
    return line if len(line) <= 120 else line[:119] + "…"


def format_number(value: float | None, digits: int) -> str:
    """Write a number with a fixed count of decimals."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def format_significant(value: float | None) -> str:
    """Write a number with three significant digits, never in exponent form.

    >>> [format_significant(value) for value in (0.0020371, 12.345, 12345.6, 0.0)]
    ['0.00204', '12.3', '12346', '0']
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def format_share(value: float | None) -> str:
    """Write a share as a percentage.

    >>> [format_share(value) for value in (None, 0.0, 0.125, 0.9995, 1.0)]
    ['-', '0 %', '12.5 %', '99.95 %', '100 %']
    """
    return NOTHING if value is None else f"{100 * value:.{3 if value == 1 or value < 0.9995 else 6}g} %"


def format_interval(value: float, low: float | None, high: float | None) -> str:
    """Write a share with its interval, where it has one.

    >>> format_interval(0.9995, 0.9972, 0.99991), format_interval(0.5, None, None)
    ('0.9995 [0.997, 0.9999]', '0.500')
    """
    text = format_ratio(value)
    return text if low is None or high is None else f"{text} [{format_ratio(low)}, {format_ratio(high)}]"


def format_p(p: float | None) -> str:
    """Write a probability as papers do.

    >>> [format_p(p) for p in (None, 1.0, 0.0421, 0.00004)]
    ['-', '1.000', '0.042', '<0.001']
    """
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def format_axis(value: float) -> str:
    """Write a number beside an axis, short.

    >>> [format_axis(value) for value in (0.2, 1500.0, 0.00002, 12345.6, 2e6)]
    ['0.2', '1500', '2e-05', '12,346', '2e+06']
    """
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
