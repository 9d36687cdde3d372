"""The canonical form of a reasoning problem, and its JSONL files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARKERS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")
"""Text that only the pipeline may write: a tokenizer turns each into one special token."""


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
        object.__setattr__(self, "steps", tuple(self.steps))


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
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise TypeError(f"found {type(fields).__name__}")
    example = Example(**fields)
    texts = (example.question, *example.steps, example.answer)
    if not isinstance(fields.get("steps"), list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("a value is no text, or steps is no list")
    return example
