"""Maps of fields: what each key takes from a row, and every wrong map and row."""

import json
import re
from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.config.field_map import Fields, IsNot
from coconut.config.schema import Source
from coconut.config.strict import parse
from coconut.config.templates import MAX_DEPTH, parse_template
from coconut.data.examples import Example
from coconut.data.fields import FieldReader, choose_reader, find_field
from coconut.data.records import RowError
from coconut.data.sources import read_split
from coconut.evaluation.answers import extract_answer, same_answer
from test_sources import config

QA = Fields(question="q", answer="a")


def read(path, file_format="fields", fields=None, *, skip=False, **slicing):
    source = Source(format=file_format, file=path.name, fields=fields, **slicing)
    return read_split(config(path.parent, source, skip=skip), "test")


def read_rows(tmp_path, records, file_format="fields", fields=QA, **options):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return read(path, file_format, fields, **options)


def parse_row(row, **keys):
    return FieldReader(Fields(**{"question": "q", "answer": "a"} | keys)).parse({"q": "How?", "a": "4"} | row).example


# --- templates and paths --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("q", "How?"),
        ("{q}", "How?"),
        ("{q} {a}", "How? 4"),
        ("Q: {q}", "Q: How?"),
        ("{{{q}}} in {{km}}", "{How?} in {km}"),
        ("{a}{a}", "44"),
        ("{inner.text.1}", "b"),
        ("inner.dotted.name", "whole"),
        ("{q: x!r}", "odd name"),
        ("{0}", "zero"),
        ("{empty}{q}", "How?"),
    ],
)
def test_a_template_writes_texts_and_fields(value, text):
    row = {"inner": {"text": ["a", "b"], "dotted.name": "whole"}, "q: x!r": "odd name", "0": "zero", "empty": ""}
    assert parse_row(row, question=value).question == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{q", "{ at character 1 has no partner"),
        ("{q} }", "} at character 5 has no partner"),
        ("{a{b}}", "{ at character 1 has no partner"),
        ("{{q}}", "names no field"),
        ("{}", "wanted the name of a field"),
        ("", "wanted the name of a field"),
        ("a..b", "wanted the name of a field"),
        ("{q.}", "wanted the name of a field"),
        (".".join("a" * (MAX_DEPTH + 1)), f"a path of {MAX_DEPTH + 1} keys"),
    ],
)
def test_a_template_that_cannot_be_read_is_an_error_of_params(value, message):
    with pytest.raises(ValueError, match="found") as caught:
        parse_template(value)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["{q.__class__}", "{q.__class__.__mro__}", "{__import__('os')}", "q.upper", "{q[0]}"])
def test_a_hostile_template_reads_no_attribute_and_runs_nothing(value):
    with pytest.raises(RowError, match=r"^no .*(q is text, wanted an object|among q, a)"):
        parse_row({}, question=value)


@given(st.dictionaries(st.text("abc.{}$", min_size=1, max_size=3), st.text(max_size=4), min_size=1), st.text("ab{}. $"))
def test_a_template_gives_the_text_of_a_simple_replacement_or_an_error(row, value):
    try:
        template = parse_template(value)
    except ValueError:
        return
    try:
        found = "".join([template.texts[0], *(f"{find_field(row, path)}{text}" for path, text in
                                              zip(template.paths, template.texts[1:], strict=True))])  # fmt: skip
    except RowError:
        assert any(path not in row for path in template.paths)
        return
    wanted = value if "{" in value or "}" in value else f"{{{value}}}"
    for old, new in (("{{", "\0"), ("}}", "\1"), *((f"{{{key}}}", f"\2{i}\3") for i, key in enumerate(row))):
        wanted = wanted.replace(old, new)
    wanted = wanted.replace("\0", "{").replace("\1", "}")
    for i, text in enumerate(row.values()):
        wanted = wanted.replace(f"\2{i}\3", text)
    assert found == wanted or "{{{" in value or "}}}" in value  # The replacement cannot tell which braces pair.


OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So 4"},
    ]
}
SHAREGPT = {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So 4"}]}
NESTED = {"chat": {"turns": [{"role": "user", "content": [{"text": "How?"}]}, {"from": "gpt", "value": "4"}]}}


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (OPENAI, "messages[user].content", "messages[assistant].content"),
        ({"messages": OPENAI["messages"][1:]}, "messages[user].content", "messages[assistant].content"),
        (OPENAI, "{messages[user].content}", "{messages[assistant].content}"),
        (SHAREGPT, "conversations[human].value", "conversations[gpt].value"),
        ({"conversations": SHAREGPT["conversations"][::-1]}, "conversations[human].value", "conversations[gpt].value"),
        (NESTED, "chat.turns[user].content.0.text", "chat.turns[gpt].value"),
        ({"a[user]": "How?", "a": "4"}, "a[user]", "a"),
    ],
)
def test_a_message_is_found_by_its_role(row, question, answer):
    example = parse_row(row, question=question, answer=answer)
    assert (example.question, example.answer.rpartition(" ")[2]) == ("How?", "4")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (OPENAI["messages"][:1], r"m\[user\]: found 0 messages of 'user' among system, wanted one"),
        (OPENAI["messages"] * 2, r"m\[user\]: found 2 messages of 'user' among system, user, assistant, system, "),
        ([{"text": "x"}], r"m\[user\]: found 0 messages of 'user' among no role or from at all"),
        ("text", r"no m\[user\] among q, a, m"),
    ],
)
def test_a_role_that_no_message_has_or_several_is_an_error_that_names_the_roles(messages, message):
    with pytest.raises(RowError, match=message):
        parse_row({"m": messages}, question="m[user].content")


@pytest.mark.parametrize(
    ("row", "keys", "question"),
    [
        ({"c": None}, {"question": "{c} {q}"}, "How?"),
        ({"c": None}, {"question": "{q}\n{c}"}, "How?"),
        ({"c": ["one", "two", 3, None, "four"]}, {"question": "{c}. {q}", "join": "; "}, "one; two; 3; four. How?"),
        ({"c": ["one", "two"]}, {"question": "c", "join": "\n"}, "one\ntwo"),
        ({"c": {"d": ["one"]}}, {"question": "{c.d} {q}", "join": " "}, "one How?"),
        ({"c": []}, {"question": "{c} {q}", "join": " "}, "How?"),
    ],
)
def test_parts_that_are_null_are_left_out_and_lists_are_joined(row, keys, question):
    assert parse_row(row, **keys).question == question


def test_steps_in_a_list_of_paragraphs_are_split_after_they_are_joined():
    keys = {"steps": "s", "split_steps": "sentences", "join": "\n"}
    assert parse_row({"s": ["One. Two.", "Three."]}, **keys).steps == ("One.", "Two.", "Three.")


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        (
            {"q": ["x"]},
            {},
            'q is a list, wanted text; fields.join says what stands between its values, such as join: " "',
        ),
        ({"q": None}, {}, "q is null, wanted text"),
        ({"c": None, "q": None}, {"question": "{c} {q}"}, "c is null, wanted text"),
        ({"c": None}, {"answer": "{a} {c}"}, "c is null, wanted text"),
        ({"q": [["x"]]}, {"join": " "}, r"q\[0\] is a list, wanted text"),
        ({"q": []}, {"join": " "}, "question is empty, wanted text"),
    ],
)
def test_a_part_that_gives_no_text_is_named_with_the_cure(row, keys, message):
    with pytest.raises(RowError, match=message):
        parse_row(row, **keys)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So $x=\boxed{5}$.", "5"),
        (r"\boxed{1} is wrong; $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed {\text{(A)}}", r"\text{(A)}"),
        (r"\fbox{5} cm", "5"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{1}, so $\boxed 5$.", "5"),
        (r"It is \boxed 12.", "12"),
    ],
)
def test_a_gold_answer_is_what_the_last_box_holds(text, answer):
    assert parse_row({"a": text}, answer_in="boxed").answer == answer


