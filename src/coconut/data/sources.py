"""Readers: files and hub sets, in the forms their authors publish, to canonical examples.

A source is a list of rows, and a row is a line of text or a JSON object. One parser per format
turns one row into one example, wherever the row came from. Text is never evaluated.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from coconut.config import DataConfig, Source
from coconut.data.examples import MARKERS, Example, is_scorable, parse_json

MAX_WARNINGS = 5
"""Dropped rows that are named one by one in the log; the others are only counted."""

_NOTE = re.compile(r"<<.*?>>")
_PRODUCT = re.compile(r"[0-9](?:\s*[0-9])*\s*\*\s*[0-9](?:\s*[0-9])*")


@dataclass(frozen=True)
class Reading:
    """What came out of one source."""

    examples: list[Example]
    num_rows: int
    """Rows taken, the malformed ones included."""
    malformed: Mapping[str, int]
    """Rows dropped, by reason."""


class RowError(ValueError):
    """A row that is not an example; `reason` is the kind of defect, for the statistics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Row(NamedTuple):
    place: str
    content: Any


_Parser = Callable[[Any], Example]


def read_split(data: DataConfig, split: str) -> Reading:
    """Read the rows of a split that is not generated, from its file or from the hub.

    Raises:
        ValueError: the file or set cannot be used, or (unless `data.skip_bad_rows`) a row of it.
    """
    source: Source = getattr(data, split)
    assert source.format in _PARSERS, "generated splits have no source"
    rows = _hub_rows(source, split) if source.hub is not None else _file_rows(source, split, data.raw_dir)
    return _parse_rows(_take(rows, source, split), _PARSERS[source.format], skip_bad_rows=data.skip_bad_rows)


def find_mismatch(file_format: str, examples: Sequence[Example]) -> str | None:
    """What makes it likely that a source has another format than was said; None where nothing does.

    >>> find_mismatch("gsm8k_aug", [Example("2 * 2", ["4", "0"], "4 0")])
    'not one step is a <<...>> note'
    """
    if not any(example.steps for example in examples):
        return "not one example has a step"
    if file_format == "gsm8k_aug" and not any(_NOTE.fullmatch(step) for one in examples for step in one.steps):
        return "not one step is a <<...>> note"
    return None


def _take(rows: list[_Row], source: Source, split: str) -> list[_Row]:
    if source.start >= len(rows):
        raise ValueError(
            f"data.{split}.start: found {source.start}, wanted less than {len(rows)},"
            f" the number of rows in {source.file or source.hub}"
        )
    taken = rows[source.start :][: source.rows]
    if source.rows is not None and len(taken) < source.rows:
        logger.warning(
            "data.{}: {} rows asked from row {} on, {} has only {}",
            *(split, source.rows, source.start, source.file or source.hub, len(taken)),
        )
    return taken


def _parse_rows(rows: list[_Row], parse: _Parser, *, skip_bad_rows: bool) -> Reading:
    examples = []
    malformed: Counter[str] = Counter()
    for place, content in rows:
        try:
            examples.append(parse(content))
        except RowError as error:
            if not skip_bad_rows:
                raise ValueError(
                    f"{place}: {error}; mend the row, or set data.skip_bad_rows: true to drop such rows"
                ) from None
            malformed[error.reason] += 1
            if malformed.total() <= MAX_WARNINGS:
                logger.warning("{}: dropped: {}", place, error)
    if malformed.total() > MAX_WARNINGS:
        logger.warning("{} more malformed rows dropped", malformed.total() - MAX_WARNINGS)
    return Reading(examples, len(rows), dict(sorted(malformed.items())))


# --- files to rows --------------------------------------------------------------------------


def _file_rows(source: Source, split: str, raw_dir: str) -> list[_Row]:
    assert source.file is not None, "the config wants a file or a hub set"
    path = Path(raw_dir) / source.file
    text = _read_text(path, split)
    if source.format in ("gsm8k_aug", "multiplication"):
        rows = _lines(text, path)
    elif source.format == "prontoqa":
        rows = _named_records(text, path)
    else:
        rows = _records(text, path)
    if not rows:
        raise ValueError(f"{path}: no row in it, wanted at least one; restore the file")
    return rows


