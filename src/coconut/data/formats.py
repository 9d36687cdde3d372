"""Turns rows into examples, with one parser per published format."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from coconut.config.messages import kind_of, shown
from coconut.data.documents import JsonFloat, RepeatedKey, parse_json
from coconut.data.examples import MARKERS, Example, is_scorable
from coconut.data.sentences import split_sentences

_NOTE = re.compile(r"<<.*?>>")
_EQUATION = re.compile(r"[^\s=]+=[^\s=]+")
_PRODUCT = re.compile(r"[0-9](?:\s*[0-9])*\s*\*\s*[0-9](?:\s*[0-9])*")
_MARK_BEFORE_ANSWER = re.compile(r"\A#{3,}\s*(?=[^#\s])")


class RowError(ValueError):
    """A row that is not an example; `reason` is the kind of defect, for the statistics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ParsedRow(NamedTuple):
    """An example, and what was left out of it."""

    example: Example
    num_empty_steps: int


Parser = Callable[[Any], ParsedRow]


def find_mismatch(file_format: str, examples: Sequence[Example]) -> str | None:
    """Say why the examples probably have another format than `file_format`, or return None.

    >>> find_mismatch("gsm8k_aug", [Example("2 * 2", ["4", "0"], "4 0")])
    'not one step is a <<...>> note'
    """
    if not any(example.steps for example in examples):
        return "not one example has a step"
    if file_format == "gsm8k_aug" and not any(_NOTE.fullmatch(step) for one in examples for step in one.steps):
        return "not one step is a <<...>> note"
    return None


# --- rows to examples -----------------------------------------------------------------------


def _parse_canonical(content: Any) -> ParsedRow:
    """Parse a canonical row, or one of ProsQA, whose other fields (the graph) are not needed."""
    record = _record(content)
    return _parsed(_text(record, "question"), _texts(record, "steps"), _text(record, "answer"))


def _parse_gsm8k(content: Any) -> ParsedRow:
    """Take the calculator notes of the solution as its steps, and leave out its prose."""
    record = _record(content)
    solution, answer = _split_answer(_text(record, "answer"))
    return _parsed(_text(record, "question"), _NOTE.findall(solution), answer)


def _parse_gsm8k_aug(content: Any) -> ParsedRow:
    """Parse `question||<<1+1=2>> <<2+2=4>> #### 4`, or a record with question, answer, and steps or cot."""
    if isinstance(content, str) and content.lstrip().startswith("{"):
        content = _record(content)
    if isinstance(content, Mapping) and "text" not in content:
        record = _record(content)
        key = "steps" if "steps" in record else "cot"
        is_list = isinstance(record.get(key), list)
        steps = _texts(record, key) if is_list else split_chain(_text(record, key, empty=True))
        return _parsed(_text(record, "question"), steps, _text(record, "answer"))
    question, solution, answer = _split_line(content)
    return _parsed(question, split_chain(solution), answer)


def split_chain(text: str) -> list[str]:
    """Split a chain of thought into steps: `<<...>>` notes, equations without notes, or else sentences.

    Text between notes is kept, so that nothing of the solution is lost without being seen.

    >>> split_chain("<<4-2=2>><<2*3=6>> so")
    ['<<4-2=2>>', '<<2*3=6>>', 'so']
    >>> split_chain("4-2=2 2*3=6")
    ['4-2=2', '2*3=6']
    >>> split_chain("Tom has 4 - 2 = 2 left. He buys 3 packs of 2.")
    ['Tom has 4 - 2 = 2 left.', 'He buys 3 packs of 2.']

    Raises:
        RowError: Equations follow each other without anything that would say where one ends.
    """
    steps: list[str] = []
    end = 0
    for note in _NOTE.finditer(text):
        steps += [*_split_prose(text[end : note.start()]), note[0]]
        end = note.end()
    return [*steps, *_split_prose(text[end:])]


def _split_prose(text: str) -> list[str]:
    """Split what stands between notes; punctuation alone is no step."""
    words = [word.rstrip(",;") for word in text.split()]
    if all(map(_EQUATION.fullmatch, words)):
        return words
    sentences = [sentence for sentence in split_sentences(text) if any(map(str.isalnum, sentence))]
    for sentence in sentences:
        if sentence.count("=") > 1 and not any(map(str.isalpha, sentence)):
            raise RowError(
                "layout",
                f"several equations run together in {shown(sentence)}, wanted steps that can be told apart;"
                " write each as <<...>>, or without blanks inside it, or give steps as a list",
            )
    return sentences


