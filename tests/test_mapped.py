"""Reading a mapped set at random gives its rows, and gives its pages back."""

import mmap
import random
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from coconut.data import mapped
from coconut.data.encoding import load_encoded
from coconut.data.mapped import MappedRows, release_pages

NUM_ROWS = 5000

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told to take pages back")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A name with spaces, as a path in /proc/self/maps must be read whole."""
    folder = tmp_path / "a set of  rows"
    folder.mkdir()
    rows = {
        "index": list(range(NUM_ROWS)),
        "question_ids": [[row] * (1 + row % 7) for row in range(NUM_ROWS)],
        "steps_ids": [[[row, 1], [2]] for row in range(NUM_ROWS)],
        "answer_ids": [[row % 11] for row in range(NUM_ROWS)],
    }
    table = pa.table(rows)
    with pa.OSFile(str(folder / "train.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=500)
    return folder


def resident_bytes(path: Path) -> int:
    """Of a mapped file, in this process."""
    total, is_meant = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            is_meant = line.endswith(str(path))
        elif is_meant and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["always-released", "never-released"])
def test_rows_are_those_of_the_set_in_the_order_asked_for(folder, monkeypatch, limit):
    monkeypatch.setattr(mapped, "MAX_RESIDENT_BYTES", limit)
    dataset = load_encoded(folder, "train")
    rows = MappedRows(dataset)
    assert len(rows) == NUM_ROWS
    chosen = random.Random(0)
    for size in (1, 2, mapped.ROWS_AT_ONCE, 3 * mapped.ROWS_AT_ONCE + 1):
        wanted = [chosen.randrange(NUM_ROWS) for _ in range(size)]
        assert rows[[*wanted, wanted[0]]] == dataset[[*wanted, wanted[0]]]


@linux_only
def test_pages_are_given_back_only_above_the_limit(folder, monkeypatch):
    path = folder / "train.arrow"
    rows = MappedRows(load_encoded(folder, "train"))
    rows[list(range(0, NUM_ROWS, 50))]
    before = resident_bytes(path)
    assert before > 0
    # Negative, for other files' pages may have gone since the set was opened.
    monkeypatch.setattr(mapped, "MAX_RESIDENT_BYTES", -1 << 40)
    rows[[0]]
    assert resident_bytes(path) < before
    assert rows[[4999]]["answer_ids"] == [[4999 % 11]]


@linux_only
def test_shared_memory_that_is_not_the_sets_own_does_not_count_for_ever(folder, monkeypatch):
    rows = MappedRows(load_encoded(folder, "train"))
    monkeypatch.setattr(mapped, "MAX_RESIDENT_BYTES", 8 << 20)
    releases = []
    monkeypatch.setattr(mapped, "release_pages", releases.append)
    with mmap.mmap(-1, 16 << 20) as shared:
        shared.write(bytes(16 << 20))
        for _ in range(5):
            rows[[7]]
    assert len(releases) == 1


@linux_only
def test_a_linked_file_is_found_under_its_own_name(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/train.arrow").symlink_to(folder / "train.arrow")
    rows = MappedRows(load_encoded(tmp_path / "linked", "train"))
    rows[[0]]
    assert release_pages(rows.paths) >= (folder / "train.arrow").stat().st_size


def test_elsewhere_nothing_is_asked_of_the_system(folder, monkeypatch):
    rows = MappedRows(load_encoded(folder, "train"))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mapped.ctypes, "CDLL", None)
    rows.release()
    assert rows[[3]]["index"] == [3]


@linux_only
def test_a_map_that_somebody_writes_to_keeps_what_was_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a" * mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as copy:
        copy[:3] = b"new"
        assert release_pages([str(path)]) == 0
        assert copy[:4] == b"newa"
