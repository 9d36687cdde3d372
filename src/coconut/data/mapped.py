"""Rows of a memory-mapped set, read at random without the whole file becoming resident."""

import ctypes
import mmap
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

MAX_RESIDENT_BYTES = 128 << 20
"""Of mapped files, more than there was at first."""
ROWS_AT_ONCE = 64
"""Each may map 2 MB, for the kernel maps all that it has in one piece around the page that is wanted."""


class MappedRows:
    """A set whose pages are given back to the kernel as its rows are read: `len(rows)`, `rows[[3, 1]]`.

    Pages of a mapped file count as this process's memory once they were touched, and an epoch touches
    all of them. A batch scheduler that sees the sum ends the process, although the kernel could take
    them back at any time. After a release they are still in the kernel's cache, if there is room.
    """

    def __init__(self, dataset: "Dataset") -> None:
        self.dataset = dataset
        # As the kernel names them: DVC may have linked them from its cache.
        self.paths = {os.path.realpath(file["filename"]) for file in dataset.cache_files}
        self.resident_at_first = _resident_bytes_of_files()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: list[int]) -> dict[str, list[Any]]:
        fields: dict[str, list[Any]] = {name: [] for name in self.dataset.column_names}
        for start in range(0, len(rows), ROWS_AT_ONCE):
            for name, values in self.dataset[rows[start : start + ROWS_AT_ONCE]].items():
                fields[name] += values
            if _resident_bytes_of_files() > self.resident_at_first + MAX_RESIDENT_BYTES:
                self.release()
        return fields

    def release(self) -> None:
        """Give back the pages that were read."""
        release_pages(self.paths)
        # What is resident now is others' files, a GPU's libraries say, which may have come since.
        self.resident_at_first = max(self.resident_at_first, _resident_bytes_of_files())


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
