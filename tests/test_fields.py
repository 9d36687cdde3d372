"""Maps of fields: what each key takes from a row, presets on published forms, and every wrong map and row."""

import json

import pytest

from coconut.config.schema import Fields, Source
from coconut.data.examples import Example
from coconut.data.sources import read_split
from coconut.evaluation.answers import extract_answer, same_answer
from test_sources import config, shared

QA = Fields(question="q", answer="a")


def read(path, file_format="fields", fields=None, *, skip=False, **slicing):
    source = Source(format=file_format, file=path.name, fields=fields, **slicing)
    return read_split(config(path.parent, source, skip=skip), "test")


def read_rows(tmp_path, rows, file_format="fields", fields=None, **options):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return read(path, file_format, fields, **options)


def assert_every_gold_is_right_by_itself(examples):
    wrong = [e.answer for e in examples if not same_answer(extract_answer(f"### {e.answer}"), e.answer)]
    assert wrong == []


@pytest.mark.parametrize(
    ("file_format", "name", "num_rows"),
    [
        ("gsm_hard", "gsm_hard.jsonl", 1319),
        ("svamp", "svamp.json", 1000),
        ("multiarith", "multiarith.jsonl", 600),
        ("aqua", "aqua_test.json", 254),
        ("gsm8k_platinum", "gsm8k_train.jsonl", 7473),
    ],
)
def test_every_row_of_a_published_file_is_read_and_every_gold_is_right_by_itself(file_format, name, num_rows):
    reading = read(shared(name), file_format)
    assert (reading.num_rows, len(reading.examples), reading.malformed) == (num_rows, num_rows, {})
    assert_every_gold_is_right_by_itself(reading.examples)


def test_a_template_joins_fields_and_an_answer_keeps_its_text(tmp_path):
    rows = [{"Body": "Tom has 2.", "Question": "How many?", "Answer": "007"}]
    fields = Fields(question="{Body} {Question} {{in km}}", answer="Answer")
    assert read_rows(tmp_path, rows, fields=fields).examples == [Example("Tom has 2. How many? {in km}", [], "007")]
