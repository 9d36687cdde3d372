"""Turns rows into examples, with one parser per published format."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coconut.config.messages import shown
from coconut.data.examples import Example
from coconut.data.records import ParsedRow, RowError, make_row, read_record, read_text, read_texts
from coconut.data.sentences import split_sentences

NOTE = re.compile(r"<<.*?>>")
_EQUATION = re.compile(r"[^\s=]+=[^\s=]+")
_PRODUCT = re.compile(r"[0-9](?:\s*[0-9])*\s*\*\s*[0-9](?:\s*[0-9])*")

Parser = Callable[[Any], ParsedRow]


def find_mismatch(file_format: str, examples: Sequence[Example]) -> str | None:
    """Say why the examples probably have another format than `file_format`, or return None.

    >>> find_mismatch("gsm8k_aug", [Example("2 * 2", ["4", "0"], "4 0")])
    'not one step is a <<...>> note'
    """
    if not any(example.steps for example in examples):
        return "not one example has a step"
    if file_format == "gsm8k_aug" and not any(NOTE.fullmatch(step) for one in examples for step in one.steps):
        return "not one step is a <<...>> note"
    return None


# --- rows to examples -----------------------------------------------------------------------


def _parse_canonical(content: Any) -> ParsedRow:
    """Parse a canonical row, or one of ProsQA, whose other fields (the graph) are not needed."""
    record = read_record(content)
    return make_row(read_text(record, "question"), read_texts(record, "steps"), read_text(record, "answer"))


def _parse_gsm8k(content: Any) -> ParsedRow:
    """Take the calculator notes of the solution as its steps, and leave out its prose."""
    record = read_record(content)
    solution, answer = _split_answer(read_text(record, "answer"))
    return make_row(read_text(record, "question"), NOTE.findall(solution), answer)


def _parse_gsm8k_aug(content: Any) -> ParsedRow:
    """Parse `question||<<1+1=2>> <<2+2=4>> #### 4`, or a record with question, answer, and steps or cot."""
    if isinstance(content, str) and content.lstrip().startswith("{"):
        content = read_record(content)
    if isinstance(content, Mapping) and "text" not in content:
        record = read_record(content)
        key = "steps" if "steps" in record else "cot"
        is_list = isinstance(record.get(key), list)
        steps = read_texts(record, key) if is_list else split_chain(read_text(record, key, empty=True))
        return make_row(read_text(record, "question"), steps, read_text(record, "answer"))
    question, solution, answer = _split_line(content)
    return make_row(question, split_chain(solution), answer)


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
    for note in NOTE.finditer(text):
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
    return make_row(question, solution.split(" + ") if solution else [], answer)


def _parse_prontoqa(content: Any) -> ParsedRow:
    """Append the query to the question, and take two sentences as a step: a rule and its conclusion."""
    record = read_record(content)
    record = read_record(record.get("test_example", record))
    sentences = read_texts(record, "chain_of_thought")
    steps = [" ".join(sentences[i : i + 2]) for i in range(0, len(sentences), 2)]
    return make_row(f"{read_text(record, 'question')} {read_text(record, 'query')}", steps, read_text(record, "answer"))


PARSERS: Mapping[str, Parser] = {
    "canonical": _parse_canonical,
    "prosqa": _parse_canonical,
    "gsm8k": _parse_gsm8k,
    "gsm8k_aug": _parse_gsm8k_aug,
    "multiplication": _parse_multiplication,
    "prontoqa": _parse_prontoqa,
}


def _split_line(content: Any) -> tuple[str, str, str]:
    line = content if isinstance(content, str) else read_text(read_record(content), "text")
    fields = line.split("||")
    if len(fields) != 2:
        raise RowError("layout", f"{len(fields)} fields separated by '||', expected 2 (question||steps #### answer)")
    return (fields[0], *_split_answer(fields[1]))


def _split_answer(solution: str) -> tuple[str, str]:
    solution, separator, answer = solution.rpartition("####")
    if not separator:
        raise RowError("no answer", f"no '####' before an answer at the end of {shown(answer)}")
    return solution.strip(), answer