@pytest.mark.parametrize(
    ("text", "message"),
    [("5", r"no \\boxed\{...\} in the answer's field"), (r"\boxed{5", r"a \\boxed\{ that is not closed")],
)
def test_a_text_without_a_whole_box_has_no_answer(text, message):
    with pytest.raises(RowError, match=message):
        parse_row({"a": text}, answer_in="boxed")


@pytest.mark.parametrize(
    "row",
    [
        {"c": ["2", "4", "6"], "a": 2, "names": "number"},
        {"c": ["2", "4", "6"], "a": "2.0", "names": "number"},
        {"c": ["2", "4", "6"], "a": 1.0, "names": "index"},
        {"c": ["2", "4", "6"], "a": "1", "names": "index"},
        {"c": ["2", "4", "6"], "a": [0, 1, 0], "names": "one_hot"},
        {"c": ["2", "4", "6"], "a": [False, True, False], "names": "one_hot"},
        {"c": ["2", "4", "6"], "a": [0.0, 1.0, 0.0], "names": "one_hot"},
        {"c": "A) 2 B) 4 C) 6", "a": "B", "names": None},
        {"c": "a ) 2 , b ) 4 , c ) 6", "a": "b", "names": None},
        {"c": "(A) 2\n(B) 4\n(C) 6", "a": "(B)", "names": None},
        {"c": "A. 2; B. 4; C. 6", "a": "4", "names": "text"},
        {"c": '["2", "4", "6"]', "a": "B", "names": None},
    ],
)
def test_an_answer_names_its_choice_in_every_published_way(row):
    example = parse_row(row, choices="c", answer_names=row["names"])
    assert (example.question, example.answer) == ("How?\nA) 2\nB) 4\nC) 6", "B")


def test_numbered_choices_in_one_text_keep_their_numbers():
    assert parse_row({"c": "1) red 2) blue", "a": 2}, choices="c").question == "How?\n1) red\n2) blue"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": [0, 1, 1]}, "a is 2 of 3 that are 1 or true, wanted a list with one of them"),
        ({"a": "B"}, "a is text, wanted a list with one of them"),
        ({"a": [0, 0, 0, 1]}, "the one_hot of no choice"),
        ({"c": "red or blue"}, "c is 'red or blue', wanted a list of choices, or one text such as"),
    ],
)
def test_choices_and_answers_that_name_none_are_refused(row, message):
    with pytest.raises(RowError, match=message):
        parse_row({"c": ["x", "y", "z"], "a": [1, 0, 0]} | row, choices="c", answer_names="one_hot")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("He has 9 * 2 = 18.\n#### 18\nThe answer is: 18", ("He has 9 * 2 = 18.",)),
        ("Two steps.\nThen 18.\n###  18\nThe answer is: 18", ("Two steps.", "Then 18.")),
        ("So 9.\n#### 9\nThen 18.\nThe answer is: 18", ("So 9.", "#### 9", "Then 18.")),
    ],
)
def test_a_line_that_only_says_the_answer_is_no_step(text, steps):
    keys = {"steps": "a", "split_steps": "separator", "separator": "\n", "answer_after": "The answer is:"}
    assert parse_row({"a": text}, **keys).steps == steps


# --- what each key takes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "steps", "wanted"),
    [
        ({}, ["a ", "", 2, 2.5, True], ["a", "2", "2.5", "true"]),
        ({"split_steps": "list"}, [], []),
        ({"split_steps": "separator", "separator": "|"}, "one | two||three", ["one", "two", "three"]),
        ({"split_steps": "separator", "separator": "\n"}, "one\ntwo", ["one", "two"]),
        ({"split_steps": "sentences"}, "He has 2 * $3.5. So he stops.", ["He has 2 * $3.5.", "So he stops."]),
        ({"split_steps": "chain"}, "<<1+1=2>> <<2+2=4>>", ["<<1+1=2>>", "<<2+2=4>>"]),
        ({"split_steps": "notes"}, "So <<1+1=2>>2 and <<2+2=4>>4.", ["<<1+1=2>>", "<<2+2=4>>"]),
        ({"split_steps": "notes"}, "", []),
    ],
)  # fmt: skip
def test_steps_part_by_the_rule(keys, steps, wanted):
    assert parse_row({"s": steps}, steps="s", **keys).steps == tuple(wanted)


