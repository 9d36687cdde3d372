"""Tables: the same rows in every kind of file give the same examples, cells keep their text, damage is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather

from coconut.config.field_map import Fields
from coconut.config.rules import check_fields
from coconut.config.schema import DataConfig, Source
from coconut.data.examples import MARKERS, Example
from coconut.data.sources import read_split
from coconut.data.tables import read_table, unpack
from test_fields import QA, read

NAMES = ("q", "s", "a")
HEADER = {name: name for name in NAMES}
MAP = Fields(question="q", steps="s", split_steps="separator", separator="|", answer="a")


def as_csv(rows, **options):
    file = io.StringIO()
    writer = csv.writer(file, **options)
    writer.writerows([NAMES, *([row[name] for name in NAMES] for row in rows)])
    return file.getvalue().encode()


def as_parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "rows.csv": as_csv,
    "unix.csv": lambda rows: as_csv(rows, lineterminator="\n", quoting=csv.QUOTE_ALL),
    "european.csv": lambda rows: as_csv(rows, delimiter=";"),
    "rows.tsv": lambda rows: "\n".join("\t".join(row[name] for name in NAMES) for row in [HEADER, *rows]).encode(),
    "mark.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows),
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "rows.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "rows.parquet": as_parquet,
}
PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": as_zstd}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and not any(marker in text for marker in MARKERS)
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "q": TEXT | st.sampled_from(['say "no", then; go\tnow', "two\nlines", "two\r\nlines"]),
            "s": st.text("ab |\n,;\"'\t", max_size=9),
            "a": st.sampled_from(["007", "1e5", "2.0", "-.5", "5,000", "TRUE", "A", "NA", "N/A", "1;2", 'x "y"']),
        }
    ),
    min_size=1,
    max_size=5,
)


@given(ROWS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_the_same_rows_give_the_same_examples_from_every_kind_of_file(tmp_path, rows):
    wanted = [
        Example(row["q"].strip(), [step.strip() for step in row["s"].split("|") if step.strip()], row["a"])
        for row in rows
    ]
    for name, write in WRITERS.items():
        if name == "rows.tsv" and any(re.search(r"[\t\r\n]", text) for row in rows for text in row.values()):
            continue  # Such a file has no way to write them.
        content = write(rows)
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name, fields=MAP).examples == wanted
        for suffix, pack in PACKERS.items():
            assert unpack(pack(content), Path(name)) == content, suffix


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_the_content_says_what_a_file_is_and_not_its_name(tmp_path, name, suffix):
    question = "two, words" if name == "rows.tsv" else "two,\nlines"
    rows = [{"q": question, "s": "one|two", "a": "007"}]
    wanted = [Example(question, ["one", "two"], "007")]
    for path in (tmp_path / f"{name}{suffix}", tmp_path / ("data.tsv" if name == "rows.tsv" else "data")):
        path.write_bytes(PACKERS[suffix](WRITERS[name](rows)))
        assert read(path, fields=MAP).examples == wanted


def test_several_compressed_files_behind_each_other_are_one():
    for pack in PACKERS.values():
        assert unpack(pack(b"a") + pack(b"b"), Path("x")) == b"ab"


def test_a_table_in_a_table_and_numbers_of_parquet_are_read(tmp_path):
    rows = [{"q": "x", "a": {"text": [1.5, 2]}}, {"q": "y", "a": {"text": [float("nan")]}}]
    (tmp_path / "x.parquet").write_bytes(as_parquet(rows))
    fields = Fields(question="q", answer="a.text.0")
    reading = read(tmp_path / "x.parquet", fields=fields, skip=True)
    assert (reading.examples, reading.malformed) == ([Example("x", [], "1.5")], {"wrong type": 1})
    with pytest.raises(ValueError, match=r"x\.parquet: row 1: a\.text\.0 is nan, wanted text"):
        read(tmp_path / "x.parquet", fields=fields)


INSIDE = [{"q": "x", "a": "007"}, {"q": "y", "a": 2.0}]
OBJECTS = {
    "a key": ({"version": 1, "examples": INSIDE}, "examples"),
    "a path": ({"data": {"train": INSIDE, "n": 2}}, "data.train"),
    "by id": ({"one": INSIDE[0], "7": INSIDE[1]}, "*"),
    "by id below a key": ({"data": {"1": INSIDE[0], "2": INSIDE[1]}, "n": 2}, "data"),
    "pandas' columns": ({"q": {"0": "x", "1": "y"}, "a": {"0": "007", "1": 2.0}}, "*"),
    "pandas' lists": ({"q": ["x", "y"], "a": ["007", 2.0]}, "*"),
    "pandas' split": ({"columns": ["q", "a"], "index": [0, 1], "data": [["x", "007"], ["y", 2.0]]}, "*"),
    "pandas' table": ({"schema": {"n": 1}, "data": INSIDE}, "data"),
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("form", OBJECTS)
def test_rows_inside_one_json_object_are_named_by_a_key(tmp_path, form, indent):
    content, records = OBJECTS[form]
    (tmp_path / "x.json").write_text(json.dumps(content, indent=indent))
    reading = read(tmp_path / "x.json", fields=QA, records=records)
    assert [(e.question, e.answer) for e in reading.examples] == [("x", "007"), ("y", "2.0")]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_that_holds_rows_is_refused_with_the_key_that_reads_them(tmp_path, indent):
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "examples": INSIDE}, indent=indent))
    with pytest.raises(
        ValueError, match="if it holds the rows, name them beside format: fields with records: examples"
    ):
        read(tmp_path / "x.json", fields=QA)


@pytest.mark.parametrize(
    ("content", "records", "message"),
    [
        ({"a": [], "b": 1}, "c", r"x\.json: records: c: no c in the file, which has 'a, b'"),
        ({"a": {"b": 1}}, "a.c", r"records: a\.c: no c in a, which has 'b'"),
        ({"a": 5}, "a", "records: a: found a number, wanted a list of objects, objects by id, or columns"),
        ({"a": {"q": ["x"], "n": 1}}, "a", "records: a: found a mapping, wanted a list of objects"),
        ([1], "a", r"found a list, wanted a JSON object, as records: a says"),
    ],
)
def test_a_key_that_leads_to_no_rows_is_named(tmp_path, content, records, message):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.json", fields=QA, records=records)


@pytest.mark.parametrize("content", ["x,007\ny,2.0\n", 'x;007\n"y";2.0\n', '[["x", "007"], ["y", "2.0"]]'])
def test_columns_may_be_named_where_the_first_line_is_a_row(tmp_path, content):
    (tmp_path / "x").write_text(content)
    reading = read(tmp_path / "x", fields=QA, columns=("q", "a"))
    assert [(e.question, e.answer) for e in reading.examples] == [("x", "007"), ("y", "2.0")]


@pytest.mark.parametrize(
    "source",
    [Source("canonical", file="x", records="a"), Source("fields", hub="a/b", hub_split="c", fields=QA, columns=("q",))],
)
def test_a_key_that_no_reader_would_obey_is_refused(source):
    with pytest.raises(ValueError, match=r"data\.train\.(records|columns): only beside file, and a format that names"):
        check_fields(source, "data.train")


def as_arrow(new_writer):
    def write(table):
        sink = pa.BufferOutputStream()
        with new_writer(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    return write


def as_feather(table):
    sink = io.BytesIO()
    feather.write_feather(table, sink, compression="zstd")
    return sink.getvalue()


@pytest.mark.parametrize(
    "write", [as_arrow(pa.ipc.new_file), as_arrow(pa.ipc.new_stream), as_feather], ids=["file", "stream", "feather"]
)
def test_arrow_and_feather_are_read_like_parquet(tmp_path, write):
    table = pa.table({"q": ["x", "y"], "a": pa.array([0.1, 2.5], pa.float32())})
    (tmp_path / "x").write_bytes(write(table))
    assert [e.answer for e in read(tmp_path / "x", fields=QA).examples] == ["0.1", "2.5"]
    (tmp_path / "x").write_bytes(write(table)[:90])
    with pytest.raises(ValueError, match=r"x: found an Arrow table that cannot be read: .*restore it"):
        read(tmp_path / "x", fields=QA)


@pytest.mark.slow
def test_what_datasets_saves_to_disk_is_read_as_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"q": f"x{number}", "a": number / 10} for number in range(7)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "mine", num_shards=3)
    assert [e.question for e in read(tmp_path / "mine", fields=QA).examples] == [row["q"] for row in rows]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "both")
    assert len(read(tmp_path / "both/train", fields=QA).examples) == len(rows)
    with pytest.raises(ValueError, match="both: a folder of the splits train; name one, as in both/train"):
        read(tmp_path / "both", fields=QA)


def test_several_files_make_one_split_in_the_order_of_their_names(tmp_path):
    for number in (2, 0, 1):
        (tmp_path / f"train-{number}.csv").write_text(f"q,a\nx{number},{number}\n")
    (tmp_path / "test-0.csv").write_text("q,a\nother,1\n")
    reading = read(tmp_path / "train-*.csv", fields=QA, start=1)
    assert [e.question for e in reading.examples] == ["x1", "x2"]
    (tmp_path / "train-1.csv").write_text("q,a\n")
    with pytest.raises(ValueError, match=r"train-1\.csv: no row in it"):
        read(tmp_path / "train-*.csv", fields=QA)
    with pytest.raises(ValueError, match=r"valid-\*\.csv: no such file, wanted .* or a pattern"):
        read(tmp_path / "valid-*.csv", fields=QA)


SHORTEST = {
    "float32": (pa.array([0.1], pa.float32()), "0.1"),
    "float32, a third": (pa.array([1 / 3], pa.float32()), "0.33333334"),
    "float32, whole": (pa.array([16777216], pa.float32()), "16777216.0"),
    "float16": (pa.array([2.7], pa.float16()), "2.7"),
    "float64": (pa.array([0.1], pa.float64()), "0.1"),
    "list of float32": (pa.array([[0.7]], pa.list_(pa.float32())), "0.7"),
    "fixed list": (pa.array([[0.7]], pa.list_(pa.float16(), 1)), "0.7"),
    "decimal": (pa.array([Decimal("18.50")], pa.decimal128(9, 2)), "18.50"),
    "small decimal": (pa.array([Decimal("1E-9")], pa.decimal128(12, 10)), "0.0000000010"),
    "large decimal": (pa.array([Decimal(10) ** 40], pa.decimal256(50)), "1" + "0" * 40),
    "date": (pa.array([date(2024, 2, 29)]), "2024-02-29"),
    "timestamp": (pa.array([datetime(2024, 2, 29, 12, 30)]), "2024-02-29T12:30:00"),
    "nanoseconds": (pa.array([1_000_000_001], pa.timestamp("ns")), "1970-01-01T00:00:01.000000001"),
    "zone": (pa.array([0], pa.timestamp("s", "UTC")), "1970-01-01T00:00:00+00:00"),
    "time": (pa.array([time(12, 30)]), "12:30:00"),
    "bytes": (pa.array(["π".encode()]), "π"),
    "words": (pa.array(["yes"]).dictionary_encode(), "yes"),
    "unsigned": (pa.array([255], pa.uint8()), "255"),
    "truth": (pa.array([True]), "true"),
}


@pytest.mark.parametrize("kind", SHORTEST)
@pytest.mark.parametrize("place", ["file", pytest.param("hub", marks=pytest.mark.slow)])
def test_a_column_gives_the_shortest_text_of_its_own_type(tmp_path, monkeypatch, kind, place):
    column, text = SHORTEST[kind]
    table = pa.table({"q": ["x"], "a": column, "in": pa.StructArray.from_arrays([column], ["side"])})
    pq.write_table(table, tmp_path / "train.parquet")
    path = "a.0" if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type) else "a"
    fields = Fields(question="q", answer="{" + path + "} = {in." + path.replace("a", "side", 1) + "}")
    if place == "file":
        reading = read(tmp_path / "train.parquet", fields=fields)
    else:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        source = Source("fields", hub=str(tmp_path), hub_split="train", fields=fields)
        data = DataConfig(0, "x", source, source, {"test": source}, None, skip_bad_rows=False, max_train=None)
        reading = read_split(data, "train")
    assert reading.examples == [Example("x", [], f"{text} = {text}")]


def test_bytes_that_are_no_text_and_durations_are_refused_by_name(tmp_path):
    for column, found in (([b"\xff"], "bytes that are not UTF-8"), ([timedelta(1)], "a duration")):
        pq.write_table(pa.table({"q": ["x"], "a": column}), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=rf"row 0: a is {found}, wanted text"):
            read(tmp_path / "x.parquet", fields=QA)


@pytest.mark.parametrize(
    "answer", ['5" pipe', '"yes" he said', 'he said "yes"', '"', '""', '"yes"', '"a "b" c"', "'", '"5']
)
@pytest.mark.parametrize("name", ["x.tsv", "x.tsv.gz", "X.TSV"])
def test_a_quotation_mark_in_tsv_is_text(tmp_path, answer, name):
    content = f'q\ta\n"x\t{answer}\ny\t2\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert [(e.question, e.answer) for e in read(tmp_path / name, fields=QA).examples] == [('"x', answer), ("y", "2")]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_a_cell_may_be_longer_than_the_library_s_limit(tmp_path, name):
    (tmp_path / name).write_text("q,a\n".replace(",", "," if name == "x.csv" else "\t"))
    with (tmp_path / name).open("a") as file:
        file.write("x" * 300_000 + ("," if name == "x.csv" else "\t") + "1\n")
    assert [len(e.question) for e in read(tmp_path / name, fields=QA).examples] == [300_000]


def test_spaces_around_column_names_and_blank_lines_do_not_count(tmp_path):
    (tmp_path / "x.csv").write_text("\n , q,a \n\n0,x,1\n\n1,y,2\n")
    assert [e.question for e in read(tmp_path / "x.csv", fields=QA).examples] == ["x", "y"]


def test_one_column_is_a_table_and_one_object_a_row(tmp_path):
    fields = Fields(question="q", answer="q")
    (tmp_path / "x").write_text("q\n5\n6\n")
    assert len(read(tmp_path / "x", fields=fields).examples) == 2
    (tmp_path / "x").write_text('{"q": 5}\n')
    assert read(tmp_path / "x", fields=fields).examples == [Example("5", [], "5")]


# --- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,a\nx,1,2\n", r"x\.csv:2: found a list of 3 values, wanted an object, or as many cells as columns"),
        ("q,a\nx,1\ny\n", r"x\.csv:3: found a list of 1 values"),
        ('q,a\n"two\nlines",1\ny\n', r"x\.csv:4: found a list of 1 values"),
        ('q,a\nx,1\n"y,2\n', r"x\.csv:3: not valid CSV: unexpected end of data; a cell with a quote"),
        ('q,a\n"x" y,1\n', r"x\.csv:2: not valid CSV: ',' expected after '\"'"),
        ('q;a\n"x" y;1\n', r"x\.csv:2: not valid CSV with semicolons"),
        ("q,a\nx,\n", r"x\.csv:2: a is empty, wanted text"),
        ("q,a\nx,nan\n", r"x\.csv:2: answer is 'nan', as programs write a missing value"),
        ("q,a,q\nx,1,2\n", r"x\.csv:1: column 'q' stands twice in the CSV"),
        ("q,a\n", "no row in it"),
        ("", "no row in it"),
        ("\n\n", "no row in it"),
        (b"q,a\n\xff,1\n", r"x\.csv:2: byte 0xff at offset 4 is not UTF-8"),
        ("q,a\nx,1\n".encode("utf-16"), "found UTF-16 text"),
        ("How many?||<<1+1=2>> #### 2\n" * 2, "no row has the field 'q'"),
        ("<!DOCTYPE html>\n<html>", "a web page"),
        (b"PAR1" + bytes(40), "found a Parquet table that cannot be read"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
        (b"\x1f\x8b" + bytes(40), "found a compressed file that cannot be unpacked"),
        (gzip.compress(b"\x1f\x8b" + bytes(40), mtime=0), "found a gzip archive"),
        ('{"data": [{"q": 1}],\n"b": 2}', "found a JSON object, wanted a list of them"),
        ("[1, 2]", "record 1: found a number, wanted a JSON object"),
        ('{"q": 1}\n{"q": ', "no row has the field 'a'"),
        ('{"q": 1, "a": 1}\n{"q": ', r"x\.csv:2: not valid JSON"),
        ('{"q": ' * 100_000, r"x\.csv"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "x.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read(path, fields=QA)
    assert "x.csv" in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["rows.parquet", *PACKERS])
def test_a_binary_file_that_is_cut_anywhere_is_named(name):
    rows = [{"q": "x" * 50, "s": "", "a": str(i)} for i in range(20)]
    content = as_parquet(rows) if name == "rows.parquet" else PACKERS[name](as_csv(rows))
    for length in range(8, len(content), 13):
        with pytest.raises(ValueError, match=f"{name}: found a .*restore it"):
            read_table(content[:length], Path(name))


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_rows_or_a_value_error(content):
    for prefix in (b"", b"q,a\n", b"BZh9", b"\x1f\x8b\x08\x00", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"[", b"{"):
        try:
            read_table(prefix + content, Path("x"))
        except ValueError as error:
            assert str(error).startswith("x"), error  # noqa: PT017


@pytest.mark.parametrize("content", ["question,answer\nx,1\n", "question\tanswer\nx\t1\n"])
def test_other_formats_point_to_fields_for_a_table(tmp_path, content):
    (tmp_path / "x").write_text(content)
    with pytest.raises(
        ValueError, match=r"save the table as JSON Lines.*, or read the table itself with format: fields"
    ):
        read(tmp_path / "x", "canonical")
