"""Tables as rows: CSV and TSV with the text of each cell as it is published, Parquet, and what is compressed.

`datasets` reads these, too, but through pandas, which makes 7 of `007`, 100000.0 of `1e5` and nothing of `NA`.
"""

import bz2
import csv
import gzip
import io
import lzma
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.config.messages import shown
from coconut.data.documents import decode_text
from coconut.data.rows import Row, read_records, read_records_inside

_SEPARATORS = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons"}
_ARROW = {b"PAR1": "a Parquet", b"ARROW1": "an Arrow", b"\xff\xff\xff\xff": "an Arrow", b"FEA1": "a Feather"}
"""Kinds of tables by their first bytes; those of an Arrow stream have no name of their own."""


def read_table(
    content: bytes, path: Path, *, records: str | None = None, columns: Sequence[str] | None = None
) -> list[Row]:
    """Read the rows of a file by its content: JSON, JSON Lines, CSV, TSV, Parquet or Arrow, compressed or not.

    Args:
        records: the path to the rows in a file that is one JSON object.
        columns: the names of the columns, where the first line does not name them.

    Raises:
        ValueError: The file is damaged, or of another kind; the message names it.
    """
    content = unpack(content, path)
    kind = next((kind for signature, kind in _ARROW.items() if content.startswith(signature)), None)
    if kind is not None and records is None and columns is None:
        return _arrow_rows(content, path, kind)
    if kind is not None:
        key = "records" if columns is None else "columns"
        raise ValueError(f"{path}: found {kind} table, which names its columns, beside {key}; take {key} out")
    text = decode_text(content, path)
    if records is not None:
        return _named(read_records_inside(text, path, records), columns)
    if text.lstrip()[:1] in ("[", "{"):
        return _named(read_records(text, path, key=None), columns)
    return _cell_rows(text, path, columns)


def _named(rows: list[Row], columns: Sequence[str] | None) -> list[Row]:
    return [Row(place, _as_record(columns, row) if columns and isinstance(row, list) else row) for place, row in rows]


# --- compressed files -----------------------------------------------------------------------


def unpack(content: bytes, path: Path) -> bytes:
    """Return what a file of gzip, bzip2, xz or zstd holds, and any other file as it is.

    Raises:
        ValueError: The file is cut short or damaged.
    """
    for signature, unpack_whole in _COMPRESSED.items():
        if content.startswith(signature):
            try:
                return unpack_whole(content)
            except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise ValueError(
                    f"{path}: found a compressed file that cannot be unpacked: {error}; restore it"
                ) from None
    return content


def _unpack_zstd(content: bytes) -> bytes:
    import pyarrow as pa

    unpacked: bytes = pa.CompressedInputStream(pa.BufferReader(content), "zstd").read()
    return unpacked


_COMPRESSED: Mapping[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
    b"\x28\xb5\x2f\xfd": _unpack_zstd,
}


# --- cells ----------------------------------------------------------------------------------


def _cell_rows(text: str, path: Path, columns: Sequence[str] | None) -> list[Row]:
    """Read a table whose first line names the columns, where they are not named already; cells are text.

    Quotes are those of spreadsheets, but in a file named .tsv, which has none, a quotation mark is text.
    """
    separator = "\t" if _is_tsv(path) else _find_separator(text)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        strict=True,
        quoting=csv.QUOTE_NONE if _is_tsv(path) else csv.QUOTE_MINIMAL,
    )
    rows: list[Row] = []
    names = list(columns or [])
    start = 1
    try:
        for cells in reader:
            place, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = _column_names(cells, path, _SEPARATORS[separator])
                continue
            rows.append(Row(place, _as_record(names, cells)))
    except csv.Error as error:
        raise ValueError(
            f"{path}:{start}: not valid {_SEPARATORS[separator]}: {error}; a cell with a quote, a separator or a line"
            ' break in it stands in quotes, and a quote in it is doubled: "so ""this"" is one cell"'
        ) from None
    return rows


def _as_record(names: Sequence[str], cells: list[Any]) -> Any:
    """Return an object, or the bare cells of a row that does not fit the columns, which the parser refuses."""
    return dict(zip(names, cells, strict=True)) if len(names) == len(cells) else cells


def _is_tsv(path: Path) -> bool:
    return ".tsv" in (path.suffix.lower(), path.with_suffix("").suffix.lower())


def _find_separator(text: str) -> str:
    first_line = text.lstrip().partition("\n")[0]
    return max(_SEPARATORS, key=first_line.count)


def _column_names(cells: list[str], path: Path, kind: str) -> list[str]:
    names = [name.strip() for name in cells]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise ValueError(f"{path}:1: column {shown(twice[0])} stands twice in the {kind}, wanted it once; rename one")
    return names


# --- Parquet and Arrow ----------------------------------------------------------------------


def _arrow_rows(content: bytes, path: Path, kind: str) -> list[Row]:
    import pyarrow as pa

    try:
        table = _read_arrow(pa.BufferReader(content), content)
        if len(set(table.column_names)) < table.num_columns:
            raise ValueError(f"a column stands twice among {shown(', '.join(table.column_names))}")
        records = table.to_pylist(maps_as_pydicts="strict")
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: found {kind} table that cannot be read: {reason}; restore it") from None
    type_of_row = pa.struct(table.schema)
    return [Row(f"{path}: row {number}", as_written(record, type_of_row)) for number, record in enumerate(records)]


def _read_arrow(source: Any, content: bytes) -> Any:
    import pyarrow as pa
    from pyarrow import feather, parquet

    if content.startswith(b"PAR1"):
        return parquet.read_table(source)
    if content.startswith(b"FEA1"):
        return feather.read_table(source)
    return (pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream)(source).read_all()


def as_written(value: Any, kind: Any) -> Any:
    """Return a value of Arrow in which every number is the one with the shortest text: a float32 of .1 becomes 0.1.

    Args:
        kind: the value's type.
    """
    import pyarrow as pa

    if isinstance(value, float) and math.isfinite(value) and pa.types.is_floating(kind) and kind.bit_width < 64:
        return float(str(kind.to_pandas_dtype()(value)))
    if isinstance(value, dict) and pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind.fields}
        return {name: as_written(one, kinds.get(name)) for name, one in value.items()}
    if isinstance(value, dict) and pa.types.is_map(kind):
        return {name: as_written(one, kind.item_type) for name, one in value.items()}
    return [as_written(one, kind.value_type) for one in value] if isinstance(value, list) else value
