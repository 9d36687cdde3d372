"""Tests of the readers: real files, every oddity of theirs, and bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coconut.config.schema import DataConfig, Source
from coconut.data.examples import MARKERS, Example
from coconut.data.sources import Reading, read_split

SHARED = Path(__file__).parents[2] / "shared" / "data"


def config(raw_dir, source, *, skip=False):
    return DataConfig(
        seed=0,
        raw_dir=str(raw_dir),
        train=source,
        valid=source,
        tests={"test": source},
        generator=None,
        skip_bad_rows=skip,
        max_train=None,
    )


def read(path, file_format, *, skip=False, **slicing):
    source = Source(format=file_format, file=path.name, **slicing)
    return read_split(config(path.parent, source, skip=skip), "train")


def read_text(tmp_path, text, file_format, **options):
    path = tmp_path / "data.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read(path, file_format, **options)


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is absent: the real data are not shipped")
    return path


def canonical(question="2 + 2 ?", steps=("4",), answer="4"):
    return json.dumps({"question": question, "steps": list(steps), "answer": answer})


# --- each format ----------------------------------------------------------------------------


def test_gsm8k_notes_become_the_steps_and_the_prose_goes(tmp_path):
    row = {"question": "How many?", "answer": "First 48/2 = <<48/2=24>>24.\nThen $<<24+.5=24.5>>24.5 # so\n#### 1,080"}
    reading = read_text(tmp_path, json.dumps(row) + "\n" + json.dumps(row) + "\n", "gsm8k")
    assert reading.examples[0] == Example("How many?", ["<<48/2=24>>", "<<24+.5=24.5>>"], "1,080")


def test_gsm8k_solution_without_a_note_has_no_steps(tmp_path):
    row = json.dumps({"question": "Which?", "answer": "Let p be it\n#### -7"})
    assert read_text(tmp_path, f"[{row}]", "gsm8k").examples == [Example("Which?", [], "-7")]


@pytest.mark.parametrize(
    ("line", "example"),
    [
        ("How?||<<4-2=2>> <<2/.5=4>> #### 300", Example("How?", ["<<4-2=2>>", "<<2/.5=4>>"], "300")),
        ("No chain|| #### 9", Example("No chain", [], "9")),
        ("No chain||#### 9", Example("No chain", [], "9")),
        ("The # of #1 fans?||<<1=1>> #### 5,000", Example("The # of #1 fans?", ["<<1=1>>"], "5,000")),
        ("“It\u2019s” how?||<<2=2>> #### .5", Example("“It\u2019s” how?", ["<<2=2>>"], ".5")),
        ("Minus?||<<20=20>> #### -146", Example("Minus?", ["<<20=20>>"], "-146")),
        ("Glued?||<<1+1=2>><<2+2=4>> #### 4", Example("Glued?", ["<<1+1=2>>", "<<2+2=4>>"], "4")),
        ("Spaced?||<<1 + 1 = 2>> so #### 2", Example("Spaced?", ["<<1 + 1 = 2>>", "so"], "2")),
        ("Twice?||<<1=1>> #### 3 #### 4", Example("Twice?", ["<<1=1>>", "#### 3"], "4")),
        ("A # in a step||<<1=1>> #2 #### 2", Example("A # in a step", ["<<1=1>>", "#2"], "2")),
    ],
)
def test_gsm8k_aug_lines_with_their_oddities(tmp_path, line, example):
    assert read_text(tmp_path, line + "\r\n", "gsm8k_aug").examples == [example]


def test_prosqa_keeps_the_text_and_leaves_the_graph(tmp_path):
    record = json.loads(canonical("Is Tom a lempus or scrompus?", ["Tom is a terpus."], "Tom is a lempus."))
    text = json.dumps([record | {"edges": [[0, 1]], "root": 1, "target": 16}])
    assert read_text(tmp_path, text, "prosqa").examples == [
        Example("Is Tom a lempus or scrompus?", ["Tom is a terpus."], "Tom is a lempus.")
    ]


def test_prontoqa_joins_question_and_query_and_pairs_sentences(tmp_path):
    record = {
        "question": "Each vumpus is a brimpus. Max is a vumpus.",
        "query": "True or false: Max is not wooden.",
        "chain_of_thought": ["Max is a vumpus.", "Each vumpus is a brimpus.", "Max is a brimpus."],
        "answer": "True",
    }
    text = json.dumps({"example1": {"test_example": record}}, indent=1)
    assert read_text(tmp_path, text, "prontoqa").examples == [
        Example(
            "Each vumpus is a brimpus. Max is a vumpus. True or false: Max is not wooden.",
            ["Max is a vumpus. Each vumpus is a brimpus.", "Max is a brimpus."],
            "True",
        )
    ]


def test_multiplication_has_one_step_per_digit_of_the_right_factor(tmp_path):
    line = (
        "5 6 3 2 * 7 4 3 4||5 5 5 6 1 + 0 0 6 4 9 0 ( 5 5 1 1 1 1 ) + 0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 ) + 0 0 0 0 6 4 9 0"
    )
    assert read_text(tmp_path, f"{line} #### 5 5 6 0 8 2 0 1\n", "multiplication").examples == [
        Example(
            "5 6 3 2 * 7 4 3 4",
            ["5 5 5 6 1", "0 0 6 4 9 0 ( 5 5 1 1 1 1 )", "0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 )", "0 0 0 0 6 4 9 0"],
            "5 5 6 0 8 2 0 1",
        )
    ]


def test_canonical_json_and_json_lines_read_the_same_whatever_the_file_is_called(tmp_path):
    rows = [canonical("a", ["x", "y"], "b"), canonical("Ît\u2028c", [], "d")]
    wanted = [Example("a", ["x", "y"], "b"), Example("Ît\u2028c", [], "d")]
    assert read_text(tmp_path, f" [{', '.join(rows)}]\n", "canonical").examples == wanted
    assert read_text(tmp_path, "\ufeff" + "\r\n\r\n".join(rows) + "\r\n\n", "canonical").examples == wanted
    lines = "\n".join(json.dumps(json.loads(row), ensure_ascii=False) for row in rows)
    assert read_text(tmp_path, lines, "canonical").examples == wanted


def test_a_whole_number_as_answer_is_its_text(tmp_path):
    assert read_text(tmp_path, '[{"question": "q", "steps": [], "answer": 72}]', "canonical").examples[0].answer == "72"


# --- the real files -------------------------------------------------------------------------


def test_real_gsm8k_is_read_whole():
    reading = read(shared("gsm8k_train.jsonl"), "gsm8k")
    assert len(reading.examples) == reading.num_rows == 7473
    assert reading.examples[0].steps == ("<<48/2=24>>", "<<48+24=72>>")
    assert reading.examples[0].answer == "72"
    assert sum(not example.steps for example in reading.examples) == 95
    assert all(re.fullmatch(r"-?[\d,]+", example.answer) for example in reading.examples)


def test_real_gsm8k_aug_is_read_whole():
    examples = read(shared("gsm8k_aug_valid.txt"), "gsm8k_aug").examples
    assert len(examples) == 500
    assert examples[0].steps == ("<<4-2=2>>", "<<2/.5=4>>", "<<12/4=3>>", "<<100*3=300>>")
    assert all(re.fullmatch("<<[^<>]+=[^<>]+>>", step) for example in examples for step in example.steps)
    assert [e.answer for e in examples if "," in e.answer] == ["5,000", "30,000", "27,200", "3,380"]
    assert any(not example.steps for example in examples)


def test_real_prosqa_is_read_whole():
    examples = read(shared("prosqa_valid.json"), "prosqa").examples
    assert len(examples) == 300
    assert examples[0].steps == ("Tom is a terpus.", "Every terpus is a brimpus.", "Every brimpus is a lempus.")
    assert {len(example.steps) for example in examples} == {3, 4, 5, 6}


def test_real_prontoqa_is_read_whole():
    examples = read(shared("prontoqa_5hop_raw.json"), "prontoqa").examples
    assert len(examples) == 400
    assert {len(example.steps) for example in examples} == {6}
    assert examples[0].steps[0] == "Max is a vumpus. Each vumpus is a brimpus."
    assert examples[0].question.endswith("Max is a lorpus. True or false: Max is not wooden.")
    assert {example.answer for example in examples} == {"True", "False"}


def test_real_multiplication_loses_nothing_of_its_lines():
    path = shared("mult_4x4_valid.txt")
    examples = read(path, "multiplication").examples
    lines = [f"{e.question}||{' + '.join(e.steps)} #### {e.answer}" for e in examples]
    assert "\n".join(lines) + "\n" == path.read_text()
    assert {len(example.steps) for example in examples} == {4}


# --- slices ---------------------------------------------------------------------------------


def test_start_and_rows_cut_a_file_into_splits_that_meet(tmp_path):
    text = "\n".join(canonical(question) for question in "abcde")
    questions = lambda **slicing: "".join(  # noqa: E731
        e.question for e in read_text(tmp_path, text, "canonical", **slicing).examples
    )
    assert questions(rows=2) == "ab"
    assert questions(start=2, rows=2) == "cd"
    assert questions(start=4) == "e"
    assert questions(start=3, rows=9) == "de"


def test_a_slice_counts_bad_rows_so_that_dropping_them_moves_no_border(tmp_path):
    text = "\n".join([canonical("a"), "{", canonical("c"), canonical("d")])
    first = read_text(tmp_path, text, "canonical", rows=2, skip=True)
    second = read_text(tmp_path, text, "canonical", start=2)
    assert [e.question for e in first.examples] == ["a"]
    assert [e.question for e in second.examples] == ["c", "d"]


def test_a_start_beyond_the_file_says_how_many_rows_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train\.start: found 2, wanted less than 2"):
        read_text(tmp_path, f"{canonical()}\n{canonical()}\n", "canonical", start=2)


# --- bad input ------------------------------------------------------------------------------

BAD_FILES = {
    "empty": ("canonical", b"", "no row in it"),
    "empty text": ("gsm8k_aug", b"", "no row in it"),
    "empty prontoqa": ("prontoqa", b"", "no row in it"),
    "blank": ("gsm8k", b" \n\n ", "no row in it"),
    "empty list": ("prosqa", b"[]", "no row in it"),
    "not UTF-8": ("gsm8k_aug", "a||#### 1\ncafé||#### 2\n".encode("latin-1"), r"data.txt:2: byte 0xe9 at offset 13"),
    "UTF-16": ("canonical", "[]".encode("utf-16"), r"data.txt: found UTF-16 text, wanted text in UTF-8; save the file"),
    "truncated list": (
        "prosqa",
        f"[{canonical()},\n{canonical()[:20]}".encode(),
        r"data.txt:2: not valid JSON at column",
    ),
    "truncated object": ("prontoqa", b'{"example1": {\n"test_exa', r"data.txt:2: not valid JSON at column"),
    "object for list": ("prosqa", b'{"data": []}', "found a JSON object, wanted a list"),
    "pretty object for list": ("canonical", b'{\n "question": "a"\n}', "found a JSON object, wanted a list"),
    "list for object": ("prontoqa", b"[]", "found a list, wanted a JSON object"),
    "pretty object cut short": (
        "canonical",
        b'{\n "question": "a",\n "steps": [\n  "b"',
        "found no line that is a JSON object, wanted a list of objects, or JSON Lines .* cut short, restore it",
    ),
    "two pretty objects": (
        "gsm8k",
        b'{\n "question": "a"\n}\n{\n "question": "b"\n}',
        "found no line that is a JSON object",
    ),
    "huge number": (
        "prosqa",
        b'[{"id": ' + b"1" * 5000 + b"}]",
        "not usable JSON: it holds a whole number of more than 4300",
    ),
    "deep nesting": ("prosqa", b"[" * 100_000, "not usable JSON|not valid JSON"),
}


@pytest.mark.parametrize(("file_format", "content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
@pytest.mark.parametrize("skip", [False, True], ids=["strict", "skipping"])
def test_an_unusable_file_is_an_error_even_where_bad_rows_are_skipped(tmp_path, file_format, content, message, skip):
    with pytest.raises(ValueError, match=message) as caught:
        read_text(tmp_path, content, file_format, skip=skip)
    assert "data.txt" in str(caught.value)


def test_a_missing_file_names_the_parameter_and_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json: no such file.*data\.train\.file.*data/raw/README\.md"):
        read(tmp_path / "nowhere.json", "prosqa")
    with pytest.raises(ValueError, match="a folder, wanted the file"):
        read(tmp_path, "prosqa")


BAD_ROWS = {
    "cut line of JSON": ("canonical", canonical()[:-9], "not JSON", "not valid JSON"),
    "a list": ("canonical", "[1]", "wrong type", "found a list, wanted a JSON object"),
    "no question": ("canonical", '{"steps": [], "answer": "1"}', "missing field", "no question among 'steps, answer'"),
    "no steps": ("canonical", '{"question": "a", "answer": "1"}', "missing field", "no steps"),
    "no answer": ("canonical", '{"question": "a", "steps": []}', "no answer", "no answer among"),
    "null answer": ("gsm8k", '{"question": "a", "answer": null}', "no answer", "no answer among"),
    "empty answer": ("canonical", canonical(answer=""), "no answer", "answer is empty"),
    "blank answer": ("canonical", canonical(answer=" \t"), "no answer", "answer is empty"),
    "blank question": ("canonical", canonical(question=" "), "empty text", "question is empty"),
    "steps as text": ("canonical", canonical().replace('["4"]', '"4"'), "wrong type", "steps is text, wanted a list"),
    "step as object": ("canonical", canonical(steps=[{}]), "wrong type", r"steps\[0\] is an object, wanted text"),
    "answer as a list": ("canonical", canonical(answer=[1]), "wrong type", "answer is a list, wanted text"),
    "answer as an object": ("canonical", canonical(answer={"value": 1}), "wrong type", "answer is an object"),
    "answer that is no number": ("canonical", canonical(answer=float("nan")), "wrong type", "answer is nan"),
    "a key twice": (
        "canonical",
        '{"question": "a", "steps": [], "answer": "1", "answer": "2"}',
        "repeated key",
        "key 'answer' stands twice in the object, wanted it once",
    ),
    "answer of two lines": (
        "canonical",
        canonical(answer="yes\nsure"),
        "unusable answer",
        "answer is 'yes.*wanted one line",
    ),
    "answer of two lines for Unicode": (
        "canonical",
        canonical(answer="a\u2028b"),
        "unusable answer",
        "wanted one line",
    ),
    "answer that ends in a marker": ("canonical", canonical(answer="C###"), "unusable answer", "without '###'"),
    "marker as answer": ("gsm8k_aug", "How?||<<1=1>> #### ###", "unusable answer", "answer is '###', wanted"),
    "full stop as answer": ("canonical", canonical(answer="."), "unusable answer", "more than a full stop"),
    "huge number": (
        "canonical",
        canonical(answer="@").replace('"@"', "1" * 5000),
        "not JSON",
        "it holds a whole number of more than 4300 digits, wanted fewer, or text; found",
    ),
    "a product's factors alone": (
        "multiplication",
        "5 6||5 2 #### 5 2",
        "layout",
        "question is '5 6', wanted the digits",
    ),
    "aug line as multiplication": (
        "multiplication",
        "How many?||<<1+1=2>> #### 2",
        "layout",
        "question is 'How many.', wanted the digits of two numbers with . between them.*the format is another",
    ),
    "half a character": ("canonical", canonical(question="\ud83d"), "not UTF-8", "lone surrogate"),
    "gsm8k without ####": ("gsm8k", '{"question": "a", "answer": "It is 7"}', "no answer", "no '####'"),
    "gsm8k with empty ####": (
        "gsm8k",
        '{"question": "a", "answer": "It is 7\\n#### "}',
        "no answer",
        "answer is empty",
    ),
    "aug without ||": ("gsm8k_aug", "How? <<1+1=2>> #### 2", "layout", "1 fields separated by '||', expected 2"),
    "aug with two ||": ("gsm8k_aug", "How?||<<1+1=2>>||#### 2", "layout", "3 fields separated by '||', expected 2"),
    "cut aug line": ("gsm8k_aug", "How?||<<1+1=", "no answer", "no '####'"),
    "cut multiplication": ("multiplication", "5 * 5||5 2 ##", "no answer", "no '####'"),
}


@pytest.mark.parametrize(("file_format", "row", "reason", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_malformed_row_names_file_and_line_or_is_dropped_and_counted(tmp_path, file_format, row, reason, message):
    good = {
        "canonical": canonical(),
        "gsm8k": '{"question": "2 + 2 ?", "answer": "<<2+2=4>> #### 4"}',
        "gsm8k_aug": "2 + 2 ?||<<2+2=4>> #### 4",
        "multiplication": "2 * 2||4 0 #### 4 0",
    }[file_format]
    text = f"{good}\n\n{row}\n{good}\n"
    with pytest.raises(ValueError, match=r"data\.txt:3: .*data\.skip_bad_rows: true") as caught:
        read_text(tmp_path, text, file_format)
    assert re.search(re.escape(message) if "|" in message else message, str(caught.value))
    reading = read_text(tmp_path, text, file_format, skip=True)
    assert (len(reading.examples), reading.num_rows, reading.malformed) == (2, 3, {reason: 1})


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("part", ["question", "steps", "answer"])
def test_an_example_that_holds_a_markers_text_is_malformed(tmp_path, part, marker):
    text = f"say {marker} now"
    bad = canonical(**{part: [text] if part == "steps" else text})
    with pytest.raises(ValueError, match=rf"data\.txt: record 2: {part}.* holds the marker {re.escape(marker)}"):
        read_text(tmp_path, f"[{canonical()}, {bad}]", "canonical")
    assert read_text(tmp_path, f"[{canonical()}, {bad}]", "canonical", skip=True) == Reading(
        [Example("2 + 2 ?", ["4"], "4")], 2, {"marker": 1}
    )


@pytest.mark.parametrize("file_format", ["canonical", "prosqa", "gsm8k", "gsm8k_aug", "multiplication", "prontoqa"])
def test_advice_for_programmers_never_reaches_a_user(tmp_path, file_format):
    with pytest.raises(ValueError, match=r"data\.txt") as caught:
        read_text(tmp_path, f'{{"a": {"1" * 5000}}}', file_format)
    assert "set_int_max_str_digits" not in str(caught.value)


def test_one_cut_line_after_bad_lines_is_still_a_matter_of_rows(tmp_path):
    text = "\n".join(["# made by hand", "", canonical(), "{"])
    with pytest.raises(ValueError, match=r"data\.txt:1: not valid JSON.*skip_bad_rows"):
        read_text(tmp_path, text, "canonical")
    assert read_text(tmp_path, text, "canonical", skip=True).malformed == {"not JSON": 2}


def test_a_prontoqa_record_without_its_chain_is_named(tmp_path):
    text = json.dumps({"example7": {"test_example": {"question": "a", "query": "b", "answer": "True"}}})
    with pytest.raises(ValueError, match="record 'example7': no chain_of_thought"):
        read_text(tmp_path, text, "prontoqa")


def test_messages_show_control_characters_escaped_and_long_text_cut(tmp_path):
    with pytest.raises(ValueError, match="no '####'") as caught:
        read_text(tmp_path, "q||" + "\x1b[31m" + "x" * 1000, "gsm8k_aug")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


# --- the hub --------------------------------------------------------------------------------


@pytest.fixture
def hub_set(tmp_path, monkeypatch):
    """Write a folder that `datasets` loads like a set on the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(records, file_format, **options):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
        source = Source(format=file_format, hub=str(folder), **{"hub_split": "train"} | options)
        return read_split(config(tmp_path, source), "train")

    return write


