"""Tests of data as they are published: prose, markers, numbers, and files of another kind than was said."""
# ruff: noqa: RUF001 (letters of other scripts are the matter of some tests)

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest

from coconut.data.documents import describe_foreign, parse_json, read_json_object
from coconut.data.examples import Example
from coconut.data.formats import PARSERS, split_chain
from coconut.data.sentences import split_sentences
from coconut.data.sources import Reading
from test_sources import canonical, read, read_text, shared


def parse(file_format, content):
    return PARSERS[file_format](content).example


# --- chains of thought ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        (" \n ", []),
        ("<<1+1=2>> <<2+2=4>>", ["<<1+1=2>>", "<<2+2=4>>"]),
        ("<<1 + 1 = 2>><<2+2=4>>", ["<<1 + 1 = 2>>", "<<2+2=4>>"]),
        ("1+1=2 2+2=4", ["1+1=2", "2+2=4"]),
        ("He has 4 left. She has 2.5 more.", ["He has 4 left.", "She has 2.5 more."]),
        ("He has 4 left.\nshe has 2", ["He has 4 left.", "she has 2"]),
        ("He has 4 left, or 5? No! \"Four.\" Yes.", ["He has 4 left, or 5?", "No!", '"Four."', "Yes."]),
        ("Mr. Lee met Dr. J. Watt at St. Ives vs. us, approx. 3 p.m. at sea.", [
            "Mr. Lee met Dr. J. Watt at St. Ives vs. us, approx. 3 p.m. at sea."]),
        ("1. Add 2 and 2. 2. That is 4.", ["1. Add 2 and 2.", "2. That is 4."]),
        ("There are 24 hours in a day. 24 * 7 = 168.", ["There are 24 hours in a day.", "24 * 7 = 168."]),
        ("Add <<1+1=2>> then. Double it <<2*2=4>>.", ["Add", "<<1+1=2>>", "then.", "Double it", "<<2*2=4>>"]),
        ("a = b so c", ["a = b so c"]),
        ("<<1+1=2>>, <<2+2=4>>", ["<<1+1=2>>", "<<2+2=4>>"]),
        ("4-2=2, 2*3=6", ["4-2=2", "2*3=6"]),
        ("\u67093\u3002\u67095\u3002", ["\u67093\u3002", "\u67095\u3002"]),
    ],
)  # fmt: skip
def test_a_chain_is_split_at_notes_equations_or_sentences(text, steps):
    assert split_chain(text) == steps


@pytest.mark.parametrize(
    "sentences",
    [
        ["राम के पास 3.5 सेब हैं।", "वह 2 खरीदता है॥", "१. अब कितने?"],
        ["রাম যায়।", "সে আসে।"],
        ["اس کے پاس 3 سیب ہیں۔", "کتنے ہیں؟", "پانچ۔"],
        ["ሦስት አለው።", "ስንት ገዛ፧", "ሁለት።"],
        ["他有 3.5 个。", "他买 2 个！”", "几个？"],
        ["値は３．１４です．", "次に５。"],
        ["Նա ունի երեք։", "Նա գնեց։"],
        ["သူ။", "မ။"],
        ["He has $3.50 vs. 4.", "Mr. Lee met J. Watt!", "So?"],
    ],
    ids=["hindi", "bengali", "urdu", "ethiopic", "chinese", "japanese", "armenian", "burmese", "english"],
)
def test_sentences_end_as_their_script_ends_them(sentences):
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_chain(" ".join(sentences)) == sentences


def test_a_blank_is_no_need_where_the_script_s_own_stop_ends_a_sentence():
    assert split_sentences("রাম যায়।সে আসে।") == ["রাম যায়।", "সে আসে।"]


def test_no_word_of_prose_is_lost():
    text = "Tom (age 5) has 1. He said: 'No.' Then 3.5 went... And e.g. two came! 7 left? Yes."
    assert " ".join(split_sentences(text)).split() == text.split()


@pytest.mark.parametrize(
    "content",
    [
        "How?||He has 2 apples. He eats 1. #### 1",
        {"question": "How?", "cot": "He has 2 apples. He eats 1. ", "answer": "1"},
        {"question": "How?", "cot": "He has 2 apples. He eats 1.", "answer": "#### 1"},
        {"question": "How?", "steps": ["He has 2 apples.", "He eats 1."], "answer": "1"},
        {"question": "How?", "steps": ["", "He has 2 apples.", " ", "He eats 1."], "answer": 1},
        {"text": "How?||He has 2 apples. He eats 1. #### 1"},
        '{"question": "How?", "cot": "He has 2 apples. He eats 1.", "answer": "1"}',
    ],
)
def test_prose_becomes_one_step_a_sentence_in_every_mirror(content):
    assert parse("gsm8k_aug", content) == Example("How?", ["He has 2 apples.", "He eats 1."], "1")