def _parse_multiplication(content: Any) -> ParsedRow:
    """Take each summand of the written-out product, with the sum so far in parentheses, as a step."""
    question, solution, answer = _split_line(content)
    if not _PRODUCT.fullmatch(question.strip()):
        raise RowError(
            "layout",
            f"question is {shown(question)}, wanted the digits of two numbers with * between them, as in"
            " '5 6 * 7 4'; if all rows are like this one, the format is another",
        )
    return _parsed(question, solution.split(" + ") if solution else [], answer)


def _parse_prontoqa(content: Any) -> ParsedRow:
    """Append the query to the question, and take two sentences as a step: a rule and its conclusion."""
    record = _record(content)
    record = _record(record.get("test_example", record))
    sentences = _texts(record, "chain_of_thought")
    steps = [" ".join(sentences[i : i + 2]) for i in range(0, len(sentences), 2)]
    return _parsed(f"{_text(record, 'question')} {_text(record, 'query')}", steps, _text(record, "answer"))


PARSERS: Mapping[str, Parser] = {
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
        raise RowError("no answer", f"no '####' before an answer at the end of {shown(answer)}")
    return solution.strip(), answer


# --- fields ---------------------------------------------------------------------------------


def _record(content: Any) -> Mapping[str, Any]:
    if isinstance(content, str):
        try:
            content = parse_json(content)
        except ValueError as error:
            raise RowError("not JSON", f"not valid JSON: {error}; found {shown(content)}") from None
    if not isinstance(content, Mapping):
        raise RowError("wrong type", f"found {_kind(content)}, wanted a JSON object")
    if isinstance(content, RepeatedKey):
        raise RowError("repeated key", f"key {shown(content.key)} stands twice in the object, wanted it once")
    return content


def _text(record: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = record.get(key)
    if value is None or (value == "" and not empty):
        reason = "no answer" if key == "answer" else "missing field"
        found = f"{key} is empty" if value == "" else f"no {key} among {shown(', '.join(map(str, record)))}"
        raise RowError(reason, f"{found}, wanted text")
    return _as_text(value if isinstance(value, str) else _number_text(value), key)


def _number_text(value: Any) -> Any:
    """Write true, false or a number as its file does, because the answer is compared as text first."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, JsonFloat):
        return value.text
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return value


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    values = record.get(key)
    if not isinstance(values, list):
        found = f"{key} is {_kind(values)}" if key in record else f"no {key} in the record"
        raise RowError("wrong type" if key in record else "missing field", f"{found}, wanted a list of text")
    return [
        _as_text(value if isinstance(value, str) else _number_text(value), f"{key}[{i}]")
        for i, value in enumerate(values)
    ]


def _as_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong type", f"{key} is {_kind(value)}, wanted text")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, float):
        return "a number" if math.isfinite(value) else f"{float(value)}"
    return "an object" if isinstance(value, dict) else kind_of(value)


def _parsed(question: str, steps: Iterable[str], answer: str) -> ParsedRow:
    """Strip the parts, drop empty steps, and refuse text that later stages would confuse with their own."""
    stripped = [step.strip() for step in steps]
    example = Example(
        question.strip(), [step for step in stripped if step], _MARK_BEFORE_ANSWER.sub("", answer.strip())
    )
    parts = {"question": example.question, "answer": example.answer}
    parts |= {f"steps[{i}]": step for i, step in enumerate(example.steps)}
    for key, text in parts.items():
        _check_part(key, text)
    if not is_scorable(example.answer):
        raise RowError(
            "unusable answer",
            f"answer is {shown(example.answer)}, wanted one line, without '###' and more than a full stop:"
            " only that much is read of a model's answer",
        )
    return ParsedRow(example, len(stripped) - len(example.steps))


def _check_part(key: str, text: str) -> None:
    if not text:
        raise RowError("no answer" if key == "answer" else "empty text", f"{key} is empty, wanted text")
    for marker in MARKERS:
        if marker in text:
            raise RowError(
                "marker", f"{key} holds the marker {marker}, which only the pipeline may write: {shown(text)}"
            )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("not UTF-8", f"{key} holds half a character (a lone surrogate): {error.reason}") from None