@pytest.mark.parametrize(
    ("file_format", "row", "example"),
    [
        (
            "gsm8k",
            {"question": "How?", "answer": "<<1+1=2>>2\n#### 1,002"},
            Example("How?", ["<<1+1=2>>"], "1,002"),
        ),
        (
            "gsm8k_aug",
            {"question": "How?", "cot": "<<1+1=2>> <<2+2=4>>", "answer": "4"},
            Example("How?", ["<<1+1=2>>", "<<2+2=4>>"], "4"),
        ),
        ("gsm8k_aug", {"question": "How?", "cot": "", "answer": "4"}, Example("How?", [], "4")),
        (
            "gsm8k_aug",
            {"question": "How?", "steps": ["<<1+1=2>>", "<<2+2=4>>"], "answer": "4"},
            Example("How?", ["<<1+1=2>>", "<<2+2=4>>"], "4"),
        ),
        ("gsm8k_aug", {"text": "How?||<<1+1=2>> #### 2"}, Example("How?", ["<<1+1=2>>"], "2")),
        ("canonical", {"question": "How?", "steps": ["so"], "answer": 4}, Example("How?", ["so"], "4")),
        (
            "prontoqa",
            {"question": "A.", "query": "B?", "chain_of_thought": ["1.", "2.", "3."], "answer": "True"},
            Example("A. B?", ["1. 2.", "3."], "True"),
        ),
        ("multiplication", {"text": "5 * 5||5 2 #### 5 2"}, Example("5 * 5", ["5 2"], "5 2")),
        (
            "svamp",
            {"Body": "Tom has 2", "Question": "How many?", "Answer": 2.0},
            Example("Tom has 2 How many?", [], "2.0"),
        ),
        (
            "commonsense_qa",
            {"question": "Dry?", "choices": {"label": ["A", "B"], "text": ["sea", "sand"]}, "answerKey": "B"},
            Example("Dry?\nA) sea\nB) sand", [], "B"),
        ),
        (
            "strategy_qa",
            {"question": "So?", "cot": "It is. Yes.", "answer": True},
            Example("So?", ["It is.", "Yes."], "true"),
        ),
    ],
)
def test_hub_rows_go_through_the_parsers_of_files(hub_set, file_format, row, example):
    assert hub_set([row, row], file_format).examples == [example, example]


