"""The canonical form of a reasoning problem, its JSONL files, and where an answer stands in a text."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coconut.data.documents import RepeatedKey, parse_json

MARKERS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")
"""Text that only the pipeline may write: a tokenizer turns each into one special token."""
ANSWER_MARK = "###"
"""Separates the answer from the steps in the text that a model is trained on."""

_ANSWER_MARKER = re.compile(r"#{3,}")
_WEAK_ANSWER_MARKER = re.compile(r"#+")


@dataclass(frozen=True)
class Example:
    """One problem with its chain of thought.

    >>> Example("2 + 2 + 1 ?", ["4", "5"], "5")
    Example(question='2 + 2 + 1 ?', steps=('4', '5'), answer='5', group='')
    """

    question: str
    steps: Sequence[str] = field(default_factory=tuple)
    answer: str = ""
    group: str = ""
    """A kind of question by which a set is scored apart; empty where the set names none."""

    def __post_init__(self) -> None:
        if isinstance(self.steps, str):  # Its characters would pass for steps.
            raise ValueError(f"steps: found the text {self.steps[:60]!r}, wanted a list of texts; put [ ] around it")
        object.__setattr__(self, "steps", tuple(self.steps))


def find_answer_line(text: str) -> str | None:
    r"""Return the first line after the last marker, with white space folded, or None if there is no marker.

    A marker is a run of three or more `#`. If the text has no such run, any `#` counts, because a model
    that has half learned the form writes fewer.

    >>> find_answer_line("4\n### Room  #5\nQuestion: how many?")
    'Room #5'
    """
    markers = list(_ANSWER_MARKER.finditer(text)) or list(_WEAK_ANSWER_MARKER.finditer(text))
    if not markers:
        return None
    lines = text[markers[-1].end() :].strip().splitlines()
    return (fold(lines[0]) or None) if lines else None


def is_scorable(answer: str) -> bool:
    r"""Tell whether the evaluation reads an answer back whole when a model writes it as trained.

    >>> [is_scorable(answer) for answer in ("5,000", "Room #5", "yes\nsure", "C###", ".")]
    [True, True, False, False, False]
    """
    # The comparison ignores a full stop at the end, so an answer that is only a full stop would be empty.
    return fold(answer) not in ("", ".") and find_answer_line(f"{ANSWER_MARK} {answer}") == fold(answer)


def fold(text: str) -> str:
    """Replace every run of white space by one blank, and strip both ends."""
    return " ".join(text.split())


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write one JSON object per line, with the keys question, steps and answer, and group where there is one."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            fields = {"question": example.question, "steps": list(example.steps), "answer": example.answer}
            fields |= {"group": example.group} if example.group else {}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def read_examples(path: Path) -> list[Example]:
    """Read what `write_examples` wrote. `coconut.data.sources` reads files of other origin.

    Raises:
        ValueError: The file is missing or was changed; the message names the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; run the preprocess stage first: dvc repro preprocess")
    examples = []
    # The file is read as bytes, so that the message for a line that is not UTF-8 names the line, too.
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            try:
                examples.append(_parse_line(line.decode("utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}:{line_number}: {error}, wanted an object with question, steps, answer;"
                    " the file was changed or cut short: run the preprocess stage again"
                ) from None
    return examples


def _parse_line(line: str) -> Example:
    fields = parse_json(line)
    if not isinstance(fields, dict):
        raise TypeError(f"found {type(fields).__name__}")
    if isinstance(fields, RepeatedKey):
        raise ValueError(f"key {fields.key!r} stands twice")
    example = Example(**fields)
    texts = (example.question, *example.steps, example.answer, example.group)
    if not isinstance(fields.get("steps"), list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("a value is not text, or steps is not a list")
    "".join(texts).encode("utf-8")  # JSON may spell out half a character, which no tokenizer takes.
    return example