def test_steps_of_the_answers_own_field_stand_before_its_marker():
    row = {"a": "He has <<1+1=2>>2. ## So.\n## <<9=9>> 2"}
    keys = {"answer_after": "## ", "steps": "a"}
    assert parse_row(row, split_steps="sentences", **keys).steps == ("He has <<1+1=2>>2.", "## So.")
    assert parse_row(row, split_steps="notes", **keys).steps == ("<<1+1=2>>",)


@pytest.mark.parametrize(
    ("keys", "value", "answer"),
    [
        ({}, "007", "007"),
        ({}, "1e5", "1e5"),
        ({}, "2.0", "2.0"),
        ({}, 2.0, "2.0"),
        ({}, -146, "-146"),
        ({}, "#### 18", "18"),
        ({}, True, "true"),
        ({}, "True", "True"),
        ({"answer_after": "####"}, "12 #### 13 #### 1,080", "1,080"),
        ({"answer_after": "The answer is: "}, "So. The answer is: 18", "18"),
        ({"answer_before": " ("}, "9 (apples)", "9"),
        ({"answer_before": " ("}, "9", "9"),
        ({"answer_after": "=", "answer_before": ";"}, "x=5; y", "5"),
        ({"booleans": "true_false"}, True, "true"),
        ({"booleans": "true_false"}, "Yes", "true"),
        ({"booleans": "yes_no"}, False, "no"),
        ({"booleans": "yes_no"}, " TRUE ", "yes"),
    ],
)
def test_an_answer_is_taken_as_published_but_for_its_rules(keys, value, answer):
    assert parse_row({"a": value}, **keys).answer == answer


LETTERS = "How?\nA) 2\nB) 4 km\nC) None of these"


@pytest.mark.parametrize(
    "choices",
    [
        ["A)2", "B)4 km", "C)None of these"],
        ["(A) 2", "(B)  4\nkm", "(C) None of these"],
        ["A. 2", "B. 4 km", "C. None of these"],
        ["A: 2", "B: 4 km", "C: None of these"],
        ["2", "4 km", "None of these"],
        [{"label": "A", "text": 2}, {"label": "B", "text": "4 km"}, {"label": "C", "text": "None of these"}],
        {"label": ["A", "B", "C"], "text": ["2", "4 km", "None of these"]},
        {"A": "2", "B": "4 km", "C": "None of these"},
    ],
)
def test_choices_are_written_in_one_way_whatever_their_form(choices):
    row = {"c": choices, "a": "B"}
    assert parse_row(row, choices="c") == Example(LETTERS, [], "B")
    assert parse_row(row, choices="c", answer_as="text").answer.split() == ["4", "km"]
    assert parse_row(row | {"a": " (b)."}, choices="c").answer == "B"
    assert parse_row(row | {"a": 1}, choices="c", answer_names="index").answer == "B"
    assert parse_row(row | {"a": "4  km"}, choices="c", answer_names="text").answer == "B"


@given(st.lists(st.text(max_size=6).filter(str.strip), min_size=2, max_size=26), st.integers(0, 25))
def test_every_form_of_the_same_choices_gives_the_same_example(texts, i):
    letters = ascii_uppercase[: len(texts)]
    forms = [
        [f"{letter}){text}" for letter, text in zip(letters, texts, strict=True)],
        [{"label": letter, "text": text} for letter, text in zip(letters, texts, strict=True)],
        {"label": list(letters), "text": texts},
        dict(zip(letters, texts, strict=True)),
    ]
    lines = [f"{letter}) {' '.join(text.split())}" for letter, text in zip(letters, texts, strict=True)]
    answer = letters[i % len(letters)]
    for form in forms:
        example = parse_row({"c": form, "a": answer}, choices="c")
        assert example == Example("\n".join(["How?", *lines]), [], answer)
        assert same_answer(extract_answer(f"### {lines[i % len(lines)]}"), answer) or not is_plain(
            texts[i % len(texts)]
        )


def is_plain(text):
    """Tell whether nothing in a choice could be another letter, or end the line of the answer."""
    return re.fullmatch("[x-z]+", text) is not None


