"""Reads the encoded files through memory maps: rows are read at random, and the file does not become resident."""

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
"""The columns of `data/encoded/<split>.arrow`; `index` is the example's row in `data/examples/<split>.jsonl`."""
MAX_RESIDENT_BYTES = 128 << 20
"""File-backed resident memory allowed above the process's baseline."""
ROWS_AT_ONCE = 64
"""Number of rows read between two checks. Each may map 2 MB, because the kernel maps whole large pages."""


class EncodedSet:
    """An encoded split. `len(dataset)` counts its rows, and `dataset[[3, 1]]` is a dictionary of their columns.

    It uses pyarrow directly: `datasets` reads the same file, but imports pandas, which takes half a second
    in each process of a pipeline whose smallest stages take two.

    Pages of a mapped file count as this process's memory once they have been read, and an epoch reads all
    of them. A batch scheduler may end the process because of that, although the kernel could reclaim the
    pages at any time. Therefore they are released while rows are read; the kernel may keep them in its cache.

    Args:
        path: An Arrow stream of `FILE_SCHEMA`.
        max_rows: How many rows are used, from the beginning; None for all.

    Raises:
        ValueError: The file is not a whole Arrow stream of these columns. If only a part of it is damaged,
            reading a row of that part raises the error.
    """

    def __init__(self, path: Path, max_rows: int | None = None) -> None:
        self.path = path
        # The kernel's name of the file: DVC may have linked it from its cache.
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

    def rows(self, rows: Sequence[int]) -> list[EncodedExample]:
        """Return these examples, in this order."""
        columns = self[list(rows)]
        parts = [columns[name] for name in EncodedExample._fields]
        return [EncodedExample(*values) for values in zip(*parts, strict=True)]

    def examples(self) -> Iterator[EncodedExample]:
        """Yield all examples in order."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            columns = self[range(start, min(start + ROWS_AT_ONCE, len(self)))]
            parts = [columns[name] for name in EncodedExample._fields]
            yield from (EncodedExample(*values) for values in zip(*parts, strict=True))

    def release(self) -> None:
        """Release the pages that were read."""
        release_pages(self.paths)
        # The baseline grows by other files that have been mapped since, such as the libraries of a GPU.
        self.resident_at_first = max(self.resident_at_first, _resident_bytes_of_files())

    def _release_if_many(self) -> None:
        if _resident_bytes_of_files() > self.resident_at_first + MAX_RESIDENT_BYTES:
            self.release()

    def _columns(self, number: int) -> "list[_Reader]":
        """Return the readers of a batch's columns, in the schema's order."""
        if number not in self._readers:
            with self._naming_damage():
                # Only this batch is validated, because that reads the bounds of every list in it.
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


_Reader = Callable[[int], Any]


def _reader(array: pa.Array) -> _Reader:
    """Return a function that reads one row of a column, without copying the column: an integer, or a list."""
    _check_complete(array)
    if not pa.types.is_list(array.type):
        numbers = np.from_dlpack(array)  # A view, like `to_numpy`, which imports pandas first.
        return lambda row: int(numbers[row])
    bounds = np.from_dlpack(array.offsets)
    if pa.types.is_list(array.type.value_type):
        read = _reader(array.values)
        return lambda row: [read(inner) for inner in range(*bounds[row : row + 2].tolist())]
    # The numbers of a list lie next to each other, so they are read with one slice.
    _check_complete(array.values)
    values = np.from_dlpack(array.values)
    return lambda row: values[slice(*bounds[row : row + 2].tolist())].tolist()


def _check_complete(array: pa.Array) -> None:
    if array.null_count:
        raise ValueError(f"{array.null_count} values are missing")


def _resident_bytes_of_files() -> int:
    """Return the memory that this process shares with files or other processes, or 0 on systems other than Linux."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[2]) * mmap.PAGESIZE


def release_pages(paths: Collection[str]) -> int:
    """Tell the kernel that the pages of these mapped files are not needed now. On other systems, do nothing.

    Returns:
        The number of bytes that are mapped.
    """
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None)
    num_bytes = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
        span, permissions, *_, path = line.split(maxsplit=5)
        # A read-only page holds nothing that is not in the file, so the kernel can read it again.
        if permissions.startswith("r-") and path in paths:
            start, stop = (int(number, 16) for number in span.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
            num_bytes += stop - start
    return num_bytes
