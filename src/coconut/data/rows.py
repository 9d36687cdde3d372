"""The rows of a file: lines of text, JSON Lines, or the records of one JSON document."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from coconut.config.messages import key_shown, kind_of, shown
from coconut.data.documents import RepeatedKey, parse_json


class Row(NamedTuple):
    """A row before it is parsed: a line of text, or an object; `place` is the file and the row in it."""

    place: str
    content: Any


def read_lines(text: str, path: Path) -> list[Row]:
    """Read each line that is not blank as a row."""
    # `splitlines` would also break at characters that may stand inside a line, such as U+2028.
    lines = enumerate(text.split("\n"), start=1)
    return [Row(f"{path}:{line_number}", line) for line_number, line in lines if line.strip()]


def read_records(text: str, path: Path, key: str | None = "question") -> list[Row]:
    """Read a JSON list or JSON Lines. The content decides which, not the file's name.

    Args:
        key: What the only object of a file must hold in order to be a row; None for any.

    Raises:
        ValueError: The file is damaged, or holds no records.
    """
    if not text.lstrip().startswith("["):
        # A file that is one object as a whole holds no rows, unless the object is one, on a line of its own.
        whole = parse_or_none(text) if text.lstrip().startswith("{") else None
        if isinstance(whole, dict) and ("\n" in text.strip() or (key is not None and key not in whole)):
            raise ValueError(
                f"{path}: found a JSON object, wanted a list of them, or JSON Lines with one a line;"
                f" {say_records(whole)}put [ ] around a single record"
            )
        return _json_lines(text, path)
    records = _document(text, path)
    return [Row(f"{path}: record {number}", record) for number, record in enumerate(records, start=1)]


def say_records(whole: dict[str, Any]) -> str:
    """Say how the rows inside of an object are named, if there are any."""
    inside = [key for key, value in whole.items() if isinstance(value, list | dict) and _by_name(value)]
    key = '"*"' if _by_name(whole) else key_shown(inside[0]) if inside else None
    return "" if key is None else f"if it holds the rows, name them beside format: fields with records: {key}; "


def read_records_inside(text: str, path: Path, records: str) -> list[Row]:
    """Read the rows that stand in one JSON object: a list, objects by id, or columns as pandas writes them.

    Args:
        records: the path to them; `*` for the whole object.

    Raises:
        ValueError: The file is no object, or what is there is none of these.
    """
    document = _document(text, path)
    value, walked = document, "the file"
    if not isinstance(document, dict):
        raise ValueError(f"{path}: found {kind_of(document)}, wanted a JSON object, as records: {records} says")
    for key in [] if records == "*" else records.split("."):
        if not isinstance(value, dict) or key not in value:
            names = ", ".join(map(key_shown, value)) if isinstance(value, dict) else kind_of(value)
            raise ValueError(f"{path}: records: {records}: no {key_shown(key)} in {walked}, which has {shown(names)}")
        value, walked = value[key], key
    found = _by_name(value)
    if not found:
        raise ValueError(
            f"{path}: records: {records}: found {kind_of(value)}, wanted a list of objects, objects by id, or columns"
            " of equal length"
        )
    return [Row(f"{path}: record {name}", content) for name, content in found]


def _by_name(value: Any) -> list[tuple[Any, Any]]:
    """Return the rows of a value with their numbers or ids; none where it holds no rows."""
    if isinstance(value, list):
        return list(enumerate(value, start=1))
    if not isinstance(value, dict) or isinstance(value, RepeatedKey):
        return []
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        fit = all(isinstance(row, list) and len(row) == len(value["columns"]) for row in value["data"])
        rows = [dict(zip(map(str, value["columns"]), row, strict=True)) for row in value["data"] if fit]
        return list(enumerate(rows, start=1))
    columns = [*value.values()]
    if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        rows = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        return list(enumerate(rows, start=1))
    if not all(isinstance(column, dict) for column in columns):
        return []
    if all(column.keys() == columns[0].keys() and all(map(str.isdecimal, column)) for column in columns):
        return [(name, {key: column[name] for key, column in value.items()}) for name in columns[0]]
    return list(value.items())


def _json_lines(text: str, path: Path) -> list[Row]:
    rows = read_lines(text, path)
    # If no line is an object, the file has another form, which is not a matter of single rows.
    if rows and not any(isinstance(parse_or_none(row.content), dict) for row in rows):
        if all(row.content.rstrip().endswith("},") for row in rows[:-1]) and len(rows) > 1:
            raise ValueError(
                f"{path}: lines end with a comma, wanted JSON Lines; take the commas out, or put [ ] around"
            )
        raise ValueError(
            f"{path}: found no line that is a JSON object, wanted a list of objects, or JSON Lines with one whole"
            " object a line; if the file is cut short, restore it; if a record goes over several lines, put it on one"
        )
    return rows


def read_named_records(text: str, path: Path) -> list[Row]:
    """Read the values of one JSON object, as the ProntoQA generator writes it.

    Raises:
        ValueError: The file is damaged, or of another form, or a name stands twice.
    """
    if not text.strip():
        return []
    records = _document(text, path)
    if not isinstance(records, dict):
        raise ValueError(
            f'{path}: found {kind_of(records)}, wanted a JSON object {{"example1": {{"test_example": ...}}, ...}}'
            " as the ProntoQA generator writes it; for a list of examples take format: canonical"
        )
    if isinstance(records, RepeatedKey):
        raise ValueError(f"{path}: key {shown(records.key)} stands twice, wanted it once; rename one of the records")
    return [Row(f"{path}: record {shown(name)}", record) for name, record in records.items()]


def _document(text: str, path: Path) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg};"
            " the file is damaged or cut short: restore it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not usable JSON: {error}; correct or restore the file") from None


def parse_or_none(text: str) -> Any:
    """Parse JSON, and return None for what is not JSON."""
    try:
        return parse_json(text)
    except ValueError:
        return None
