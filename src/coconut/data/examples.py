"""The canonical form of a reasoning problem, its JSONL files, and where an answer stands in a text."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARKERS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")
"""Text that only the pipeline may write: a tokenizer turns each into one special token."""

_ANSWER_MARKER = re.compile(r"#{3,}")
_WEAK_ANSWER_MARKER = re.compile(r"#+")


@dataclass(frozen=True)
class Example:
    """One problem with its chain of thought.

    >>> Example("2 + 2 + 1 ?", ["4", "5"], "5")
    Example(question='2 + 2 + 1 ?', steps=('4', '5'), answer='5')
    """

    question: str
    steps: Sequence[str] = field(default_factory=tuple)
    answer: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.steps, str):  # Its characters would pass for steps.
            raise ValueError(f"steps: found the text {self.steps[:60]!r}, wanted a list of texts; put [ ] around it")
        object.__setattr__(self, "steps", tuple(self.steps))


def find_answer_line(text: str) -> str | None:
    r"""The first line after the last marker, white space folded; None when there is none.

    A marker is a run of three or more `#`; without such a run any `#` counts, since a model that has
    half learned the form writes that.

    >>> find_answer_line("4\n### Room  #5\nQuestion: how many?")
    'Room #5'
    """
    markers = list(_ANSWER_MARKER.finditer(text)) or list(_WEAK_ANSWER_MARKER.finditer(text))
    if not markers:
        return None
    lines = text[markers[-1].end() :].strip().splitlines()
    return (_fold(lines[0]) or None) if lines else None


def is_scorable(answer: str) -> bool:
    r"""Whether an answer is read back whole, and scored right, where a model writes it as trained.

    >>> [is_scorable(answer) for answer in ("5,000", "Room #5", "yes\nsure", "C###", ".")]
    [True, True, False, False, False]
    """
    # A full stop at the end never counts, so that nothing is left of an answer that is no more than one.
    return _fold(answer) not in ("", ".") and find_answer_line(f"### {answer}") == _fold(answer)


def _fold(text: str) -> str:
    return " ".join(text.split())


def parse_json(text: str) -> Any:
    """Parse a JSON document.

    Raises:
        json.JSONDecodeError: a ValueError too, that says where it is no JSON.
        ValueError: it is JSON that Python cannot hold.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # Python's own words advise programmers.
        raise ValueError(
            f"it holds a whole number of more than {sys.get_int_max_str_digits()} digits, wanted fewer, or text"
        ) from None


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write one JSON object a line, keys in the order question, steps, answer."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            fields = {"question": example.question, "steps": list(example.steps), "answer": example.answer}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def read_examples(path: Path) -> list[Example]:
    """Read what `write_examples` wrote; for files of other origin see `coconut.data.sources`.

    Raises:
        ValueError: naming file and line, when the file is missing or not what was written.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; run the preprocess stage first: dvc repro preprocess")
    examples = []
    # As bytes, so that a line that is not UTF-8 is named like every other one that is wrong.
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
    example = Example(**fields)
    texts = (example.question, *example.steps, example.answer)
    if not isinstance(fields.get("steps"), list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("a value is no text, or steps is no list")
    return example
