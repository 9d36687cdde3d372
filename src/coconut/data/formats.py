"""Rows to examples: one parser per published format."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from coconut.config.strict import kind_of
from coconut.data.documents import parse_json
from coconut.data.examples import MARKERS, Example, is_scorable

_NOTE = re.compile(r"<<.*?>>")
_PRODUCT = re.compile(r"[0-9](?:\s*[0-9])*\s*\*\s*[0-9](?:\s*[0-9])*")


class RowError(ValueError):
    """A row that is not an example; `reason` is the kind of defect, for the statistics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


Parser = Callable[[Any], Example]


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
            f"question is {shown(question)}, wanted the digits of two numbers with * between them, as in"
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


def _record(content: Any) -> Mapping[str, Any]:
    if isinstance(content, str):
        try:
            content = parse_json(content)
        except ValueError as error:
            raise RowError("not JSON", f"not valid JSON: {error}; found {shown(content)}") from None
    if not isinstance(content, Mapping):
        raise RowError("wrong type", f"found {kind_of(content)}, wanted a JSON object")
    return content


def _text(record: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = record.get(key)
    if value is None or (value == "" and not empty):
        reason = "no answer" if key == "answer" else "missing field"
        found = f"{key} is empty" if value == "" else f"no {key} among {shown(', '.join(map(str, record)))}"
        raise RowError(reason, f"{found}, wanted text")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # Hub sets hold whole numbers as numbers; there is one way to write them.
    return _as_text(value, key)


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    values = record.get(key)
    if not isinstance(values, list):
        found = f"{key} is {kind_of(values)}" if key in record else f"no {key} in the record"
        raise RowError("wrong type" if key in record else "missing field", f"{found}, wanted a list of text")
    return [_as_text(value, f"{key}[{i}]") for i, value in enumerate(values)]


def _as_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong type", f"{key} is {kind_of(value)}, wanted text")
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
                    "marker", f"{key} holds the marker {marker}, which only the pipeline may write: {shown(text)}"
                )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("not UTF-8", f"{key} holds half a character (a lone surrogate): {error.reason}") from None
    if not is_scorable(example.answer):
        raise RowError(
            "unusable answer",
            f"answer is {shown(example.answer)}, wanted one line, without '###' and more than a full stop:"
            " no more is read of what a model writes",
        )
    return example


def shown(text: str) -> str:
    # repr: text from elsewhere may hold control characters, which a terminal would obey.
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
