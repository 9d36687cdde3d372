"""Reading a mapped set at random gives its rows, and gives its pages back."""

import mmap
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from coconut.data import mapped
from coconut.data.encoding import EncodedExample
from coconut.data.mapped import FILE_SCHEMA, load_encoded, release_pages

NUM_ROWS = 5000

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told to take pages back")


def write(path: Path, table: pa.Table, batch_rows: int | None = None) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=batch_rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A name with spaces, as a path in /proc/self/maps must be read whole."""
    folder = tmp_path / "a set of  rows"
    folder.mkdir()
    rows = {
        "index": list(range(NUM_ROWS)),
        "question_ids": [[row] * (1 + row % 7) for row in range(NUM_ROWS)],
        "steps_ids": [[[row, 1], [], [2]][: row % 4] for row in range(NUM_ROWS)],
        "answer_ids": [[row % 11] for row in range(NUM_ROWS)],
    }
    write(folder / "train.arrow", pa.table(rows, schema=FILE_SCHEMA), 500)
    return folder


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("small") / "train.arrow"
    rows = {
        "index": list(range(6)),
        "question_ids": [[row] * 3 for row in range(6)],
        "steps_ids": [[[row, 1], [2]][: row % 3] for row in range(6)],
        "answer_ids": [[row] for row in range(6)],
    }
    write(path, pa.table(rows, schema=FILE_SCHEMA), 4)
    return path, path.read_bytes()


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
    oracle = Dataset.from_file(str(folder / "train.arrow"))
    rows = load_encoded(folder, "train")
    assert len(rows) == NUM_ROWS
    chosen = random.Random(0)
    for size in (0, 1, 2, mapped.ROWS_AT_ONCE, 3 * mapped.ROWS_AT_ONCE + 1):
        wanted = [chosen.randrange(NUM_ROWS) for _ in range(size)]
        wanted += [*wanted[:1], 0, 499, 500, NUM_ROWS - 1]
        assert rows[wanted] == oracle[wanted]
    assert rows[[]] == {name: [] for name in FILE_SCHEMA.names}
    ours, theirs = list(rows.examples()), oracle.select_columns(list(EncodedExample._fields))
    assert ours == [EncodedExample(**row) for row in theirs]


@pytest.mark.parametrize(("max_rows", "num_rows"), [(None, NUM_ROWS), (700, 700), (NUM_ROWS + 1, NUM_ROWS)])
def test_a_set_can_be_cut(folder, max_rows, num_rows):
    rows = load_encoded(folder, "train", max_rows)
    assert len(rows) == num_rows
    assert [example.question_ids[0] for example in rows.examples()] == list(range(num_rows))


@pytest.mark.parametrize("row", [-1, 700])
def test_a_row_that_is_not_in_the_set_is_an_error(folder, row):
    with pytest.raises(IndexError, match=f"found rows {min(0, row)} to {max(0, row)}, wanted 0 to 699"):
        load_encoded(folder, "train", 700)[[0, row]]


def test_other_columns_and_missing_values_are_errors(folder):
    path = folder / "train.arrow"

    whole = {"index": [0], "question_ids": [[1]], "steps_ids": [[[2]]], "answer_ids": [[3]]}
    write(path, pa.table(whole))
    with pytest.raises(ValueError, match=r"train\.arrow: .*index: int64.*run the encode stage again"):
        load_encoded(folder, "train")
    write(path, pa.table(whole, schema=FILE_SCHEMA).drop_columns(["index"]))
    with pytest.raises(ValueError, match=r"train\.arrow: .*found columns .*question_ids: list<item: int32>"):
        load_encoded(folder, "train")
    for name, value in (("index", [None]), ("question_ids", [None]), ("answer_ids", [[None]])):
        write(path, pa.table(whole | {name: value}, schema=FILE_SCHEMA))
        with pytest.raises(ValueError, match=r"train\.arrow: .*1 values are missing.* run the encode stage again"):
            load_encoded(folder, "train")[[0]]


def what_reading_says(path: Path, content: bytes) -> str:
    """The error of reading the whole set; empty where there is none. Any error but a `ValueError` passes through."""
    path.write_bytes(content)
    try:
        list(load_encoded(path.parent, "train").examples())
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("flip", [0x01, pytest.param(0xFF, marks=pytest.mark.slow)])
def test_any_damaged_byte_is_an_error_or_another_number_and_never_a_crash(small_file, flip):
    """A number may be another one, which DVC's checksums notice; what says where they are must not lead outside."""
    path, whole = small_file
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= flip
        message = what_reading_says(path, damaged)
        assert not message or "train.arrow" in message


def test_a_file_cut_anywhere_is_an_error_or_has_fewer_rows(small_file):
    path, whole = small_file
    messages = [what_reading_says(path, whole[:length]) for length in range(len(whole))]
    assert all("train.arrow" in message for message in messages if message)
    # Between two batches and behind the last one there is nothing to notice.
    assert sum(not message for message in messages) < 32


def test_bounds_that_lead_outside_are_an_error(small_file):
    path, whole = small_file
    bounds = np.array([0, 3, 6, 9, 12], dtype=np.int32).tobytes()
    assert whole.count(bounds) == 1
    for wrong in ([0, 3, 6, 9, 1 << 30], [0, 3, -6, 9, 12], [0, 9, 6, 3, 12]):
        damaged = whole.replace(bounds, np.array(wrong, dtype=np.int32).tobytes())
        assert "train.arrow: not a whole file of encoded examples" in what_reading_says(path, damaged)


@linux_only
def test_pages_are_given_back_only_above_the_limit(folder, monkeypatch):
    path = folder / "train.arrow"
    rows = load_encoded(folder, "train")
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
    rows = load_encoded(folder, "train")
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
    rows = load_encoded(tmp_path / "linked", "train")
    rows[[0]]
    assert release_pages(rows.paths) >= (folder / "train.arrow").stat().st_size


def test_elsewhere_nothing_is_asked_of_the_system(folder, monkeypatch):
    rows = load_encoded(folder, "train")
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


def test_reading_a_set_takes_neither_datasets_nor_pandas(folder):
    code = (
        "import sys\nfrom pathlib import Path\nfrom coconut.data.mapped import load_encoded\n"
        f"next(load_encoded(Path({str(folder)!r}), 'train').examples())\n"
        "sys.exit(bool({'datasets', 'pandas'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
