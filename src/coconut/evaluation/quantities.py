"""Numbers as models and data sets write them: exact values with units."""

import re
from decimal import Decimal
from fractions import Fraction
from typing import Literal, NamedTuple

from coconut.evaluation.units import Unit, parse_unit, units_agree

_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Powers of ten. Their plurals, and words such as "dozen" whose value may be meant either way, are not read."""

Tolerance = float | Literal["decimals"] | None
"""What two values may differ by: nothing, so much, or half a unit of the gold value's last decimal."""
_MAX_DIGITS = 1000
"""Of a value that is compared with a tolerance."""

_LABEL = r"(?:(?P<label>[a-z](?:_?[0-9]|_[a-z])?)? ?= ?|(?:answer|result|total|sum) ?[=:] ?)?"
_SIGN = r"(?P<sign>[-+]?) ?(?P<currency>(?:us)?\$|[€£¥₹]|rs\.?|usd|eur|gbp|inr)? ?(?P<inner_sign>[-+]?)"
_DECIMAL = r"(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
_SHORT = r"[0-9]{1,100}"
"""The digits of a fraction, which is computed. Decimal numbers are only compared: their length costs nothing."""

_NUMBER = (
    rf"(?:(?:(?P<whole>{_SHORT}) )?(?P<over>{_SHORT}(?:\.{_SHORT})?|\.{_SHORT}) ?/ ?(?P<under>{_SHORT})(?![0-9.])"
    r"|10\^(?P<power>[-+]?[0-9]{1,9})(?![0-9.])"
    rf"|(?P<decimal>{_DECIMAL})(?:(?:e| ?[*x] ?10\^)(?P<exponent>[-+]?[0-9]{{1,9}})(?![0-9.]))?)"
)
_QUANTITY = re.compile(
    rf"{_LABEL}{_SIGN}{_NUMBER}(?: ?(?P<scale>{'|'.join(_SCALES)})(?![^\W_]))?", re.IGNORECASE | re.ASCII
)


class Quantity(NamedTuple):
    """An exact value; `label` is the x of `x = 5`, and empty where there is none."""

    value: Decimal | Fraction
    unit: Unit
    label: str

    def agrees(self, gold: "Quantity", tolerance: Tolerance = None) -> bool:
        """Say whether the values are equal, or near enough; units and labels count only where both have one."""
        return (
            (self.value == gold.value or _is_near(self.value, gold.value, tolerance))
            and units_agree(self.unit, gold.unit)
            and (self.label == gold.label or not (self.label and gold.label))
        )


def read_quantity(text: str) -> Quantity | None:
    """Parse `-$1.50`, `1 1/2 cups`, `x = 5e3`, `50%`; None for anything else.

    White space must be folded and typography be plain, as `coconut.evaluation.markup.simplify` leaves it.
    """
    match = _QUANTITY.match(text)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    value, unit = _value(match), _unit(match["currency"], text[match.end() :].lstrip(" "))
    return None if value is None or unit is None else Quantity(value, unit, (match["label"] or "").casefold())


def _is_near(found: Decimal | Fraction, gold: Decimal | Fraction, tolerance: Tolerance) -> bool:
    if tolerance is None or not (_is_short(found) and _is_short(gold)):
        return False
    if tolerance == "decimals":
        num_decimals = -int(gold.as_tuple().exponent) if isinstance(gold, Decimal) else 0
        if num_decimals < 1:
            return False
        return abs(Fraction(found) - Fraction(gold)) <= Fraction(1, 2 * 10**num_decimals)
    return abs(Fraction(found) - Fraction(gold)) <= Fraction(tolerance)


def _is_short(value: Decimal | Fraction) -> bool:
    """Say whether arithmetic on a number is cheap: `1e999999999` would fill the memory as a fraction."""
    if isinstance(value, Fraction):
        return True
    _, digits, exponent = value.as_tuple()
    return len(digits) <= _MAX_DIGITS and abs(int(exponent)) <= _MAX_DIGITS


def _value(match: re.Match[str]) -> Decimal | Fraction | None:
    """Compute the value. No arithmetic on Decimals: it would round them."""
    sign = "-" if "-" in match["sign"] + match["inner_sign"] else ""
    shift = _SCALES[match["scale"].casefold()] if match["scale"] else 0
    if match["under"]:
        part = _fraction(match["whole"], match["over"], match["under"])
        return None if part is None else part * 10**shift * (-1 if sign else 1)
    digits, exponent = match["decimal"] or "1", match["exponent"] or match["power"] or "0"
    return Decimal(f"{sign}{digits}e{int(exponent) + shift}")


def _fraction(whole: str | None, over: str, under: str) -> Fraction | None:
    if not int(under):
        return None
    part = Fraction(over) / int(under)
    if whole is None:
        return part
    is_proper = 0 < part < 1 and "." not in over
    return int(whole) + part if is_proper else None


def _unit(currency: str | None, text: str) -> Unit | None:
    unit = parse_unit(text)
    if not currency or unit is None:
        return unit
    prefix = parse_unit(currency.removesuffix("."))
    assert prefix is not None
    if not unit or not unit[0]:
        return prefix + unit[1:]
    return prefix if units_agree(prefix, unit) else None
