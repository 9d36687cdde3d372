"""Units of measure, currencies and counted things: which words after a number leave its value as it is."""

import re

_UNITS = {
    "$": "$ us$ usd dollar buck",
    "€": "€ eur euro",
    "£": "£ gbp pound",
    "JPY": "¥ jpy yen",
    "CNY": "¥ cny rmb yuan",
    "₹": "₹ rs inr rupee",
    "¢": "¢ cent",
    "%": "% percent pct",
    "°": "° deg degree",
    "°C": "°c °celsius celsius",
    "°F": "°f °fahrenheit fahrenheit",
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "dm": "dm decimeter decimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "acre": "acre",
    "ha": "ha hectare",
    "ml": "ml milliliter millilitre",
    "cl": "cl centiliter centilitre",
    "dl": "dl deciliter decilitre",
    "l": "l L liter litre",
    "tsp": "tsp teaspoon",
    "tbsp": "tbsp tablespoon",
    "cup": "cup",
    "pt": "pt pint",
    "qt": "qt quart",
    "gal": "gal gallon",
    "mg": "mg milligram",
    "g": "g gram",
    "kg": "kg kilogram kilo",
    "ton": "ton",
    "tonne": "tonne",
    "oz": "oz ounce",
    "lb": "lb pound",
    "ms": "ms millisecond",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week wk",
    "month": "month",
    "year": "year yr",
    "decade": "decade",
    "century": "century centuries",
    "am": "am",
    "pm": "pm",
    "W": "W watt",
    "kW": "kw kilowatt",
    "kWh": "kwh",
    "V": "V volt",
    "N": "N newton",
    "J": "J joule",
    "kJ": "kj kilojoule",
    "cal": "cal calorie",
    "kcal": "kcal kilocalorie",
    "Hz": "hz hertz",
    "byte": "byte",
    "KB": "kb kilobyte",
    "MB": "mb megabyte",
    "GB": "gb gigabyte",
    "TB": "tb terabyte",
    "piece": "piece pc",
    "person": "person people",
    "child": "child children",
    "kid": "kid",
    "man": "man men",
    "woman": "woman women",
    "tooth": "tooth teeth",
    "mouse": "mouse mice",
    "goose": "goose geese",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "die": "die dice",
    "egg": "egg",
    "apple": "apple",
    "cookie": "cookie",
    "book": "book",
    "page": "page",
    "student": "student",
}
"""Each unit with its spellings. An "s" at the end of a spelling of two letters or more makes a plural."""

_ALIASES = {
    re.compile(r"\bper ?cent\b", re.IGNORECASE): "%",
    re.compile(r"\bdegrees? (?=(?:c|f|celsius|fahrenheit)\b)", re.IGNORECASE): "°",
    re.compile(r"\bmph\b", re.IGNORECASE): "mi/h",
    re.compile(r"\b(?:kph|kmph|kmh)\b", re.IGNORECASE): "km/h",
}

_NO_THINGS = re.compile(
    # Numbers and parts of numbers: they multiply or divide the number before them.
    r"(?:(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|[a-z]*illi?one?|[a-z]*illiard|lakh|crore"
    r"|myriad|dozen|score|gross|pair|couple|trio|double|triple|quadruple|grand|mil|half|halv|third|quarter|[a-z]+th"
    # Operations.
    r"|time|fold|power|square|cube|root|exponent|factorial|multiple|negative|equal|minus|plus)e?s"
    r"|(?:twent|thirt|fort|fift|sixt|sevent|eight|ninet)ies|menos|moins|fois"
    # Words that are no nouns.
    r"|always|perhaps|sometimes|besides|towards|afterwards|nowadays|whereas|does|makes|gives|means|becomes|remains"
    r"|seems|exceeds)"
)
"""Words that end like a plural but name no counted things."""

_PLURAL = re.compile(r"[a-z]{3,}s(?<![isu]s)")
_TERM = re.compile(
    r"(?:(?P<power>square|sq\.?|cubic|cu\.?) )?(?P<name>us\$|°?[^\W\d_]+|[%°$€£¥₹¢])(?:\^(?P<exponent>[23]))?",
    re.IGNORECASE,
)
_POWERS = {"squ": "2", "sq": "2", "sq.": "2", "cub": "3", "cu": "3", "cu.": "3"}

Unit = tuple[frozenset[str], ...]
"""What a unit may mean, for the numerator and, in `km/h`, the denominator; empty for a bare number.

A spelling may have several meanings: a pound is a weight and a currency.
"""


def parse_unit(text: str) -> Unit | None:
    """Parse the text after a number; None where it is not a unit.

    >>> parse_unit(""), parse_unit("miles per hour") == parse_unit("mph"), parse_unit("millions")
    ((), True, None)
    """
    if not text:
        return ()
    for pattern, symbol in _ALIASES.items():
        text = pattern.sub(symbol, text)
    numerator, *denominator = re.split(r" ?/ ?|(?:^| )per ", text, maxsplit=1)
    # Without a numerator, as in `5 per hour`, the denominator stands alone.
    terms = [_parse_term(numerator) if numerator else frozenset[str](), *map(_parse_term, denominator)]
    return None if None in terms else tuple(term for term in terms if term is not None)


def units_agree(one: Unit, other: Unit) -> bool:
    """Say whether two units are the same; a missing unit agrees with every one."""
    if not one or not other:
        return True
    return len(one) == len(other) and all(left & right for left, right in zip(one, other, strict=True))


def _parse_term(text: str) -> frozenset[str] | None:
    match = _TERM.fullmatch(text)
    if match is None:
        return None
    power = match["exponent"] or _POWERS.get((match["power"] or "").casefold()[:3], "")
    return frozenset(meaning + power for meaning in _meanings(match["name"])) or None


def _meanings(name: str) -> frozenset[str]:
    """Return what a name means; only in symbols of one letter the case counts: `m` is metres, `M` millions."""
    word = name.casefold()
    known = _MEANINGS.get(name) or (_MEANINGS.get(word) if len(word) > 1 else None)
    if known is None and _PLURAL.fullmatch(word) and not _NO_THINGS.fullmatch(word):
        return frozenset([word])
    return known or frozenset()


def _spellings() -> dict[str, frozenset[str]]:
    meanings: dict[str, frozenset[str]] = {}
    for unit, spellings in _UNITS.items():
        for spelling in spellings.split():
            plural = [spelling + "s"] if len(spelling) > 1 and spelling.isalpha() else []
            for word in (spelling, *plural):
                meanings[word] = meanings.get(word, frozenset()) | {unit}
    return meanings


_MEANINGS = _spellings()
