"""One row from elsewhere: the texts in it, and the example that they make."""

import datetime
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from coconut.config.messages import kind_of, shown
from coconut.data.documents import JsonFloat, RepeatedKey, parse_json
from coconut.data.examples import MARKERS, Example, fold, is_scorable

_MARK_BEFORE_ANSWER = re.compile(r"\A#{3,}\s*(?=[^#\s])")


class RowError(ValueError):
    """A row that is not an example; `reason` is the kind of defect, for the statistics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ParsedRow(NamedTuple):
    """An example, and what was left out of it."""

    example: Example
    num_empty_steps: int


def read_record(content: Any) -> Mapping[str, Any]:
    """Return the object of a row, which may still be JSON.

    Raises:
        RowError: It is missing, or of another kind.
    """
    if isinstance(content, str):
        try:
            content = parse_json(content)
        except ValueError as error:
            raise RowError("not JSON", f"not valid JSON: {error}; found {shown(content)}") from None
    if not isinstance(content, Mapping):
        raise RowError("wrong type", f"found {kind_shown(content)}, wanted a JSON object")
    if isinstance(content, RepeatedKey):
        raise RowError("repeated key", f"key {shown(content.key)} stands twice in the object, wanted it once")
    return content


def read_text(record: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    """Return the text of a field.

    Raises:
        RowError: It is missing, or of another kind.
    """
    value = record.get(key)
    if value is None or (value == "" and not empty):
        reason = "no answer" if key == "answer" else "missing field"
        found = f"{key} is empty" if value == "" else f"no {key} among {shown(', '.join(map(str, record)))}"
        raise RowError(reason, f"{found}, wanted text")
    return read_scalar(value, key)


def read_scalar(value: Any, place: str) -> str:
    """Return a text as it is, and a number, truth value or date as its file writes it.

    Raises:
        RowError: The value is a list, an object, null, no finite number, or bytes that are not UTF-8.
    """
    return as_text(value if isinstance(value, str) else number_text(value), place)


def number_text(value: Any) -> Any:
    """Write true, false, a number, a date or text as its file does, because the answer is compared as text first."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, JsonFloat):
        return value.text
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value:f}"
    if isinstance(value, datetime.date | datetime.time):  # A datetime is a date.
        return value.isoformat()
    return _decoded(value) if isinstance(value, bytes) else value


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def read_texts(record: Mapping[str, Any], key: str) -> list[str]:
    """Return the texts of a list.

    Raises:
        RowError: It is missing, or of another kind.
    """
    values = record.get(key)
    if not isinstance(values, list):
        found = f"{key} is {kind_shown(values)}" if key in record else f"no {key} in the record"
        raise RowError("wrong type" if key in record else "missing field", f"{found}, wanted a list of text")
    return [read_scalar(value, f"{key}[{i}]") for i, value in enumerate(values)]


def as_text(value: Any, key: str) -> str:
    """Return the text, or raise a `RowError` that names its place."""
    if not isinstance(value, str):
        raise RowError("wrong type", f"{key} is {kind_shown(value)}, wanted text")
    return value


def kind_shown(value: Any) -> str:
    """Name the kind of a value, and NaN and the infinities by their names."""
    if isinstance(value, float):
        return "a number" if math.isfinite(value) else f"{float(value)}"
    kinds = {
        dict: "an object",
        bytes: "bytes that are not UTF-8",
        Decimal: f"{value}",
        datetime.timedelta: "a duration",
    }
    return kinds.get(type(value)) or ("an object" if isinstance(value, dict) else kind_of(value))


def make_row(question: str, steps: Iterable[str], answer: str, group: str = "") -> ParsedRow:
    """Strip the parts, drop steps that are empty or only say the answer, and refuse text that later stages write."""
    answer = _MARK_BEFORE_ANSWER.sub("", answer.strip())
    # A line of the solution that only says the answer, as GSM8K and MetaMath write it, is no step.
    stripped = ["" if _says_only(answer, step.strip()) else step.strip() for step in steps]
    example = Example(question.strip(), [step for step in stripped if step], answer, fold(group))
    parts = {"question": example.question, "answer": example.answer}
    parts |= {f"steps[{i}]": step for i, step in enumerate(example.steps)}
    for key, text in parts.items():
        _check_part(key, text)
    if not is_scorable(example.answer):
        raise RowError(
            "unusable answer",
            f"answer is {shown(example.answer)}, wanted one line, without '###' and more than a full stop:"
            " only that much is read of a model's answer",
        )
    return ParsedRow(example, len(stripped) - len(example.steps))


def _says_only(answer: str, step: str) -> bool:
    marked = _MARK_BEFORE_ANSWER.match(step)
    return marked is not None and fold(step[marked.end() :]) == fold(answer)


def _check_part(key: str, text: str) -> None:
    if not text:
        raise RowError("no answer" if key == "answer" else "empty text", f"{key} is empty, wanted text")
    for marker in MARKERS:
        if marker in text:
            raise RowError(
                "marker", f"{key} holds the marker {marker}, which only the pipeline may write: {shown(text)}"
            )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("not UTF-8", f"{key} holds half a character (a lone surrogate): {error.reason}") from None
