"""Questions with choices: one form for the letters and texts that sets publish in several."""

import re
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from coconut.config.messages import shown
from coconut.data.documents import parse_json
from coconut.data.examples import fold
from coconut.data.records import RowError, kind_shown, read_scalar

_LABEL = re.compile(r"[A-Za-z]|[0-9]{1,2}")
_LABELLED = re.compile(r"\s*(?:\((?P<round>[A-Z])\)|(?P<bare>[A-Z])(?P<mark>[):.]))\s*(?P<text>.*)", re.DOTALL)
_WHOLE = re.compile(r"([0-9]+)\.0*")
_LABEL_KEYS = ("label", "letter", "key")


class Choice(NamedTuple):
    """One choice of a question."""

    label: str
    text: str


def read_choices(value: Any, path: str) -> list[Choice]:
    """Read the choices of a row.

    A list of texts, with their letters (`A)21`) or without, then A, B, C in order; a list of `{label, text}`; an object
    of two lists, `{label: [...], text: [...]}`; an object of texts by letter; or one text, `A) 21 B) 22`.

    Raises:
        RowError: It is none of these; a choice has no letter, or another's; or there are fewer than two.
    """
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        choices = [_from_object(one, f"{path}[{i}]") for i, one in enumerate(value)]
    elif isinstance(value, list):
        choices = _from_texts([read_scalar(one, f"{path}[{i}]") for i, one in enumerate(value)], path)
    elif isinstance(value, str):
        choices = _from_one_text(value, path)
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
    """Return the choice that an answer names by its letter, its text, its index from 0, or its number from 1.

    Raises:
        RowError: No choice is named so, or two are.
    """
    if named_by in ("index", "number", "one_hot"):
        first = 1 if named_by == "number" else 0
        place = _WHOLE.sub(r"\1", answer.strip())
        found = [choice for i, choice in enumerate(choices, start=first) if place == str(i)]
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


def read_one_hot(value: Any, path: str) -> str:
    """Return the index of the only 1 or true of a list, as text.

    Raises:
        RowError: It is no such list.
    """
    marks = [read_scalar(one, f"{path}[{i}]") for i, one in enumerate(value)] if isinstance(value, list) else []
    places = [i for i, mark in enumerate(marks) if mark.casefold() in ("1", "1.0", "true")]
    if len(places) != 1:
        found = f"{len(places)} of {len(marks)} that are 1 or true" if marks else kind_shown(value)
        raise _refusal(f"{path} is {found}, wanted a list with one of them, as answer_names: one_hot says")
    return str(places[0])


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


def _from_one_text(text: str, path: str) -> list[Choice]:
    """Part one text before its letters or numbers, `a ) 38 , b ) 27`, which must be A, B, C or 1, 2, 3 in order."""
    if text.lstrip().startswith(("[", "{")):
        try:
            value = parse_json(text)
        except ValueError:
            raise _refusal(
                f"{path} is {shown(text)}, which is no JSON, wanted a list or an object of choices"
            ) from None
        return read_choices(value, path)
    for labels in (ascii_uppercase, [str(number) for number in range(1, 27)]):
        starts: list[re.Match[str]] = []
        for label in labels:
            pattern = re.compile(rf"(?:^|(?<=[\s,;|]))\s*(?:\({label}\)|{label}\s?[):.])", re.IGNORECASE)
            start = pattern.search(text, starts[-1].end() if starts else 0)
            if start is None:
                break
            starts.append(start)
        if len(starts) > 1 and not text[: starts[0].start()].strip():
            ends = [start.start() for start in starts[1:]] + [len(text)]
            parts = [text[start.end() : end].strip(" ,;|\t\r\n") for start, end in zip(starts, ends, strict=True)]
            return [Choice(label, part) for label, part in zip(labels, parts, strict=False)]
    raise _refusal(f"{path} is {shown(text)}, wanted a list of choices, or one text such as 'A) 21 B) 22 C) 23'")


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
