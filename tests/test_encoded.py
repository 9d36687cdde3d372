"""Reading an encoded set at random gives its rows; a damaged one is an error."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from coconut.data.encoded import FILE_SCHEMA, load_encoded
from coconut.data.encoding import EncodedExample

NUM_ROWS = 5000


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


def test_rows_are_those_of_the_set_in_the_order_asked_for(folder):
    oracle = Dataset.from_file(str(folder / "train.arrow"))
    rows = load_encoded(folder, "train")
    assert len(rows) == NUM_ROWS
    chosen = random.Random(0)
    for size in (0, 1, 2, 1000):
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
