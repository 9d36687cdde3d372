"""Reads files that the stages wrote; what is damaged is named, with the cure."""

import csv
import io
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ReadText = Callable[[str], str | None]
"""From a path below `outputs/` to the file's text, None where there is no such file."""

_MAX_DEPTH = 20
"""Levels of JSON in any file that the stages write."""
_LARGEST = 1e100
"""A number beyond this is damage; sums and products of smaller ones stay finite."""


def read_folder(folder: Path) -> ReadText:
    """Return a function that reads files of a folder on disk."""

    def read_text(name: str) -> str | None:
        try:
            return (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise damaged(name, f"byte {error.start}, which is not UTF-8", "text") from None

    return read_text


def parse_number(value: Any, place: str) -> float | None:
    """Return a finite number; None for null and for what is not finite, as a diverged loss."""
    if value is None or (type(value) is float and not math.isfinite(value)):
        return None
    if type(value) not in (int, float):
        raise damaged(place, reprlib.repr(value), "a number or null")
    if abs(value) > _LARGEST:
        raise damaged(place, f"a number beyond {_LARGEST:g}", "a smaller one")
    return typing.cast(float, value)


def read_table(path: str, read_text: ReadText, *, texts: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Read a CSV file of numbers, one mapping a row; an empty list where there is no such file.

    Args:
        texts: columns that hold text.
    """
    rows = csv.DictReader(io.StringIO(read_text(path) or "", newline=""))
    texts = set(texts)
    try:
        table = [
            {key: cell if key in texts else float(cell or "nan") for key, cell in row.items() if key is not None}
            | ({"": float(row[None])} if None in row else {})
            for row in rows
        ]
    except (TypeError, ValueError, csv.Error) as error:
        raise damaged(f"{path}:{rows.line_num}", str(error), "as many numbers as the head names") from None
    return [
        {key: cell if key in texts else parse_number(cell, f"{path}: {key}") for key, cell in row.items()}
        for row in table
    ]


def read_lines(
    path: str, read_text: ReadText, kinds: typing.Mapping[str, Any], *, optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines, with these fields of these types each.

    Args:
        path: relative to the outputs.
        read_text: returns a file's text.
        kinds: the types by field.
        optional: fields that an object need not have.
    """
    # Not splitlines(): a text may hold U+2028, which JSON leaves as it is.
    lines = (read_text(path) or "").split("\n")
    rows = [parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]
    for number, row in enumerate(rows, 1):
        present = {field: kind for field, kind in kinds.items() if field in row or field not in optional}
        check_fields(row, present, f"{path}:{number}")
    return [{field: row[field] for field in kinds if field in row} for row in rows]


def check_fields(row: typing.Mapping[str, Any], kinds: typing.Mapping[str, Any], place: str) -> None:
    """Refuse an object that lacks a field, or holds another type in it."""
    wrong = [field for field, kind in kinds.items() if not fits(row.get(field, ...), kind)]
    if wrong:
        found = f"{wrong[0]}: {reprlib.repr(row[wrong[0]])}" if wrong[0] in row else f"no {wrong[0]}"
        raise damaged(place, found, f"an object with {', '.join(kinds)}")


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value of JSON has a type, generic ones included.

    >>> fits([["a", 0.5]], list[tuple[str, float]]), fits({"a": "b"}, dict[str, float])
    (True, False)
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(one, arguments[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, arguments[1]) for one in value.values())
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and abs(value) <= _LARGEST
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return isinstance(value, kind)


def parse_json(text: str, place: str) -> dict[str, Any]:
    """Parse an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(place, f"no valid JSON ({error})", "a JSON object") from None
    if not isinstance(value, dict):
        raise damaged(place, type(value).__name__, "a JSON object")
    if _is_deep(value):
        raise damaged(place, f"more than {_MAX_DEPTH} levels", "a JSON object as its stage writes it")
    return value


def _is_deep(value: Any) -> bool:
    """Tell whether values nest more deeply than any that a stage writes, too deeply for a recursion over them."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def damaged(place: str, found: str, wanted: str) -> ValueError:
    """Return the error that names a damaged file below `outputs/`."""
    return ValueError(
        f"outputs/{place}: found {found}, wanted {wanted}; delete the file and run `dvc repro`, which makes it anew"
    )
