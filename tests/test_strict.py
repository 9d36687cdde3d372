"""The YAML reader: the values that DVC reads, or an error in words, at once."""

import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import dumps_yaml
from dvc.utils.serialize._yaml import loads_yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from coconut.config.strict import parse_yaml, read_yaml

ROOT = Path(__file__).parents[1]


def are_same(ours: Any, theirs: Any) -> bool:
    """Equal in value, type, order of keys and sign of zero."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return are_same(list(ours.items()), list(theirs.items()))
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(are_same, ours, theirs))
    if isinstance(ours, float):
        return (math.isnan(ours) and math.isnan(theirs)) or (
            ours == theirs and math.copysign(1, ours) == math.copysign(1, theirs)
        )
    return bool(ours == theirs)


def expect_the_same_or_refused(text: str) -> None:
    try:
        ours = parse_yaml(text, "params.yaml")
    except ValueError as error:
        assert str(error).startswith("params.yaml: "), error  # noqa: PT017
        return
    try:
        theirs = loads_yaml(text)
    except Exception:  # noqa: BLE001 - DVC then stops before any of our stages runs.
        return
    assert are_same(ours, theirs), (ours, theirs)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-0b11", -3),
        ("1_000", 1000),
        ("+7", 7),
        ("-0", 0),
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        (".5e3", ".5e3"),
        ("-.inf", -math.inf),
        (".nan", math.nan),
        ("nan", "nan"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("y", "y"),
        ("TRUE", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("Null", None),
        ("nULL", "nULL"),
        ("12:30:45", "12:30:45"),
        ("190:20:30.15", "190:20:30.15"),
        ("hidden[-1]", "hidden[-1]"),
        ("'010'", "010"),
        ('"\\u00e9"', "é"),
        ("1.2.3", "1.2.3"),
        ("_1", "_1"),
        ("0o", "0o"),
    ],
)
def test_a_scalar_is_what_dvc_reads(written: str, value: Any) -> None:
    ours = parse_yaml(f"a: {written}", "params.yaml")
    assert are_same(ours, {"a": value})
    assert are_same(loads_yaml(f"a: {written}"), {"a": value})


FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PIECES = ["a", "b", "1", "0x1", "yes", ": ", ":", "- ", "-", ",", "[", "]", "{", "}", "\n", "\n  ", "\n    ", " "]
PIECES += ["#c", "'x'", '"y"', "&k ", "*k", "<<", "? ", "|\n  q", "> \n  z", "---", "...", "!!str ", "~", "true", "1.5"]
PIECES += ["http://x:1", "é", "\u2028", "\x85", "\ufeff", "\t", "\r", "${a.b}", "%YAML 1.1\n"]


@given(st.text(alphabet="0123456789+-._:eExobaAfFnNyYtTZ~<=", max_size=10))
@example("2026-11-26T10:00:00Z")
@example("0x_")
@FEW
def test_any_scalar_is_what_dvc_reads_or_refused(text: str) -> None:
    for document in (text, f"a: {text}", f"[{text}]", f"{text}: a"):
        expect_the_same_or_refused(document)


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example("%YAML 1.1\n---\na: yes")
@example("a: &k {b: 1}\nc: {b: 2, <<: *k}")
@example("a: &k 1\nb: &k [*k]")
@example("\n\ufeff?")
@FEW
def test_any_document_is_what_dvc_reads_or_refused(text: str) -> None:
    expect_the_same_or_refused(text)


VISIBLE = st.characters(exclude_categories=["Cc", "Cn", "Co", "Cs", "Zl", "Zp"], exclude_characters="\ufeff")
TEXTS = st.text(VISIBLE | st.sampled_from("\n\t"), max_size=12)
VALUES = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | TEXTS
KEYS = st.text(VISIBLE, max_size=8)
TREES = st.recursive(VALUES, lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3))


@given(st.dictionaries(KEYS, TREES, max_size=4))
@example({"a": "\0", "b": "2026-01-01", "c": "0o17", "d": "<<", "e": "x" * 200})
@FEW
def test_what_dvc_writes_is_read_back(tree: dict[str, Any]) -> None:
    text = dumps_yaml(tree)
    try:
        theirs = loads_yaml(text)
    except Exception:  # noqa: BLE001 - DVC cannot read everything that it writes.
        return
    assert are_same(parse_yaml(text, "dvc.lock"), theirs)


@pytest.mark.parametrize("path", ["dvc.yaml", "dvc.lock", "params.yaml", "recipes/thought-forms.yaml"])
def test_a_file_of_the_pipeline_is_what_dvc_reads(path: str) -> None:
    assert are_same(read_yaml(ROOT / path), loads_yaml((ROOT / path).read_text(encoding="utf-8")))


def test_a_merge_takes_over_what_dvc_takes_over() -> None:
    text = "x: &x {a: 1, b: 2}\ny: &y {b: 3, c: 4}\nz: {c: 5, <<: [*x, *y]}\n"
    assert list(parse_yaml(text, "f")["z"].items()) == [("b", 2), ("c", 5), ("a", 1)]
    assert are_same(parse_yaml(text, "f"), loads_yaml(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: \0", "not valid YAML: line 1 holds the invisible character U\\+0000, wanted text that can be seen"),
        ("a: 1\nb: \u2028", "not valid YAML: line 2 holds the invisible character U\\+2028"),
        (b"a: \xe9", "not UTF-8 at byte 3; save the file as UTF-8"),
        ("a: 1".encode("utf-16"), "not UTF-8 at byte 0; save the file as UTF-8"),
        ("a: \ud800", "not valid YAML: line 1 holds the invisible character U\\+D800"),
        ("a:\n\tb: 1", "not valid YAML: line 2, column 1: found a tab, wanted spaces"),
        ("a: b: c", "not valid YAML: line 1, column 5: mapping values are not allowed in this context"),
        ("a: %5", "not valid YAML: line 1, column 4: .*; fix that line, or quote its value if it is text"),
        ("a: {", "not valid YAML: line 2, column 1: "),
        ("a: 1\nb: {a: 1,\n  a: 2}", "line 3: key 'a' stands already on line 2 of the same mapping, wanted it once"),
        ("true: 1\n1: 2", "line 2: key 1 stands already on line 1"),
        ("{<<: {a: 1}, <<: {b: 1}}", "line 1: key << stands already on line 1"),
        ("a: 1\n[b]: 2", "line 2: found a list or mapping as a key, wanted text"),
        ("? {a: 1}\n: 2", "line 1: found a list or mapping as a key, wanted text"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: found the tag 'tag:yaml.org,2002:python/object/apply:os"),
        ("a: !!str 1", "line 1: found the tag 'tag:yaml.org,2002:str', wanted a value without one; take it out"),
        ("a: 1\n---\nb: 2", "not valid YAML: line 2, column 1: but found another document, expected a single"),
        ("%YAML 1.1\n---\na: yes", "line 1: found a directive, such as %YAML, wanted none; take the line out"),
        ("a: &a [*a]", "not valid YAML: line 1, column 4: found unconstructable recursive node"),
        ("a: *b", "not valid YAML: line 1, column 4: found undefined alias; fix that line, or quote its value"),
        ("a: <<", "line 1: found << as a value, wanted it as a key; quote it if it is text"),
        ("{<<: 1}", "line 1: found a value of << that is no mapping, wanted an alias of one, such as \\*name"),
        ("a: 2026-01-01", "line 1: found the date '2026-01-01', wanted a number or text; quote it if it is text"),
        ("a: 0x_", "line 1: found '0x_', which is out of range"),
        ("a: " + "1" * 5000, r"line 1: found '1{37}\.\.\.', which is out of range, wanted a smaller number"),
        ("a: 0x" + "f" * 5000, r"line 1: found '0xf{35}\.\.\.', which is out of range"),
    ],
)
def test_what_is_not_read_is_refused_in_words(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^params.yaml: {message}"):
        parse_yaml(text, "params.yaml")


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_read() -> None:
    assert parse_yaml(b"\xef\xbb\xbfa: 1\r\nb: text\r\n", "params.yaml") == {"a": 1, "b": "text"}


def test_an_empty_document_is_nothing() -> None:
    assert parse_yaml("# only a comment\n", "params.yaml") is None


BOMB = "a0: &a0 [l, l, l]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
MERGE_BOMB = "a0: &a0 {b: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "line 1: nested deeper than 100 levels, wanted fewer; restore the file"),
        ("[\n" * 100_000, "line 101: nested deeper than 100 levels"),
        ("a: " + "{a: " * 100_000, "line 1: nested deeper than 100 levels"),
        ("- " * 60_000, "line 1: nested deeper than 100 levels"),
        (BOMB, "line 6: found aliases that make more than 1000000 values, wanted fewer; write the values out"),
        (MERGE_BOMB, "line 6: found aliases that make more than 1000000 values"),
    ],
    ids=["brackets", "brackets on lines", "braces", "dashes", "aliases", "merges"],
)
def test_a_hostile_file_is_refused_at_once_and_with_little_memory(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    code = (
        "import resource, sys, time; from pathlib import Path; from coconut.config.strict import read_yaml\n"
        "before = time.process_time()\n"
        "try: read_yaml(Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)\n"
        "assert time.process_time() - before < 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (400 * 2**20, 400 * 2**20)),
    )
    assert done.stdout.startswith(f"{path}: {message}"), done
    assert done.returncode == 0, done


def test_a_long_lock_file_is_read_in_little_time() -> None:
    text = (ROOT / "dvc.lock").read_text(encoding="utf-8")
    assert text.count("\n") > 500
    before = time.process_time()
    parse_yaml(text, "dvc.lock")
    assert time.process_time() - before < 0.5