def test_initials_are_no_letters_of_choices():
    row = {"c": ["T. Hardy", "B. Shaw"], "a": "A"}
    assert parse_row(row, choices="c").question == "How?\nA) T. Hardy\nB) B. Shaw"


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"kind": "x"}, "ab"),
        ({"kind": ("x", "y")}, "abc"),
        ({"kind": IsNot("x")}, "cde"),
        ({"kind": IsNot(("x", "y"))}, "de"),
        ({"kind": "x", "level": 2}, "b"),
        ({"level": True}, "c"),
        ({"level": 2.5}, "d"),
        ({"inner.0": "z"}, "e"),
    ],
)
def test_a_filter_keeps_rows_by_the_text_of_their_fields(tmp_path, where, kept):
    values = zip("abcde", ["x", "x", "y", None, "z"], [1, 2, True, 2.5, "2.50"], strict=True)
    rows = [{"q": q, "a": 1, "kind": kind, "level": level, "inner": [kind]} for q, kind, level in values]
    fields = Fields(question="q", answer="a", where=where)
    reading = read_rows(tmp_path, rows, fields=fields)
    assert "".join(e.question for e in reading.examples) == kept
    assert (reading.num_rows, reading.num_left_out) == (len(kept), 5 - len(kept))
    assert [e.question for e in read_rows(tmp_path, rows, fields=fields, rows=1).examples] == [kept[0]]


# --- rows that cannot be read ---------------------------------------------------------------

