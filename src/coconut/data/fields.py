"""Turns rows into examples by a map of fields: `format: fields`, and the presets of `coconut.data.presets`."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from coconut.config.field_map import Fields, IsNot, Scalar
from coconut.config.messages import key_shown, shown, suggest
from coconut.config.templates import Template, parse_template
from coconut.data.choices import append_choices, find_choice, read_choices, read_one_hot
from coconut.data.documents import RepeatedKey
from coconut.data.examples import fold
from coconut.data.formats import NOTE, split_chain
from coconut.data.records import ParsedRow, RowError, kind_shown, make_row, number_text, read_record, read_scalar
from coconut.data.sentences import split_sentences

_NO_ANSWERS = frozenset(["nan", "inf", "+inf", "-inf", "infinity", "+infinity", "-infinity", "none", "null"])
_TRUTH = {"true": True, "yes": True, "false": False, "no": False}
_WORDS = {"true_false": {True: "true", False: "false"}, "yes_no": {True: "yes", False: "no"}}
_SPLITTERS: Mapping[str, Callable[[str], list[str]]] = {
    "sentences": split_sentences,
    "chain": split_chain,
    "notes": NOTE.findall,
}
_INDEX = re.compile("[0-9]{1,9}")
_BY_ROLE = re.compile(r"(?P<key>.+)\[(?P<role>[^\[\]]+)\]")
_ROLE_KEYS = ("role", "from")
"""How the messages of a chat say who speaks."""
_MAX_LISTED = 30
"""Fields that a message lists."""


class FieldReader:
    """Reads rows by one map, which `coconut.config.rules` has checked."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        assert fields.question is not None, "the config requires a question"
        assert fields.answer is not None, "the config requires an answer"
        self._question = parse_template(fields.question)
        self._answer = parse_template(fields.answer)
        self._steps = None if fields.steps is None else parse_template(fields.steps)

    @cached_property
    def paths(self) -> Mapping[str, str]:
        """Every path of the map, by the key that holds it first."""
        parts = {"question": self._question, "answer": self._answer, "steps": self._steps}
        keys = {path: key for key, template in parts.items() if template for path in reversed(template.paths)}
        keys |= dict.fromkeys(self.fields.where or (), "where")
        keys |= {} if self.fields.group is None else {self.fields.group: "group"}
        return keys | ({} if self.fields.choices is None else {self.fields.choices: "choices"})

    def keeps(self, content: Any) -> bool:
        """Tell whether a row meets `where`. A row that cannot be judged is kept, so that the parser refuses it."""
        try:
            return all(_meets(read_scalar_or_null(content, path), c) for path, c in (self.fields.where or {}).items())
        except RowError:
            return True

    def parse(self, content: Any) -> ParsedRow:
        """Turn a row into an example.

        Raises:
            RowError: A field is missing or of another kind than its key wants, or there is no usable answer.
        """
        if isinstance(content, list):
            raise RowError(
                "layout", f"found a list of {len(content)} values, wanted an object, or as many cells as columns"
            )
        record = read_record(content)
        for path in self.fields.where or ():
            read_scalar_or_null(record, path)
        question, answer = self._fill(self._question, record, "question"), self._read_answer(record)
        if self.fields.choices is None:
            _refuse_missing_value(answer)
        else:
            choices = read_choices(find_field(record, self.fields.choices), self.fields.choices)
            choice = find_choice(answer, choices, self.fields.answer_names or "letter")
            question = append_choices(question, choices)
            answer = fold(choice.text) if self.fields.answer_as == "text" else choice.label
        return make_row(question, self._read_steps(record), answer, self._read_group(record))

    def _read_group(self, record: Mapping[str, Any]) -> str:
        if self.fields.group is None:
            return ""
        value = read_scalar_or_null(record, self.fields.group)
        return "" if value is None else str(value)

    def _read_answer(self, record: Mapping[str, Any]) -> str:
        if self.fields.answer_names == "one_hot":
            return read_one_hot(find_field(record, self._answer.paths[0]), self._answer.paths[0])
        answer = self._fill(self._answer, record, "answer")
        if self.fields.answer_in == "boxed":
            answer = _read_box(answer)
        after, before = self.fields.answer_after, self.fields.answer_before
        if after is not None:
            _, found, answer = answer.rpartition(after)
            if not found:
                raise RowError("no answer", f"no {shown(after)} before an answer at the end of {shown(answer)}")
        if before is not None:
            if answer.count(before) > 1:
                raise RowError(
                    "several answers",
                    f"answer is {shown(answer)}, which holds {shown(before)} twice, so that it is not clear which part"
                    " is the answer; wanted it once",
                )
            answer = answer.partition(before)[0]
        if self.fields.booleans is not None:
            truth = _TRUTH.get(answer.strip().casefold())
            if truth is None:
                raise RowError("no truth value", f"answer is {shown(answer)}, wanted true, false, yes or no")
            answer = _WORDS[self.fields.booleans][truth]
        return answer

    def _read_steps(self, record: Mapping[str, Any]) -> list[str]:
        rule = self.fields.split_steps or "list"
        if self._steps is None:
            return []
        if rule == "list":
            return _read_list(record, self._steps.paths[0])
        text = self._fill(self._steps, record, "steps")
        if self.fields.answer_after is not None and self._steps == self._answer:
            text = text.rpartition(self.fields.answer_after)[0]
        if rule == "separator":
            assert self.fields.separator is not None, "the config requires a separator"
            return text.split(self.fields.separator)
        return _SPLITTERS[rule](text)

    def _fill(self, template: Template, record: Mapping[str, Any], part: str) -> str:
        """Write the texts and fields of a template one after the other; null is left out of a question's or steps'."""
        values = [find_field(record, path) for path in template.paths]
        is_blank = all(value is None or (value == "" and len(values) == 1 and part != "steps") for value in values)
        texts = [template.texts[0]]
        for path, value, text in zip(template.paths, values, template.texts[1:], strict=True):
            if is_blank or (value is None and part == "answer"):
                found = "null" if value is None else "empty"
                raise RowError("no answer" if part == "answer" else "missing field", f"{path} is {found}, wanted text")
            texts += ["" if value is None else self._read_part(value, path), text]
        return "".join(texts)

    def _read_part(self, value: Any, path: str) -> str:
        if not isinstance(value, list):
            return read_scalar(value, path)
        if self.fields.join is None:
            raise RowError(
                "wrong type",
                f"{path} is a list, wanted text; fields.join says what stands between its values, such as"
                f' join: " ", or name one of them, as in {path}.0',
            )
        return self.fields.join.join(read_scalar(one, f"{path}[{i}]") for i, one in enumerate(value) if one is not None)