def test_a_hub_set_is_sliced_like_a_file_and_its_bad_rows_are_named(hub_set):
    rows = [json.loads(canonical(question)) for question in "abc"]
    assert [e.question for e in hub_set(rows, "canonical", start=1, rows=1).examples] == ["b"]
    with pytest.raises(ValueError, match=r"set \[train\]: row 1: answer is empty"):
        hub_set([*rows[:1], json.loads(canonical(answer=""))], "canonical")


def test_an_unknown_hub_set_or_split_says_what_to_check(hub_set, tmp_path):
    rows = [json.loads(canonical())]
    with pytest.raises(ValueError, match=r"data\.train\.hub: .*\[tset\] cannot be loaded: .*check hub"):
        hub_set(rows, "canonical", hub_split="tset")
    with pytest.raises(ValueError, match=r"data\.train\.hub_split: found null"):
        hub_set(rows, "canonical", hub_split=None)
    source = Source(format="canonical", hub=str(tmp_path / "nowhere"), hub_split="train")
    with pytest.raises(ValueError, match=r"nowhere \[train\] cannot be loaded: .*check hub"):
        read_split(config(tmp_path, source), "train")


def test_preprocessing_imports_neither_torch_nor_transformers_nor_datasets():
    code = (
        "import sys, coconut.data.preprocessing;"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