BAD_ROWS = {
    "missing field": ({"q": "x", "b": 1}, {}, "missing field", "no a among q, b"),
    "near miss": ({"Q": "x", "a": "1"}, {}, "missing field", "no q among Q, a; did you mean Q?"),
    "null answer": ({"q": "x", "a": None}, {}, "no answer", "a is null, wanted text"),
    "null question": ({"q": None, "a": 1}, {}, "missing field", "q is null, wanted text"),
    "empty answer": ({"q": "x", "a": ""}, {}, "no answer", "a is empty"),
    "list": ({"q": ["x"], "a": "1"}, {}, "wrong type", "q is a list, wanted text"),
    "object": ({"q": "x", "a": {"b": 1}}, {}, "wrong type", "a is an object, wanted text"),
    "NaN": ({"q": "x", "a": float("nan")}, {}, "wrong type", "a is nan, wanted text"),
    "Infinity": ({"q": "x", "a": float("-inf")}, {}, "wrong type", "a is -inf, wanted text"),
    "NaN as text": ({"q": "x", "a": "NaN"}, {}, "no answer", "as programs write a missing value"),
    "None as text": ({"q": "x", "a": "None"}, {}, "no answer", "leave such rows out with fields.where"),
    "text as steps": ({"q": "x", "a": "1", "s": "y"}, {"steps": "s"}, "wrong type", "fields.split_steps says how"),
    "list as text of steps": (
        {"q": "x", "a": "1", "s": ["y"]},
        {"steps": "s", "split_steps": "sentences"},
        "wrong type",
        "s is a list, wanted text",
    ),
    "null step": ({"q": "x", "a": "1", "s": [None]}, {"steps": "s"}, "wrong type", "s[0] is null, wanted text"),
    "no steps": ({"q": "x", "a": "1"}, {"steps": "s"}, "missing field", "no s among q, a"),
    "too deep": ({"q": "x", "a": "1"}, {"answer": "a.text"}, "wrong type", "no a.text: a is text, wanted an object"),
    "short list": ({"q": "x", "a": ["1"]}, {"answer": "a.1"}, "missing field", "a is a list of 1, wanted the number"),
    "key of a list": ({"q": "x", "a": ["1"]}, {"answer": "a.b"}, "missing field", "in place of b"),
    "huge index": ({"q": "x", "a": ["1"]}, {"answer": f"a.{'9' * 5000}"}, "missing field", "a is a list of 1"),
    "no marker": ({"q": "x", "a": "18"}, {"answer_after": "##"}, "no answer", "no '##' before an answer"),
    "two answers": ({"q": "x", "a": "1 (a); 2 (b)"}, {"answer_before": " ("}, "several answers", "twice"),
    "no truth value": ({"q": "x", "a": "1"}, {"booleans": "yes_no"}, "no truth value", "wanted true, false, yes or no"),
    "unknown letter": ({"q": "x", "a": "C", "c": ["1", "2"]}, {"choices": "c"}, "choices", "the letter of no choice"),
    "equal texts": (
        {"q": "x", "a": "1", "c": ["1", "1"]},
        {"choices": "c", "answer_names": "text"},
        "choices",
        "the text of two choices",
    ),
    "a choice without a letter": (
        {"q": "x", "a": "A", "c": ["A)1", "2"]},
        {"choices": "c"},
        "choices",
        "c[1] is '2', a choice without a letter of its own, but c[0] begins with A",
    ),
    "no label": ({"q": "x", "a": "A", "c": [{"text": "1"}] * 2}, {"choices": "c"}, "choices", "c[0] has no label"),
    "one label for two": (
        {"q": "x", "a": "A", "c": {"label": ["A", "A"], "text": ["1", "2"]}},
        {"choices": "c"},
        "choices",
        "a letter that no other choice has",
    ),
    "too few labels": (
        {"q": "x", "a": "A", "c": {"label": ["A"], "text": ["1", "2"]}},
        {"choices": "c"},
        "choices",
        "1 labels for 2 texts",
    ),
    "an empty choice": ({"q": "x", "a": "A", "c": ["A)", "B)2"]}, {"choices": "c"}, "choices", "choice A of c is"),
    "one choice": ({"q": "x", "a": "A", "c": ["A)1"]}, {"choices": "c"}, "choices", "1 choices, wanted 2 to 26"),
    "choices as text": ({"q": "x", "a": "A", "c": "1 2"}, {"choices": "c"}, "choices", "c is '1 2', wanted a list"),
    "filter on a list": ({"q": "x", "a": "1", "k": []}, {"where": {"k": "x"}}, "wrong type", "k is a list"),
    "filter without field": ({"q": "x", "a": "1"}, {"where": {"k": "x"}}, "missing field", "no k among q, a"),
    "marker in a template": ({"q": "<|latent|>", "a": "1"}, {}, "marker", "only the pipeline may write"),
    "no object": ("text", {}, "not JSON", "not valid JSON"),
    "list as row": ([1, 2], {}, "layout", "found a list of 2 values"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "keys", "reason", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_row_that_cannot_be_read_is_named_or_dropped_and_counted(tmp_path, row, keys, reason, message):
    good = {"q": "x", "a": "yes", "s": ["y"], "c": ["yes", "no"], "k": "x"}
    good |= {"a": {"answer_after": "## 1", "choices": "A"}.get(next(iter(keys), ""), "yes")}
    if "answer" in keys:
        good["a"] = {"text": "1", "b": "1", "1": "1", "9" * 5000: "1"}
    if keys.get("answer_names") == "text":
        good["a"] = "no"
    if keys.get("split_steps"):
        good["s"] = "y"
    fields = Fields(**{"question": "q", "answer": "a"} | keys)
    with pytest.raises(ValueError, match=r"data\.json: record 2: .*data\.skip_bad_rows") as caught:
        read_rows(tmp_path, [good, row, good], fields=fields)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    reading = read_rows(tmp_path, [good, row, good], fields=fields, skip=True)
    assert (len(reading.examples), reading.num_rows, reading.malformed) == (2, 3, {reason: 1})


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            Fields(question="{body} {q}", answer="a"),
            "data.tests.test.fields.question: no row has the field 'body': no body",
        ),
        (Fields(question="q", answer="Ans"), "fields.answer: no row has the field 'Ans': no Ans among q, a, Answer"),
        (Fields(question="q", answer="answer"), "did you mean Answer?"),
        (Fields(question="q", answer="a", steps="cot"), "fields.steps: no row has the field 'cot'"),
        (Fields(question="q", answer="a", choices="c"), "fields.choices: no row has the field 'c'"),
        (Fields(question="q", answer="a", where={"k": 1}), "fields.where: no row has the field 'k'"),
        (Fields(question="q", answer="a.b"), "fields.answer: no row has the field 'a.b': no a.b: a is a number"),
    ],
)
def test_a_field_that_no_row_has_is_an_error_before_any_row_is_dropped(tmp_path, fields, message, skip):
    with pytest.raises(ValueError, match=r"data\.json: data\.tests\.test\.fields") as caught:
        read_rows(tmp_path, [{"q": "x", "a": 1, "Answer": 2}] * 3, fields=fields, skip=skip)
    assert message in str(caught.value)


