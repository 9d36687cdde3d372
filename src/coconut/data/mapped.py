"""The encoded files, memory-mapped: rows are read at random without the whole file becoming resident."""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from coconut.data.encoding import EncodedExample

_IDS = pa.list_(pa.int32())
FILE_SCHEMA = pa.schema(
    [("index", pa.int32()), ("question_ids", _IDS), ("steps_ids", pa.list_(_IDS)), ("answer_ids", _IDS)]
)
"""Of `data/encoded/<split>.arrow`; `index` is the example's row in `data/examples/<split>.jsonl`."""
MAX_RESIDENT_BYTES = 128 << 20
"""Of mapped files, more than there was at first."""
ROWS_AT_ONCE = 64
"""Each may map 2 MB, for the kernel maps all that it has in one piece around the page that is wanted."""


class EncodedSet:
    """An encoded split: `len(dataset)`, `dataset[[3, 1]]`, which is a dictionary of columns, and its examples.

    Read with pyarrow itself: `datasets` reads the same file, but takes pandas with it, half a second in
    each process of a pipeline whose smallest stages take two.

    Pages of a mapped file count as this process's memory once they were touched, and an epoch touches all
    of them. A batch scheduler that sees the sum ends the process, although the kernel could take them back
    at any time. So they are given back as rows are read; they stay in the kernel's cache, if there is room.

    Args:
        path: an Arrow stream of `FILE_SCHEMA`.
        max_rows: only so many from its beginning; None for all.

    Raises:
        ValueError: the file is no Arrow stream, not a whole one, or one of other columns; from here, or from
            reading a row where only its part of the file is damaged.
    """

    def __init__(self, path: Path, max_rows: int | None = None) -> None:
        self.path = path
        # As the kernel names it: DVC may have linked it from its cache.
        self.paths = {os.path.realpath(path)}
        with self._naming_damage(), pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            if stream.schema != FILE_SCHEMA:
                raise ValueError(f"found columns {', '.join(map(str, stream.schema))}")
            self._batches: list[pa.RecordBatch] = list(stream)
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        self._readers: dict[int, list[_Reader]] = {}
        num_rows = int(self._ends[-1]) if self._batches else 0
        self._num_rows = num_rows if max_rows is None else min(max_rows, num_rows)
        self.resident_at_first = _resident_bytes_of_files()

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"found rows {wanted.min()} to {wanted.max()}, wanted 0 to {len(self) - 1}")
        numbers = np.searchsorted(self._ends, wanted, side="right")
        starts = np.concatenate([[0], self._ends])[numbers]
        read: list[list[Any]] = []
        for place, (number, row) in enumerate(zip(numbers.tolist(), (wanted - starts).tolist(), strict=True), start=1):
            read.append([column(row) for column in self._columns(number)])
            if place % ROWS_AT_ONCE == 0 or place == len(wanted):
                self._release_if_many()
        columns = zip(*read, strict=True) if read else ([] for _ in FILE_SCHEMA)
        return {name: list(column) for name, column in zip(FILE_SCHEMA.names, columns, strict=True)}

    def examples(self) -> Iterator[EncodedExample]:
        """All of them, in order."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            columns = self[range(start, min(start + ROWS_AT_ONCE, len(self)))]
            parts = [columns[name] for name in EncodedExample._fields]
            yield from (EncodedExample(*values) for values in zip(*parts, strict=True))

    def release(self) -> None:
        """Give back the pages that were read."""
        release_pages(self.paths)
        # What is resident now is others' files, a GPU's libraries say, which may have come since.
        self.resident_at_first = max(self.resident_at_first, _resident_bytes_of_files())

    def _release_if_many(self) -> None:
        if _resident_bytes_of_files() > self.resident_at_first + MAX_RESIDENT_BYTES:
            self.release()

    def _columns(self, number: int) -> "list[_Reader]":
        """How the columns of a batch are read, in the schema's order."""
        if number not in self._readers:
            with self._naming_damage():
                # Of this batch alone: it looks at every list's bounds, which lie all over the file.
                self._batches[number].validate(full=True)
                self._readers[number] = [_reader(column) for column in self._batches[number].columns]
        return self._readers[number]

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"{self.path}: not a whole file of encoded examples ({error});"
                " the file was changed or cut short: run the encode stage again"
            ) from None


def load_encoded(encoded_dir: Path, split: str, max_rows: int | None = None) -> EncodedSet:
    """Open one split, memory-mapped.

    Args:
        max_rows: only so many from its beginning; None for all.

    Raises:
        ValueError: if the file is missing, damaged or empty.
    """
    path = encoded_dir / f"{split}.arrow"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; run the encode stage first: dvc repro encode")
    dataset = EncodedSet(path, max_rows)
    if not len(dataset):
        raise ValueError(f"{path}: found no row, wanted encoded examples; run the encode stage again")
    return dataset


_Reader = Callable[[int], Any]


def _reader(array: pa.Array) -> _Reader:
    """How one row of a column is read: an integer, or a list of what is read so. The column stays where it is."""
    _check_complete(array)
    if not pa.types.is_list(array.type):
        numbers = np.from_dlpack(array)  # A view, like `to_numpy`, which imports pandas first.
        return lambda row: int(numbers[row])
    bounds = np.from_dlpack(array.offsets)
    if pa.types.is_list(array.type.value_type):
        read = _reader(array.values)
        return lambda row: [read(inner) for inner in range(*bounds[row : row + 2].tolist())]
    # At once, for the numbers of a list lie side by side.
    _check_complete(array.values)
    values = np.from_dlpack(array.values)
    return lambda row: values[slice(*bounds[row : row + 2].tolist())].tolist()


def _check_complete(array: pa.Array) -> None:
    if array.null_count:
        raise ValueError(f"{array.null_count} values are missing")


def _resident_bytes_of_files() -> int:
    """Memory of this process that files or other processes share; 0 where only Linux would tell."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[2]) * mmap.PAGESIZE


def release_pages(paths: Collection[str]) -> int:
    """Tell the kernel that the pages of these mapped files are not needed now; Linux only.

    Returns:
        How many bytes are mapped.
    """
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None)
    num_bytes = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
        span, permissions, *_, path = line.split(maxsplit=5)
        # Read-only: such a page holds nothing that the file does not, from which it is read again.
        if permissions.startswith("r-") and path in paths:
            start, stop = (int(number, 16) for number in span.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
            num_bytes += stop - start
    return num_bytes
