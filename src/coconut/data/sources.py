"""Reads files and hub sets, in the forms that their authors publish, as canonical examples.

A source is a list of rows, and a row is a line of text or a JSON object. One parser per format, or a map of fields,
turns a row into an example, wherever the row comes from. Text is never evaluated.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loguru import logger

from coconut.config.field_map import Fields
from coconut.config.messages import key_shown, shown, suggest
from coconut.config.presets import maps_of
from coconut.config.schema import DataConfig, Source
from coconut.data.documents import decode_text
from coconut.data.examples import Example
from coconut.data.fields import FieldReader, choose_reader, describe_values
from coconut.data.formats import PARSERS, Parser
from coconut.data.records import RowError
from coconut.data.rows import Row, parse_or_none, read_lines, read_named_records, read_records, say_records
from coconut.data.tables import as_written, read_table

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
    num_left_out: int = 0
    """Number of rows that `fields.where` left out, before `start` and `rows` counted."""
    has_steps: bool = True
    """False where the map of fields that reads the rows names no steps."""


def read_split(data: DataConfig, split: str) -> Reading:
    """Read the rows of a split that is not generated, from its file or from the hub.

    Raises:
        ValueError: The file or set cannot be used, or (unless `data.skip_bad_rows`) one of its rows cannot.
    """
    source, path = data.splits[split], data.path_of(split)
    assert source.format != "generated", "generated splits have no source"
    rows = _hub_rows(source, path) if source.hub is not None else _file_rows(source, path, data.raw_dir)
    if source.format in PARSERS:
        return _parse_rows(_take(rows, source, path), PARSERS[source.format], skip_bad_rows=data.skip_bad_rows)
    rows = [Row(row.place, _parsed_once(row.content)) for row in rows]
    reader = _choose_reader(maps_of(source), rows, source, path)
    kept = _select(rows, reader, path)
    reading = _parse_rows(_take(kept, source, path), reader.parse, skip_bad_rows=data.skip_bad_rows)
    return replace(reading, num_left_out=len(rows) - len(kept), has_steps=reader.fields.steps is not None)


def _parsed_once(content: Any) -> Any:
    """Return the object of a line of JSON, or the line itself, which the parser refuses."""
    parsed = parse_or_none(content) if isinstance(content, str) else content
    return content if parsed is None else parsed


def _choose_reader(maps: Sequence[Fields], rows: list[Row], source: Source, key: str) -> FieldReader:
    try:
        return choose_reader(maps, [row.content for row in rows])
    except ValueError as error:
        only = rows[0].content if len(rows) == 1 and source.file is not None else None
        hint = say_records(only) if isinstance(only, dict) else ""
        raise ValueError(
            f"{source.file or source.hub}: {key}.fields.{error}; {hint}correct the map, or {key}.format"
            f" ({source.format})"
        ) from None


def _select(rows: list[Row], reader: FieldReader, key: str) -> list[Row]:
    kept = [row for row in rows if reader.keeps(row.content)]
    if not kept:
        contents = [row.content for row in rows]
        found = "; ".join(f"{key_shown(path)}: {describe_values(contents, path)}" for path in reader.fields.where or ())
        raise ValueError(
            f"{key}.fields.where: no row of {len(rows)} is kept; found {found}; values are compared as text,"
            " as the file writes them"
        )
    return kept


def _take(rows: list[Row], source: Source, key: str) -> list[Row]:
    if source.start >= len(rows):
        raise ValueError(
            f"{key}.start: found {source.start}, wanted less than {len(rows)},"
            f" the number of rows in {source.file or source.hub}"
        )
    taken = rows[source.start :][: source.rows]
    if source.rows is not None and len(taken) < source.rows:
        logger.warning(
            "{}: {} rows are asked for from row {} on, but {} has only {}",
            *(key, source.rows, source.start, source.file or source.hub, len(taken)),
        )
    return taken


def _parse_rows(rows: list[Row], parse: Parser, *, skip_bad_rows: bool) -> Reading:
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


def _file_rows(source: Source, key: str, raw_dir: str) -> list[Row]:
    assert source.file is not None, "the config requires a file or a hub set"
    found: list[Row] = []
    for path in find_files(Path(raw_dir) / source.file):
        content = _read_bytes(path, key)
        if source.format not in PARSERS:
            rows = read_table(content, path, records=source.records, columns=source.columns)
        else:
            rows = _published_rows(decode_text(content, path), path, source.format)
        if not rows:
            raise ValueError(f"{path}: no row in it, wanted at least one; restore the file")
        found += rows
    return found


def find_files(path: Path) -> list[Path]:
    """Return the files that a name, a pattern or a folder of `datasets` stands for, in order of name."""
    if (path / "state.json").is_file():
        return sorted(path.glob("*.arrow")) or [path]
    is_pattern = not path.exists() and any(sign in path.name for sign in "*?[")
    return sorted(one for one in path.parent.glob(path.name) if one.is_file()) or [path] if is_pattern else [path]


def _published_rows(text: str, path: Path, file_format: str) -> list[Row]:
    _refuse_csv(text, path, file_format)
    if file_format in _LINE_FORMATS and text.lstrip()[:1] not in ("[", "{"):
        return read_lines(text, path)
    if file_format == "prontoqa":
        return read_named_records(text, path)
    return read_records(text, path)


def _read_bytes(path: Path, key: str) -> bytes:
    if not path.is_file():
        splits = sorted(one.parent.name for one in path.glob("*/state.json"))
        found = "a folder" if path.is_dir() else "no such file"
        if splits:
            found = f"a folder of the splits {', '.join(splits)}; name one, as in {path.name}/{splits[0]}"
        raise ValueError(
            f"{path}: {found}, wanted the file of {key}.file below data.raw_dir, or a pattern such as train-*.parquet;"
            f" data/raw/README.md says where the sets are published{suggest(path.name, _names_beside(path))}"
        )
    return path.read_bytes()


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
                f" pd.read_csv(FILE, sep={separator!r}).to_json(OTHER_FILE, orient='records', lines=True), or read the"
                " table itself with format: fields (docs/data.md)"
            )


# --- the hub --------------------------------------------------------------------------------


def _hub_rows(source: Source, key: str) -> list[Row]:
    # The import takes a second, which generated and local data do not need.
    import datasets
    import pyarrow as pa
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    if source.hub_split is None:
        raise ValueError(f"{key}.hub_split: found null, wanted the name of a split of {source.hub}")
    place = f"{source.hub} [{source.hub_split}]"
    try:
        table = datasets.load_dataset(
            source.hub, source.hub_config, split=source.hub_split, revision=source.hub_revision
        )
        kind = pa.struct(table.features.arrow_schema)
        return [Row(f"{place}: row {number}", as_written(row, kind)) for number, row in enumerate(table)]
    except (
        *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError),
        *(datasets.exceptions.DatasetsError, HTTPError),
    ) as error:
        raise ValueError(
            f"{key}.hub: {place} cannot be loaded: {' '.join(str(error).split())[:300]}; check hub, hub_config,"
            " hub_split, hub_revision and the network, or download the set and name it in `file`"
        ) from None
