"""The mapping `fields:` of a source: where the parts of an example stand in a row. `coconut.config.rules` checks it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from coconut.config.strict import Word

Scalar = str | int | float | bool
"""A value that a field may be compared with."""


@dataclass(frozen=True)
class IsNot:
    """A condition of `where`: the field holds none of these."""

    is_not: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class Fields:
    """Where the parts of an example stand in a row: paths (`answer.text`) or templates (`"{Body} {Question}"`)."""

    question: str | None = None
    answer: str | None = None
    steps: Annotated[str | None, Word("none")] = None
    """If it names the same field as `answer`, the steps are what stands before `answer_after`."""
    split_steps: Literal["list", "separator", "sentences", "chain", "notes"] | None = None
    """How the steps part: as a list does, which is read where the key is left out, or as text of one of these kinds."""
    separator: str | None = None
    answer_after: str | None = None
    """The answer is what follows the last of these."""
    answer_before: str | None = None
    """The answer is what precedes it; a row that holds it twice is refused."""
    answer_in: Literal["boxed"] | None = None
    r"""The answer is what the last `\boxed{...}` of the text holds."""
    join: str | None = None
    """What stands between the values of a list that is a part of a question, an answer or a text of steps."""
    booleans: Literal["true_false", "yes_no"] | None = None
    """The answer is a truth value, in JSON or in words, and is written in these words."""
    choices: str | None = None
    """A path to the choices, which are appended to the question, a line each: `A) text`."""
    answer_names: Literal["letter", "text", "index", "number", "one_hot"] | None = None
    """What the field of the answer holds of its choice; `letter` where it is left out. The index counts from 0, the
    number from 1, and `one_hot` is a list in which only the answer's place is 1 or true."""
    answer_as: Literal["letter", "text"] | None = None
    """What the example's answer is; `letter` where it is left out."""
    group: str | None = None
    """A path to the kind of a question, by which accuracies are shown apart."""
    where: Mapping[str, IsNot | tuple[Scalar, ...] | Scalar] | None = None
    """Only rows whose fields hold these values are read."""