def _read_text(path: Path, split: str) -> str:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise ValueError(
            f"{path}: {found}, wanted the file of data.{split}.file below data.raw_dir;"
            " data/raw/README.md says where the sets are published"
        )
    content = path.read_bytes()
    try:
        # -sig: some editors put a byte order mark in front, which no parser below expects.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line_number}: byte {content[error.start]:#04x} at offset {error.start} is not UTF-8;"
            " restore the file, or save it as UTF-8"
        ) from None


def _lines(text: str, path: Path) -> list[_Row]:
    # Not splitlines: it also breaks at characters that may stand inside a line, such as U+2028.
    lines = enumerate(text.split("\n"), start=1)
    return [_Row(f"{path}:{line_number}", line) for line_number, line in lines if line.strip()]


def _records(text: str, path: Path) -> list[_Row]:
    """Rows of a JSON list, or of JSON Lines; the content tells, not the file's name."""
    if not text.lstrip().startswith("["):
        # A file that is one object as a whole was meant as something else than one line of many.
        if text.lstrip().startswith("{") and isinstance(_document_or_none(text), dict):
            raise ValueError(
                f"{path}: found a JSON object, wanted a list of them, or JSON Lines with one a line;"
                " put [ ] around a single record"
            )
        return _json_lines(text, path)
    records = _document(text, path)
    return [_Row(f"{path}: record {number}", record) for number, record in enumerate(records, start=1)]


def _json_lines(text: str, path: Path) -> list[_Row]:
    rows = _lines(text, path)
    # No matter of single rows, which could be dropped.
    if len(rows) > 1 and not any(isinstance(_document_or_none(row.content), dict) for row in rows):
        raise ValueError(
            f"{path}: found no line that is a JSON object, wanted a list of objects, or JSON Lines with one whole"
            " object a line; if the file is cut short, restore it; if a record goes over several lines, put it on one"
        )
    return rows


def _named_records(text: str, path: Path) -> list[_Row]:
    if not text.strip():
        return []
    records = _document(text, path)
    if not isinstance(records, dict):
        raise ValueError(
            f'{path}: found {_kind(records)}, wanted a JSON object {{"example1": {{"test_example": ...}}, ...}}'
            " as the ProntoQA generator writes it; for a list of examples take format: canonical"
        )
    return [_Row(f"{path}: record {_shown(name)}", record) for name, record in records.items()]


def _document(text: str, path: Path) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg};"
            " the file is damaged or cut short: restore it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not usable JSON: {error}; mend or restore the file") from None