def test_a_mirror_of_gsm8k_aug_may_lie_here_as_json_lines_or_as_a_list(tmp_path):
    record = json.dumps({"question": "How?", "cot": "<<1+1=2>>", "answer": "#### 2"})
    wanted = [Example("How?", ["<<1+1=2>>"], "2")] * 2
    assert read_text(tmp_path, f"{record}\n{record}\n", "gsm8k_aug").examples == wanted
    assert read_text(tmp_path, f"[{record}, {record}]", "gsm8k_aug").examples == wanted


# --- answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("72", "72"),
        ("-0", "0"),
        ("51.0", "51.0"),
        ("2.50", "2.50"),
        ("3244047.0999999996", "3244047.0999999996"),
        ("1e5", "1e5"),
        ("2.0107e-06", "2.0107e-06"),
        ("1E+400", "1E+400"),
        ("true", "true"),
        ("false", "false"),
        ('"#### 18"', "18"),
        ('"### -18 "', "-18"),
        ('"####18"', "18"),
        ('"Room #5"', "Room #5"),
        ('"07"', "07"),
        ('"1,000"', "1,000"),
    ],
)
@pytest.mark.parametrize("file_format", ["canonical", "gsm8k_aug"])
def test_an_answer_keeps_the_text_that_the_file_has(tmp_path, literal, text, file_format):
    row = f'{{"question": "q", "steps": [], "answer": {literal}}}'
    assert [e.answer for e in read_text(tmp_path, f"{row}\n{row}", file_format).examples] == [text, text]


@pytest.mark.parametrize("value", [2.0, True, False, 7])
def test_scalars_of_a_hub_set_are_written_like_those_of_a_file(value):
    record = {"question": "q", "steps": [], "answer": value}
    assert parse("canonical", record) == parse("canonical", json.dumps(record))


@pytest.mark.parametrize(
    ("file_format", "content"),
    [
        ("canonical", '[{"question": "q", "steps": [], "answer": "1", "answer": "2"}]'),
        ("prontoqa", '{"a": {"test_example": {"question": "q", "query": "r", "query": "s"}}}'),
        ("prontoqa", '{"a": {"question": "q"}, "a": {"question": "q"}}'),
        ("gsm8k", '{"question": "q", "question": "r", "answer": "#### 1"}\n{}'),
    ],
)
def test_a_key_that_stands_twice_is_named(tmp_path, file_format, content):
    with pytest.raises(ValueError, match=r"data\.txt.*key '(answer|query|a|question)' stands twice.*wanted it once"):
        read_text(tmp_path, content, file_format)


def test_rows_with_a_repeated_key_can_be_skipped(tmp_path):
    bad = '{"question": "q", "steps": [], "answer": "1", "answer": "2"}'
    text = f"[{canonical()}, {bad}]"
    assert read_text(tmp_path, text, "canonical", skip=True) == Reading(
        [Example("2 + 2 ?", ["4"], "4")], 2, {"repeated key": 1}
    )


# --- files of another kind ------------------------------------------------------------------

ROWS = "\n".join([canonical()] * 3).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return buffer.getvalue()


def tarred(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("rows.jsonl")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


FOREIGN = {
    "a Git LFS pointer": (POINTER, "git lfs pull"),
    "a gzip archive": (gzip.compress(ROWS), "gunzip"),
    "a zip archive": (zipped(ROWS), "unzip"),
    "a tar archive": (tarred(ROWS), "with tar"),
    "a bzip2 archive": (bz2.compress(ROWS), "bunzip2"),
    "an xz archive": (lzma.compress(ROWS), "unxz"),
    "a zstd archive": (b"\x28\xb5\x2f\xfd" + bytes(40), "unzstd"),
    "a Parquet table": (b"PAR1" + bytes(40), "JSON Lines"),
    "a web page": (b"\n <!DOCTYPE html>\n<html><body>404</body></html>", "download the raw file"),
    "UTF-16 text": (ROWS.decode().encode("utf-16"), "save the file as UTF-8"),
    "UTF-16 text without a mark": (ROWS.decode().encode("utf-16-le"), "save the file as UTF-8"),
    "UTF-32 text": (ROWS.decode().encode("utf-32"), "save the file as UTF-8"),
    "CSV": (b"question,steps,answer\n2 + 2 ?,4,4\n", "save the table as JSON Lines"),
    "CSV of pandas": (b"\xef\xbb\xbf,question,answer\n0,2 + 2 ?,4\n", "save the table as JSON Lines"),
    "quoted CSV": (b'"question","answer"\n"2 + 2, 3 ?","4"\n', "save the table as JSON Lines"),
    "TSV": (b"question\tanswer\n2 + 2 ?\t4\n", "save the table as JSON Lines"),
}


@pytest.mark.parametrize(("content", "cure"), FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("file_format", ["canonical", "gsm8k", "gsm8k_aug", "multiplication", "prontoqa"])
@pytest.mark.parametrize("skip", [False, True], ids=["strict", "skipping"])
def test_a_file_of_another_kind_is_named_with_the_cure(tmp_path, content, cure, file_format, skip):
    kind = next(name for name in FOREIGN if FOREIGN[name][0] is content)
    with pytest.raises(ValueError, match=cure) as caught:
        read_text(tmp_path, content, file_format, skip=skip)
    assert "data.txt: found " in str(caught.value)
    assert kind.split(" of ")[0].split(" without ")[0].removeprefix("quoted ") in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"a", b"{}", ROWS, "Ît||<<1=1>> #### 1".encode(), b"\x00\x00\x00\x00"])