def choose_reader(maps: Sequence[Fields], contents: Sequence[Any]) -> FieldReader:
    """Return the reader of the first map of which fewest fields are in no row.

    Raises:
        ValueError: A field of it is in no row; the message begins with its key.
    """
    records = [one for one in contents if isinstance(one, Mapping) and not isinstance(one, RepeatedKey)]
    readers = [FieldReader(fields) for fields in maps]
    absent = [
        [path for path in reader.paths if all(_walk(one, path)[1] is not None for one in records)] for reader in readers
    ]
    best = min(range(len(readers)), key=lambda i: len(absent[i]))
    if records and absent[best]:
        path = absent[best][0]
        try:
            find_field(records[0], path)
        except RowError as error:
            raise ValueError(f"{readers[best].paths[path]}: no row has the field {shown(path)}: {error}") from None
    return readers[best]


def describe_values(contents: Sequence[Any], path: str) -> str:
    """List the values of a field, the most frequent first, for a message."""
    values: Counter[str] = Counter()
    for content in contents:
        try:
            values[str(read_scalar_or_null(content, path))] += 1
        except RowError:
            continue
    return ", ".join(f"{shown(value)} ({number})" for value, number in values.most_common(8))


def find_field(record: Any, path: str) -> Any:
    """Return the value at a path: whole keys before parts of them, mappings and lists only.

    >>> find_field({"answer": {"text": ["a", "b"]}, "answer.text": 5}, "answer.text")
    5
    >>> find_field({"answer": {"text": ["a", "b"]}}, "answer.text.1")
    'b'

    Raises:
        RowError: There is none.
    """
    value, walked = _walk(record, path)
    if walked is None and not isinstance(value, RepeatedKey):
        return value
    raise _missing(value, path, walked or "")


def _walk(record: Any, path: str) -> tuple[Any, str | None]:
    """Return the value at a path and None; or the value at which the path ends too early, and the path to that."""
    value, rest = record, path
    while rest:
        key, _, below = rest.partition(".")
        if isinstance(value, RepeatedKey):
            break
        if isinstance(value, Mapping) and rest in value:
            return value[rest], None
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif (message := _message_of(value, key)) is not None:
            value = message
        elif isinstance(value, list) and _INDEX.fullmatch(key) and int(key) < len(value):
            value = value[int(key)]
        else:
            break
        rest = below
    return (value, None) if not rest else (value, path[: len(path) - len(rest)].rstrip("."))