def _document_or_none(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


# --- the hub --------------------------------------------------------------------------------


def _hub_rows(source: Source, split: str) -> list[_Row]:
    # Imported here: it takes a second, and generated or local data do without.
    import datasets

    if source.hub_split is None:
        raise ValueError(f"data.{split}.hub_split: found null, wanted the name of a split of {source.hub}")
    place = f"{source.hub} [{source.hub_split}]"
    try:
        table = datasets.load_dataset(
            source.hub, source.hub_config, split=source.hub_split, revision=source.hub_revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data.{split}.hub: {place} cannot be loaded: {error}; check hub, hub_config, hub_split, hub_revision"
            " and the network, or download the set and name it in `file`"
        ) from None
    return [_Row(f"{place}: row {number}", row) for number, row in enumerate(table)]


# --- rows to examples -----------------------------------------------------------------------


def _parse_canonical(content: Any) -> Example:
    """Also ProsQA, whose further fields (the graph) are not needed."""
    record = _record(content)
    return _example(_text(record, "question"), _texts(record, "steps"), _text(record, "answer"))


def _parse_gsm8k(content: Any) -> Example:
    """The calculator notes of the solution are the steps; its prose goes."""
    record = _record(content)
    solution, answer = _split_answer(_text(record, "answer"))
    return _example(_text(record, "question"), _NOTE.findall(solution), answer)


def _parse_gsm8k_aug(content: Any) -> Example:
    """`question||<<1+1=2>> <<2+2=4>> #### 4`, or a hub mirror's fields: question, cot or steps, answer."""
    if isinstance(content, Mapping) and "text" not in content:
        key = "steps" if "steps" in content else "cot"
        steps = _texts(content, key) if isinstance(content.get(key), list) else _notes(_text(content, key, empty=True))
        return _example(_text(content, "question"), steps, _text(content, "answer"))
    question, solution, answer = _split_line(content)
    return _example(question, _notes(solution), answer)


def _notes(solution: str) -> list[str]:
    # A word outside any note is kept as a step of its own: nothing of the solution goes unseen.
    return re.findall(r"<<.*?>>|\S+", solution)


def _parse_multiplication(content: Any) -> Example:
    """Each summand of the written-out product, with the sum so far in parentheses, is a step."""
    question, solution, answer = _split_line(content)
    if not _PRODUCT.fullmatch(question.strip()):
        raise RowError(
            "layout",
            f"question is {_shown(question)}, wanted the digits of two numbers with * between them, as in"
            " '5 6 * 7 4'; if all rows are like this one, the format is another",
        )
    return _example(question, solution.split(" + ") if solution else [], answer)


def _parse_prontoqa(content: Any) -> Example:
    """The query joins the question; a step is two sentences, a rule and what follows from it."""
    record = _record(content)
    record = _record(record.get("test_example", record))
    sentences = _texts(record, "chain_of_thought")
    steps = [" ".join(sentences[i : i + 2]) for i in range(0, len(sentences), 2)]
    return _example(f"{_text(record, 'question')} {_text(record, 'query')}", steps, _text(record, "answer"))


_PARSERS: Mapping[str, _Parser] = {
    "canonical": _parse_canonical,
    "prosqa": _parse_canonical,
    "gsm8k": _parse_gsm8k,
    "gsm8k_aug": _parse_gsm8k_aug,
    "multiplication": _parse_multiplication,
    "prontoqa": _parse_prontoqa,
}


def _split_line(content: Any) -> tuple[str, str, str]:
    line = content if isinstance(content, str) else _text(_record(content), "text")
    fields = line.split("||")
    if len(fields) != 2:
        raise RowError("layout", f"{len(fields)} fields separated by '||', expected 2 (question||steps #### answer)")
    return (fields[0], *_split_answer(fields[1]))


def _split_answer(solution: str) -> tuple[str, str]:
    solution, separator, answer = solution.rpartition("####")
    if not separator:
        raise RowError("no answer", f"no '####' before an answer at the end of {_shown(answer)}")
    return solution.strip(), answer


def _record(content: Any) -> Mapping[str, Any]:
    if isinstance(content, str):
        try:
            content = parse_json(content)
        except ValueError as error:
            raise RowError("not JSON", f"not valid JSON: {error}; found {_shown(content)}") from None
    if not isinstance(content, Mapping):
        raise RowError("wrong type", f"found {_kind(content)}, wanted a JSON object")
    return content


def _text(record: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = record.get(key)
    if value is None or (value == "" and not empty):
        reason = "no answer" if key == "answer" else "missing field"
        found = f"{key} is empty" if value == "" else f"no {key} among {_shown(', '.join(map(str, record)))}"
        raise RowError(reason, f"{found}, wanted text")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # Hub sets hold whole numbers as numbers; there is one way to write them.
    return _as_text(value, key)


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    values = record.get(key)
    if not isinstance(values, list):
        found = f"{key} is {_kind(values)}" if key in record else f"no {key} in the record"
        raise RowError("wrong type" if key in record else "missing field", f"{found}, wanted a list of text")
    return [_as_text(value, f"{key}[{i}]") for i, value in enumerate(values)]


def _as_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong type", f"{key} is {_kind(value)}, wanted text")
    return value


def _example(question: str, steps: Iterable[str], answer: str) -> Example:
    """Strip the parts, and refuse what later stages could not tell apart from their own text."""
    example = Example(question.strip(), [step.strip() for step in steps], answer.strip())
    parts = {"question": example.question, "answer": example.answer}
    parts |= {f"steps[{i}]": step for i, step in enumerate(example.steps)}
    for key, text in parts.items():
        if not text:
            raise RowError("no answer" if key == "answer" else "empty text", f"{key} is empty, wanted text")
        for marker in MARKERS:
            if marker in text:
                raise RowError(
                    "marker", f"{key} holds the marker {marker}, which only the pipeline may write: {_shown(text)}"
                )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("not UTF-8", f"{key} holds half a character (a lone surrogate): {error.reason}") from None
    if not is_scorable(example.answer):
        raise RowError(
            "unusable answer",
            f"answer is {_shown(example.answer)}, wanted one line, without '###' and more than a full stop:"
            " no more is read of what a model writes",
        )
    return example


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)


def _shown(text: str) -> str:
    # repr: text from elsewhere may hold control characters, which a terminal would obey.
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
