"""Questions with choices: one form for the letters and texts that sets publish in several."""

import re
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from coconut.config.messages import shown
from coconut.data.examples import fold
from coconut.data.records import RowError, kind_shown, read_scalar

_LABEL = re.compile(r"[A-Za-z]|[0-9]{1,2}")
_LABELLED = re.compile(r"\s*(?:\((?P<round>[A-Z])\)|(?P<bare>[A-Z])(?P<mark>[):.]))\s*(?P<text>.*)", re.DOTALL)
_LABEL_KEYS = ("label", "letter", "key")


class Choice(NamedTuple):
    """One choice of a question."""

    label: str
    text: str


def read_choices(value: Any, path: str) -> list[Choice]:
    """Read the choices of a row.

    A list of texts, with their letters (`A)21`) or without, then A, B, C in order; a list of `{label, text}`; an object
    of two lists, `{label: [...], text: [...]}`; or an object of texts by letter.

    Raises:
        RowError: It is none of these; a choice has no letter, or another's; or there are fewer than two.
    """
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        choices = [_from_object(one, f"{path}[{i}]") for i, one in enumerate(value)]
    elif isinstance(value, list):
        choices = _from_texts([read_scalar(one, f"{path}[{i}]") for i, one in enumerate(value)], path)
    elif isinstance(value, Mapping) and isinstance(value.get("text"), list):
        choices = _from_lists(value, path)
    elif isinstance(value, Mapping):
        choices = [Choice(str(label), read_scalar(text, f"{path}.{label}")) for label, text in value.items()]
    else:
        raise _refusal(f"{path} is {kind_shown(value)}, wanted a list or an object of choices")
    _check(choices, path)
    return choices


def append_choices(question: str, choices: Iterable[Choice]) -> str:
    r"""Write the choices below the question, a line each.

    >>> append_choices("How many?", [Choice("A", "2"), Choice("B", "4")])
    'How many?\nA) 2\nB) 4'
    """
    return "\n".join([question.strip(), *(f"{choice.label}) {fold(choice.text)}" for choice in choices)])


def find_choice(answer: str, choices: Sequence[Choice], named_by: str) -> Choice:
    """Return the choice that an answer names by its letter, its text, or its index from 0.

    Raises:
        RowError: No choice is named so, or two are.
    """
    if named_by == "index":
        found = [choice for i, choice in enumerate(choices) if answer.strip() == str(i)]
    elif named_by == "text":
        found = [choice for choice in choices if fold(choice.text) == fold(answer)]
    else:
        found = [choice for choice in choices if choice.label.casefold() == answer.strip(" ().:").casefold()]
    if len(found) != 1:
        number = "two choices" if found else "no choice"
        raise _refusal(
            f"answer is {shown(answer)}, which is the {named_by} of {number} among"
            f" {shown(' '.join(choice.label for choice in choices))}; fields.answer_names says how the answer names one"
        )
    return found[0]


def _from_object(value: Mapping[str, Any], path: str) -> Choice:
    label = next((value[key] for key in _LABEL_KEYS if value.get(key) is not None), None)
    if label is None:
        raise _refusal(f"{path} has no label, wanted label and text; found {shown(', '.join(map(str, value)))}")
    return Choice(read_scalar(label, f"{path}.label").strip(), read_scalar(value.get("text"), f"{path}.text"))


def _from_lists(value: Mapping[str, Any], path: str) -> list[Choice]:
    texts = value["text"]
    labels = next((value[key] for key in _LABEL_KEYS if isinstance(value.get(key), list)), None)
    if labels is None or len(labels) != len(texts):
        found = "no list of labels" if labels is None else f"{len(labels)} labels"
        raise _refusal(f"{path} has {found} for {len(texts)} texts, wanted a label for each")
    pairs = enumerate(zip(labels, texts, strict=True))
    return [
        Choice(read_scalar(label, f"{path}.label[{i}]").strip(), read_scalar(text, f"{path}.text[{i}]"))
        for i, (label, text) in pairs
    ]


def _from_texts(texts: Sequence[str], path: str) -> list[Choice]:
    """Take the letters from the texts if they are A, B, C in order; initials, as in `T. Hardy`, are none."""
    matches = [_LABELLED.fullmatch(text) for text in texts]
    labelled = [match is not None and (match["round"] or match["bare"]) == ascii_uppercase[i % 26]
                for i, match in enumerate(matches)]  # fmt: skip
    if all(labelled):
        return [Choice(match["round"] or match["bare"], match["text"]) for match in matches if match is not None]
    sure = [i for i, match in enumerate(matches) if match is not None and labelled[i] and match["mark"] != "."]
    if sure:
        other = labelled.index(False)
        raise _refusal(
            f"{path}[{other}] is {shown(texts[other])}, a choice without a letter of its own, but {path}[{sure[0]}]"
            f" begins with {ascii_uppercase[sure[0]]}; wanted A, B, C in order before all, or before none"
        )
    return [Choice(ascii_uppercase[i % 26], text) for i, text in enumerate(texts)]


def _check(choices: Sequence[Choice], path: str) -> None:
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise _refusal(f"{path} has {len(choices)} choices, wanted 2 to {len(ascii_uppercase)}")
    labels = [choice.label for choice in choices]
    for choice in choices:
        if not _LABEL.fullmatch(choice.label) or labels.count(choice.label) > 1:
            raise _refusal(f"{path} has the label {shown(choice.label)}, wanted a letter that no other choice has")
        if not fold(choice.text):
            raise _refusal(f"choice {choice.label} of {path} is empty, wanted text")


def _refusal(message: str) -> RowError:
    return RowError("choices", message)
