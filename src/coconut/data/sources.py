"""Readers: files and hub sets, in the forms their authors publish, to canonical examples.

A source is a list of rows, and a row is a line of text or a JSON object. One parser per format
turns one row into one example, wherever the row came from. Text is never evaluated.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from coconut.config.schema import DataConfig, Source
from coconut.config.strict import kind_of
from coconut.data.documents import parse_json
from coconut.data.examples import Example
from coconut.data.formats import PARSERS, Parser, RowError, shown

MAX_WARNINGS = 5
"""Dropped rows that are named one by one in the log; the others are only counted."""


@dataclass(frozen=True)
class Reading:
    """What came out of one source."""

    examples: list[Example]
    num_rows: int
    """Rows taken, the malformed ones included."""
    malformed: Mapping[str, int]
    """Rows dropped, by reason."""


class _Row(NamedTuple):
    place: str
    content: Any


def read_split(data: DataConfig, split: str) -> Reading:
    """Read the rows of a split that is not generated, from its file or from the hub.

    Raises:
        ValueError: the file or set cannot be used, or (unless `data.skip_bad_rows`) a row of it.
    """
    source: Source = getattr(data, split)
    assert source.format in PARSERS, "generated splits have no source"
    rows = _hub_rows(source, split) if source.hub is not None else _file_rows(source, split, data.raw_dir)
    return _parse_rows(_take(rows, source, split), PARSERS[source.format], skip_bad_rows=data.skip_bad_rows)


def _take(rows: list[_Row], source: Source, split: str) -> list[_Row]:
    if source.start >= len(rows):
        raise ValueError(
            f"data.{split}.start: found {source.start}, wanted less than {len(rows)},"
            f" the number of rows in {source.file or source.hub}"
        )
    taken = rows[source.start :][: source.rows]
    if source.rows is not None and len(taken) < source.rows:
        logger.warning(
            "data.{}: {} rows asked from row {} on, {} has only {}",
            *(split, source.rows, source.start, source.file or source.hub, len(taken)),
        )
    return taken


def _parse_rows(rows: list[_Row], parse: Parser, *, skip_bad_rows: bool) -> Reading:
    examples = []
    malformed: Counter[str] = Counter()
    for place, content in rows:
        try:
            examples.append(parse(content))
        except RowError as error:
            if not skip_bad_rows:
                raise ValueError(
                    f"{place}: {error}; mend the row, or set data.skip_bad_rows: true to drop such rows"
                ) from None
            malformed[error.reason] += 1
            if malformed.total() <= MAX_WARNINGS:
                logger.warning("{}: dropped: {}", place, error)
    if malformed.total() > MAX_WARNINGS:
        logger.warning("{} more malformed rows dropped", malformed.total() - MAX_WARNINGS)
    return Reading(examples, len(rows), dict(sorted(malformed.items())))


# --- files to rows --------------------------------------------------------------------------


def _file_rows(source: Source, split: str, raw_dir: str) -> list[_Row]:
    assert source.file is not None, "the config wants a file or a hub set"
    path = Path(raw_dir) / source.file
    text = _read_text(path, split)
    if source.format in ("gsm8k_aug", "multiplication"):
        rows = _lines(text, path)
    elif source.format == "prontoqa":
        rows = _named_records(text, path)
    else:
        rows = _records(text, path)
    if not rows:
        raise ValueError(f"{path}: no row in it, wanted at least one; restore the file")
    return rows


def _read_text(path: Path, split: str) -> str:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise ValueError(
            f"{path}: {found}, wanted the file of data.{split}.file below data.raw_dir;"
            " data/raw/README.md says where the sets are published"
        )
    content = path.read_bytes()
    try:
        # -sig: some editors put a byte order mark in front, which no parser below expects.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line_number}: byte {content[error.start]:#04x} at offset {error.start} is not UTF-8;"
            " restore the file, or save it as UTF-8"
        ) from None


def _lines(text: str, path: Path) -> list[_Row]:
    # Not splitlines: it also breaks at characters that may stand inside a line, such as U+2028.
    lines = enumerate(text.split("\n"), start=1)
    return [_Row(f"{path}:{line_number}", line) for line_number, line in lines if line.strip()]


def _records(text: str, path: Path) -> list[_Row]:
    """Rows of a JSON list, or of JSON Lines; the content tells, not the file's name."""
    if not text.lstrip().startswith("["):
        # A file that is one object as a whole was meant as something else than one line of many.
        if text.lstrip().startswith("{") and isinstance(_document_or_none(text), dict):
            raise ValueError(
                f"{path}: found a JSON object, wanted a list of them, or JSON Lines with one a line;"
                " put [ ] around a single record"
            )
        return _json_lines(text, path)
    records = _document(text, path)
    return [_Row(f"{path}: record {number}", record) for number, record in enumerate(records, start=1)]


def _json_lines(text: str, path: Path) -> list[_Row]:
    rows = _lines(text, path)
    # No matter of single rows, which could be dropped.
    if len(rows) > 1 and not any(isinstance(_document_or_none(row.content), dict) for row in rows):
        raise ValueError(
            f"{path}: found no line that is a JSON object, wanted a list of objects, or JSON Lines with one whole"
            " object a line; if the file is cut short, restore it; if a record goes over several lines, put it on one"
        )
    return rows


def _named_records(text: str, path: Path) -> list[_Row]:
    if not text.strip():
        return []
    records = _document(text, path)
    if not isinstance(records, dict):
        raise ValueError(
            f'{path}: found {kind_of(records)}, wanted a JSON object {{"example1": {{"test_example": ...}}, ...}}'
            " as the ProntoQA generator writes it; for a list of examples take format: canonical"
        )
    return [_Row(f"{path}: record {shown(name)}", record) for name, record in records.items()]


def _document(text: str, path: Path) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg};"
            " the file is damaged or cut short: restore it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not usable JSON: {error}; mend or restore the file") from None


def _document_or_none(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


# --- the hub --------------------------------------------------------------------------------


def _hub_rows(source: Source, split: str) -> list[_Row]:
    # Imported here: it takes a second, and generated or local data do without.
    import datasets

    if source.hub_split is None:
        raise ValueError(f"data.{split}.hub_split: found null, wanted the name of a split of {source.hub}")
    place = f"{source.hub} [{source.hub_split}]"
    try:
        table = datasets.load_dataset(
            source.hub, source.hub_config, split=source.hub_split, revision=source.hub_revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data.{split}.hub: {place} cannot be loaded: {error}; check hub, hub_config, hub_split, hub_revision"
            " and the network, or download the set and name it in `file`"
        ) from None
    return [_Row(f"{place}: row {number}", row) for number, row in enumerate(table)]