def test_text_is_not_taken_for_another_kind(content):
    assert describe_foreign(content) is None


def test_a_line_with_commas_is_no_table(tmp_path):
    line = "Tom has one, two, three||<<1+2=3>> #### 3"
    assert len(read_text(tmp_path, f"{line}\n{line}", "gsm8k_aug").examples) == 2


def test_a_misspelt_file_name_is_corrected(tmp_path):
    (tmp_path / "prosqa_train.json").write_text("[]")
    with pytest.raises(ValueError, match=r"prosqa_trian\.json: no such file.*; did you mean prosqa_train\.json\?"):
        read(tmp_path / "prosqa_trian.json", "prosqa")


# --- JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.json:1: not valid JSON at column 1"),
        (b"[]", "x.json: found a list, wanted a JSON object"),
        (b"null", "x.json: found null, wanted a JSON object"),
        (b'{"a": 1, "b": 2, "a": 3}', "x.json: key 'a' stands twice"),
        (b'{"a": ' * 2_000_000, "x.json: not usable JSON: it is nested too deeply"),
        (b"[" * 2_000_000, "x.json: not usable JSON: it is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "x.json: not usable JSON: it holds a whole number of more than 4300 digits"),
        (POINTER, "x.json: found a Git LFS pointer"),
        (b'{"a": "\xff"}', "x.json:1: byte 0xff at offset 7 is not UTF-8"),
    ],
    ids=["empty", "list", "null", "twice", "deep objects", "deep lists", "digits", "pointer", "latin"],
)
def test_a_json_file_that_cannot_be_used_is_one_sentence(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json") as caught:
        read_json_object(tmp_path / "x.json")
    assert message in str(caught.value)


def test_an_object_of_very_many_keys_is_read_at_once():
    many = ", ".join(f'"k{i}": {i}' for i in range(200_000))
    assert len(parse_json(f"{{{many}}}")) == 200_000
    assert parse_json(f'{{{many}, "k7": 0}}').key == "k7"


@pytest.mark.parametrize("file_format", sorted(PARSERS))
def test_json_nested_two_million_deep_is_said_in_words(tmp_path, file_format):
    for content in ("[" * 2_000_000, '{"question": ' * 2_000_000, '{"question": 1}\n' + "[" * 2_000_000):
        with pytest.raises(ValueError, match=r"data\.txt") as caught:
            read_text(tmp_path, content, file_format)
        assert len(str(caught.value)) < 500


# --- the real files -------------------------------------------------------------------------


def test_the_references_own_rows_are_all_kept_and_empty_steps_are_counted():
    reading = read(shared("gsm8k_aug_valid_canonical.json"), "canonical")
    assert (len(reading.examples), reading.num_empty_steps, reading.malformed) == (500, 6, {})
    assert reading.examples == read(shared("gsm8k_aug_valid.txt"), "gsm8k_aug").examples


@pytest.mark.parametrize("name", ["gsm_hard.jsonl", "svamp.json", "multiarith.jsonl", "aqua_test.json"])
@pytest.mark.parametrize("file_format", ["canonical", "gsm8k", "gsm8k_aug"])
def test_a_published_file_without_the_fields_of_the_format_names_the_missing_one(name, file_format):
    with pytest.raises(ValueError, match=rf"{name}.*(no (question|answer|steps|cot)|no '####')"):
        read(shared(name), file_format)


def test_equations_that_run_together_are_refused_with_a_cure():
    with pytest.raises(ValueError, match="several equations run together"):
        split_chain("4 - 2 = 2 2 * 3 = 6")


def test_a_page_of_comments_is_recognised_at_once():
    assert describe_foreign(b"<!---->" * 140 + b"x") is None
    assert describe_foreign(b"<!-- a --> <!-- b --><HTML>").startswith("found a web page")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"/annex/objects/MD5-s3--abc\n", "git-annex"),
        (b"<<<<<<< HEAD\n{", "git conflict"),
        (b"Rar!\x1a\x07\x00", "RAR"),
    ],
)
def test_files_that_stand_for_others_are_named(content, found):
    assert found in describe_foreign(content)
