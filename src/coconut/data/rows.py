"""The rows of a file: lines of text, JSON Lines, or the records of one JSON document."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from coconut.config.messages import kind_of, shown
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
                " put [ ] around a single record"
            )
        return _json_lines(text, path)
    records = _document(text, path)
    return [Row(f"{path}: record {number}", record) for number, record in enumerate(records, start=1)]


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
