"""Reads files and hub sets, in the forms that their authors publish, as canonical examples.

A source is a list of rows, and a row is a line of text or a JSON object. One parser per format turns a row
into an example, wherever the row comes from. Text is never evaluated.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from coconut.config.messages import kind_of, shown, suggest
from coconut.config.schema import DataConfig, Source
from coconut.data.documents import RepeatedKey, decode_text, parse_json
from coconut.data.examples import Example
from coconut.data.formats import PARSERS, Parser, RowError

MAX_WARNINGS = 5
"""Number of dropped rows that the log names one by one. It counts the others."""
_LINE_FORMATS = ("gsm8k_aug", "multiplication")
_COLUMN_NAME = re.compile(r'\s*"?([A-Za-z_][\w .-]{0,40})?"?\s*')  # pandas leaves the name of the index empty.
_OTHER_THAN_CSV = re.compile(r"\|\||^\s*[\[{]", re.MULTILINE)


@dataclass(frozen=True)
class Reading:
    """The examples of one source, and what was left out."""

    examples: list[Example]
    num_rows: int
    """Number of rows taken, including malformed ones."""
    malformed: Mapping[str, int]
    """Number of rows dropped, by reason."""
    num_empty_steps: int = 0
    """Number of empty steps dropped from the examples."""


class _Row(NamedTuple):
    place: str
    content: Any


def read_split(data: DataConfig, split: str) -> Reading:
    """Read the rows of a split that is not generated, from its file or from the hub.

    Raises:
        ValueError: The file or set cannot be used, or (unless `data.skip_bad_rows`) one of its rows cannot.
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
            "data.{}: {} rows are asked for from row {} on, but {} has only {}",
            *(split, source.rows, source.start, source.file or source.hub, len(taken)),
        )
    return taken


def _parse_rows(rows: list[_Row], parse: Parser, *, skip_bad_rows: bool) -> Reading:
    examples = []
    malformed: Counter[str] = Counter()
    num_empty_steps = 0
    for place, content in rows:
        try:
            parsed = parse(content)
        except RowError as error:
            if not skip_bad_rows:
                raise ValueError(
                    f"{place}: {error}; correct the row, or set data.skip_bad_rows: true to drop such rows"
                ) from None
            malformed[error.reason] += 1
            if malformed.total() <= MAX_WARNINGS:
                logger.warning("{}: dropped: {}", place, error)
            continue
        examples.append(parsed.example)
        num_empty_steps += parsed.num_empty_steps
    if malformed.total() > MAX_WARNINGS:
        logger.warning("{} more malformed rows dropped", malformed.total() - MAX_WARNINGS)
    return Reading(examples, len(rows), dict(sorted(malformed.items())), num_empty_steps)


# --- files to rows --------------------------------------------------------------------------


def _file_rows(source: Source, split: str, raw_dir: str) -> list[_Row]:
    assert source.file is not None, "the config requires a file or a hub set"
    path = Path(raw_dir) / source.file
    text = _read_text(path, split)
    _refuse_csv(text, path, source.format)
    if source.format in _LINE_FORMATS and text.lstrip()[:1] not in ("[", "{"):
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
            f" data/raw/README.md says where the sets are published{suggest(path.name, _names_beside(path))}"
        )
    return decode_text(path.read_bytes(), path)


def _names_beside(path: Path) -> list[str]:
    folder = path if path.is_dir() else path.parent
    return sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


def _refuse_csv(text: str, path: Path, file_format: str) -> None:
    """Recognise a table by its first line, which names the columns."""
    if _OTHER_THAN_CSV.search(text):
        return
    first_line = text.lstrip().partition("\n")[0]
    for separator, kind in ((",", "CSV"), ("\t", "TSV"), (";", "CSV with semicolons")):
        columns = first_line.split(separator)
        if len(columns) > 1 and any(map(str.strip, columns)) and all(map(_COLUMN_NAME.fullmatch, columns)):
            raise ValueError(
                f"{path}: found {kind} with the columns {shown(', '.join(name.strip() for name in columns))}, wanted"
                f" the form of format {file_format}; save the table as JSON Lines, for instance with pandas:"
                f" pd.read_csv(FILE, sep={separator!r}).to_json(OTHER_FILE, orient='records', lines=True)"
            )


def _lines(text: str, path: Path) -> list[_Row]:
    # `splitlines` would also break at characters that may stand inside a line, such as U+2028.
    lines = enumerate(text.split("\n"), start=1)
    return [_Row(f"{path}:{line_number}", line) for line_number, line in lines if line.strip()]


def _records(text: str, path: Path) -> list[_Row]:
    """Read a JSON list or JSON Lines. The content decides which, not the file's name."""
    if not text.lstrip().startswith("["):
        # A file that is one object as a whole holds no rows, unless the object is one, on a line of its own.
        whole = _document_or_none(text) if text.lstrip().startswith("{") else None
        if isinstance(whole, dict) and ("\n" in text.strip() or "question" not in whole):
            raise ValueError(
                f"{path}: found a JSON object, wanted a list of them, or JSON Lines with one a line;"
                " put [ ] around a single record"
            )
        return _json_lines(text, path)
    records = _document(text, path)
    return [_Row(f"{path}: record {number}", record) for number, record in enumerate(records, start=1)]


def _json_lines(text: str, path: Path) -> list[_Row]:
    rows = _lines(text, path)
    # If no line is an object, the file has another form, which is not a matter of single rows.
    if rows and not any(isinstance(_document_or_none(row.content), dict) for row in rows):
        if all(row.content.rstrip().endswith("},") for row in rows[:-1]) and len(rows) > 1:
            raise ValueError(
                f"{path}: lines end with a comma, wanted JSON Lines; take the commas out, or put [ ] around"
            )
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
    if isinstance(records, RepeatedKey):
        raise ValueError(f"{path}: key {shown(records.key)} stands twice, wanted it once; rename one of the records")
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
        raise ValueError(f"{path}: not usable JSON: {error}; correct or restore the file") from None


def _document_or_none(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


# --- the hub --------------------------------------------------------------------------------


def _hub_rows(source: Source, split: str) -> list[_Row]:
    # The import takes a second, which generated and local data do not need.
    import datasets
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    if source.hub_split is None:
        raise ValueError(f"data.{split}.hub_split: found null, wanted the name of a split of {source.hub}")
    place = f"{source.hub} [{source.hub_split}]"
    try:
        table = datasets.load_dataset(
            source.hub, source.hub_config, split=source.hub_split, revision=source.hub_revision
        )
        return [_Row(f"{place}: row {number}", row) for number, row in enumerate(table)]
    except (
        *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError),
        *(datasets.exceptions.DatasetsError, HTTPError),
    ) as error:
        raise ValueError(
            f"data.{split}.hub: {place} cannot be loaded: {' '.join(str(error).split())[:300]}; check hub, hub_config,"
            " hub_split, hub_revision and the network, or download the set and name it in `file`"
        ) from None