def test_a_filter_that_keeps_nothing_lists_the_values(tmp_path):
    rows = [{"q": "x", "a": 1, "kind": kind} for kind in ("one", "two", "one")]
    with pytest.raises(ValueError, match=r"where: no row of 3 is kept; found kind: 'one' \(2\), 'two' \(1\)"):
        read_rows(tmp_path, rows, fields=Fields(question="q", answer="a", where={"kind": "three"}))


@pytest.mark.parametrize("text", ['[{"q": "x", "q": "y", "a": 1}, {"q": "x", "a": 1}]',
                                  '[{"q": "x", "a": {"b": 1, "b": 2}}, {"q": "x", "a": {"b": 3}}]'])  # fmt: skip
def test_a_key_that_stands_twice_is_refused_at_every_depth(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    fields = QA if '"q": "y"' in text else Fields(question="q", answer="a.b")
    with pytest.raises(ValueError, match=r"record 1: key '[qb]' stands twice"):
        read(tmp_path / "data.json", fields=fields)


def test_the_map_with_fewest_absent_fields_is_taken_and_the_first_of_equals():
    maps = [QA, Fields(question="question", answer="answer"), Fields(question="question", answer="answer", steps="s")]
    assert choose_reader(maps, [{"question": 1, "answer": 2}]).fields == maps[1]
    assert choose_reader(maps, [{"q": 1, "a": 2, "question": 1, "answer": 2}]).fields == maps[0]
    assert choose_reader(maps, [{"question": 1, "answer": 2, "s": []}]).fields == maps[1]


def test_equal_rows_stay(tmp_path):
    rows = [{"q": "x", "a": 1}] * 3
    assert read_rows(tmp_path, rows).examples == [Example("x", [], "1")] * 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("qaskct"), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from("qaskc"), JSON, min_size=1),
    st.sampled_from([{}, {"choices": "c"}, {"steps": "s"}, {"steps": "s", "split_steps": "chain"},
                     {"where": {"k": "x"}}, {"answer": "a.q.0"}, {"booleans": "yes_no"}, {"question": "{q}{k.a}"}]),
)  # fmt: skip
def test_any_row_is_an_example_or_a_row_error(row, keys):
    reader = FieldReader(Fields(**{"question": "q", "answer": "a"} | keys))
    reader.keeps(row)
    try:
        example = reader.parse(row).example
    except RowError:
        return
    assert example.question
    assert example.answer
    assert all(example.steps)


# --- what params.yaml may say ---------------------------------------------------------------


def test_a_filter_is_a_value_a_list_or_what_it_is_not():
    where = {"a": 1, "b": ["x", True], "c": {"is_not": "y"}, "d": {"is_not": [1.5]}}
    source = parse({"format": "fields", "fields": {"where": where}}, Source, "data.tests.test")
    assert source.fields.where == {"a": 1, "b": ("x", True), "c": IsNot("y"), "d": IsNot((1.5,))}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a": []}, "where.a: found an empty list, wanted a list of values"),
        ({"a": None}, "where.a: found None (null), wanted text"),
        ({"a": {"isnot": 1}}, "unknown key; known here: is_not; did you mean is_not?"),
        ({"a": [[1]]}, "where.a[0]: found [1] (a list)"),
        ("x", "wanted a mapping"),
    ],
)
def test_a_filter_of_another_form_is_refused(where, message):
    with pytest.raises(ValueError, match="where") as caught:
        parse({"format": "fields", "fields": {"where": where}}, Source, "data.tests.test")
    assert message in str(caught.value)