def _find_messages(value: Any, key: str) -> tuple[list[Any], str]:
    """Return the messages that `key[role]` speaks of, and the role; none where it speaks of no list."""
    match = _BY_ROLE.fullmatch(key)
    messages = value.get(match["key"]) if match and isinstance(value, Mapping) else None
    return (messages, match["role"]) if match and isinstance(messages, list) else ([], "")


def _role_of(message: Any) -> str | None:
    roles = [message[key] for key in _ROLE_KEYS if key in message] if isinstance(message, Mapping) else []
    return str(roles[0]) if roles else None


def _message_of(value: Any, key: str) -> Any:
    """Return the only message of a role, or None."""
    messages, role = _find_messages(value, key)
    found = [message for message in messages if _role_of(message) == role]
    return found[0] if len(found) == 1 else None


def read_scalar_or_null(record: Any, path: str) -> str | None:
    """Return the text of a field, or None where it is null.

    Raises:
        RowError: The field is missing, or a list or an object.
    """
    value = find_field(record, path)
    return None if value is None else read_scalar(value, path)


def _missing(value: Any, path: str, walked: str) -> RowError:
    if isinstance(value, RepeatedKey):
        return RowError("repeated key", f"key {shown(value.key)} stands twice in the object, wanted it once")
    key = path[len(walked) :].lstrip(".").partition(".")[0]
    messages, role = _find_messages(value, key)
    if role:
        roles = [_role_of(message) for message in messages]
        found = ", ".join(str(one) for one in roles[:_MAX_LISTED] if one is not None) or "no role or from at all"
        return RowError(
            "missing field",
            f"{key_shown(key)}: found {roles.count(role)} messages of {shown(role)} among {found}, wanted one",
        )
    if isinstance(value, Mapping):
        names = [key_shown(name) for name in value]
        listed = ", ".join(names[:_MAX_LISTED]) or "no field at all"
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        place = f" in {key_shown(walked)}" if walked else ""
        return RowError("missing field", f"no {key_shown(key)}{place} among {listed}{more}{suggest(key, names)}")
    if isinstance(value, list):
        return RowError(
            "missing field",
            f"no {key_shown(path)}: {key_shown(walked)} is a list of {len(value)}, wanted the number of one of its"
            f" values, from 0 on, in place of {key_shown(key)}",
        )
    found = f"{key_shown(walked) if walked else 'the row'} is {kind_shown(value)}"
    return RowError("wrong type", f"no {key_shown(path)}: {found}, wanted an object or a list")


def _read_box(text: str) -> str:
    r"""Return what the last `\boxed{...}` holds, whose braces may be nested; of one without braces the word after it.

    >>> _read_box(r"so \boxed{1}, no, $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    >>> _read_box(r"so $\boxed 5$.")
    '5'
    """
    boxes = list(re.finditer(r"\\(?:f?boxed|fbox)(?:\s*\{|\s+(?P<word>[^\s{}$]+))", text))
    if boxes and boxes[-1]["word"]:
        return boxes[-1]["word"].rstrip(".,;")
    start = boxes[-1].end() if boxes else -1
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:] if start >= 0 else ""):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : start + match.start()]
    found = "no \\boxed{...}" if start < 0 else "a \\boxed{ that is not closed"
    raise RowError("no answer", f"{found} in the answer's field, whose end is {shown(text[-40:])}; wanted one")


def _read_list(record: Mapping[str, Any], path: str) -> list[str]:
    values = find_field(record, path)
    if not isinstance(values, list):
        raise RowError(
            "wrong type",
            f"{path} is {kind_shown(values)}, wanted a list of text; for steps in one text, fields.split_steps says how"
            " they part",
        )
    return [read_scalar(value, f"{path}[{i}]") for i, value in enumerate(values)]


def _refuse_missing_value(answer: str) -> None:
    if answer.strip().casefold() in _NO_ANSWERS:
        raise RowError(
            "no answer",
            f"answer is {shown(answer)}, as programs write a missing value, wanted an answer; leave such rows out with"
            " fields.where",
        )


def _meets(text: str | None, condition: IsNot | tuple[Scalar, ...] | Scalar) -> bool:
    is_negated = isinstance(condition, IsNot)
    wanted = condition.is_not if isinstance(condition, IsNot) else condition
    values = wanted if isinstance(wanted, tuple) else (wanted,)
    return (text in [str(number_text(value)) for value in values]) != is_negated
