"""The encoded splits: memory-mapped rows of token ids, read with `datasets`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from coconut.data.encoding import EncodedExample

_IDS = pa.list_(pa.int32())
FILE_SCHEMA = pa.schema(
    [("index", pa.int32()), ("question_ids", _IDS), ("steps_ids", pa.list_(_IDS)), ("answer_ids", _IDS)]
)
"""The columns of `data/encoded/<split>.arrow`; `index` is the example's row in `data/examples/<split>.jsonl`."""
_ROWS_AT_ONCE = 1000


class EncodedSet:
    """An encoded split. `len(dataset)` counts its rows, and `dataset[[3, 1]]` is a dictionary of their columns.

    Args:
        path: An Arrow stream of `FILE_SCHEMA`.
        max_rows: How many rows are used, from the beginning; None for all.

    Raises:
        ValueError: The file is not a whole Arrow stream of these columns.
    """

    def __init__(self, path: Path, max_rows: int | None = None) -> None:
        from datasets import Dataset  # Here, because it takes half a second that the checks of params.yaml do without.

        self.path = path
        with self._naming_damage():
            self._dataset = Dataset.from_file(str(path))
            schema, table = self._dataset.features.arrow_schema, self._dataset.data.table
            if not schema.remove_metadata().equals(FILE_SCHEMA):
                raise ValueError(f"found columns {', '.join(map(str, schema))}")
            table.validate(full=True)  # The bounds of all lists, so that a damaged byte cannot lead outside.
            for column in table.itercolumns():
                for chunk in column.chunks:
                    _refuse_missing(chunk)
        if max_rows is not None and max_rows < len(self._dataset):
            self._dataset = self._dataset.select(range(max_rows))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        if len(rows) and (min(rows) < 0 or max(rows) >= len(self)):
            raise IndexError(f"found rows {min(rows)} to {max(rows)}, wanted 0 to {len(self) - 1}")
        columns: dict[str, list[Any]] = self._dataset[list(rows)]
        return columns

    def rows(self, rows: Sequence[int]) -> list[EncodedExample]:
        """Return these examples, in this order."""
        columns = self[rows]
        parts = [columns[name] for name in EncodedExample._fields]
        return [EncodedExample(*values) for values in zip(*parts, strict=True)]

    def examples(self) -> Iterator[EncodedExample]:
        """Yield all examples in order."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self.rows(range(start, min(start + _ROWS_AT_ONCE, len(self))))

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, TypeError, LookupError, pa.ArrowException) as error:
            raise ValueError(
                f"{self.path}: not a whole file of encoded examples ({error});"
                " the file was changed or cut short: run the encode stage again"
            ) from None


def load_encoded(encoded_dir: Path, split: str, max_rows: int | None = None) -> EncodedSet:
    """Open one split as a memory map.

    Args:
        max_rows: How many rows are used, from the beginning; None for all.

    Raises:
        ValueError: The file is missing, damaged or empty.
    """
    path = encoded_dir / f"{split}.arrow"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; run the encode stage first: dvc repro encode")
    dataset = EncodedSet(path, max_rows)
    if not len(dataset):
        raise ValueError(f"{path}: found no row, wanted encoded examples; run the encode stage again")
    return dataset


def _refuse_missing(array: pa.Array) -> None:
    if array.null_count:
        raise ValueError(f"{array.null_count} values are missing")
    if pa.types.is_list(array.type):
        _refuse_missing(array.values)
