"""The project's only reader of YAML: the values that DVC reads (YAML 1.2), or an error with the line and the cure.

DVC reads with ruamel.yaml, which needs .6 s for a `dvc.lock` of 2,800 lines. PyYAML's C parser needs 8 ms for its
events; the values are built from them here, by ruamel's rules. Building them here also bounds what a damaged or
hostile file can cost: nothing is recursive, and depth and aliases are counted before anything is stored.
`tests/test_strict.py` compares the result with DVC's own reader.
"""

import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # A PyYAML built without libyaml has no C parser.

_MAX_DEPTH = 100
_MAX_REPEATED = 10_000
"""Values that aliases may repeat in all. Ten lines of aliases to aliases can stand for billions of values."""
_MAX_DIGITS = 1_000
"""Characters of a whole number. Python refuses to print one of more than 4,300 digits, so no message could show it."""

_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{f"{sign}.{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")},
}
_FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9_]+(?:[eE][-+][0-9]+)?"
)
_INT = re.compile(r"[-+]?(?:0b[01_]+|0o?[0-7_]+|[0-9_]+|0x[0-9a-fA-F_]+)")
_DATE = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?"
    r"(?:[ \t]*(?:Z|[-+][0-9]{1,2}(?::[0-9]{2})?))?"
)
_UNREADABLE = re.compile(
    "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ufeff\\ufffe\\uffff\\ud800-\\udfff]"
)
"""Characters that YAML forbids, and those that YAML 1.1 and 1.2 read in two ways."""
_BASES = {"0b": 2, "0o": 8, "0x": 16}


def read_yaml(path: Path) -> Any:
    """Read a file that holds one YAML document.

    Raises:
        ValueError: naming the file, the line, what was found and what was wanted.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; run from the repository's top folder") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: found a folder, wanted a YAML file; name one in it") from None
    return parse_yaml(content, str(path))


def parse_yaml(text: str | bytes, place: str) -> Any:
    """Read one YAML document; `place` is the file that the errors name. An empty document is None.

    Raises:
        ValueError: naming the place, the line, what was found and what was wanted.

    >>> parse_yaml("{epochs: 010, lr: 1e-5, markers: yes}", "params.yaml")
    {'epochs': 10, 'lr': 1e-05, 'markers': 'yes'}
    """
    text = _decode(text, place)
    try:
        return _Builder().build(yaml.parse(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{place}: not valid YAML: {_describe(error, text)}") from None
    except _RefusedError as error:
        raise ValueError(f"{place}: {error}") from None


_MERGE_MARK = re.compile(r"^(<{7}|={7}|>{7}|\|{7})(?=[ \r\n]|$)", re.MULTILINE)


def _decode(text: str | bytes, place: str) -> str:
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    text = text.removeprefix("\ufeff")
    if found := _UNREADABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(
            f"{place}: not valid YAML: line {line} holds the invisible character U+{ord(found[0]):04X},"
            ' wanted text that can be seen; take it out, or write it as an escape such as "\\u2028"'
        )
    return text


def find_merge(text: str) -> str | None:
    r"""Say where a text holds the marks of a merge that nobody has settled; None where it holds none.

    >>> find_merge("a: 1\n<<<<<<< HEAD\n")
    'line 2 holds <<<<<<<, the mark of a merge; keep one side of it, and delete the marks'
    """
    found = _MERGE_MARK.search(text)
    if found is None:
        return None
    line = text.count("\n", 0, found.start()) + 1
    return f"line {line} holds {found[0]}, the mark of a merge; keep one side of it, and delete the marks"


def _describe(error: yaml.MarkedYAMLError, text: str) -> str:
    if merge := find_merge(text):
        return merge
    mark = error.problem_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if mark and text[mark.index : mark.index + 1] == "\t":
        return f"{where}found a tab, wanted spaces; replace it"
    context = f", {error.context} from line {error.context_mark.line + 1} on" if error.context_mark else ""
    return f"{where}{error.problem}{context}; fix that line, or quote its value if it is text"


class _RefusedError(Exception):
    """Found in a document that is YAML, but not one that this project reads."""

    def __init__(self, event: yaml.Event, message: str) -> None:
        super().__init__(f"line {_line(event)}: {message}")


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


_NO_KEY: Any = object()
_MERGE: Any = object()
"""The key `<<`: the mapping takes over the values of the mapping, or of the list of mappings, that follows it."""


@dataclass
class _Collection:
    """A list or mapping whose end has not been read yet."""

    value: Any
    anchor: str | None = None
    num_values: int = 1
    """Values in it, itself counted and aliases written out."""
    key: Any = _NO_KEY
    """In a mapping, the key whose value comes next."""
    lines: dict[Any, int] = field(default_factory=dict)
    """In a mapping, the line of each key."""
    merged: dict[Any, Any] = field(default_factory=dict)
    """In a mapping, what `<<` takes over; the mapping's own values win."""


class _Builder:
    """Builds the value of a document from its events."""

    def __init__(self) -> None:
        self.opened = [_Collection([])]
        """The document, and from the outside in the collections that have begun and not ended."""
        self.anchors: dict[str, tuple[Any, int]] = {}
        """Finished values that have a name, and how many values each of them holds."""
        self.num_repeated = 0
        self.handlers: dict[type, Callable[[Any], None]] = {
            yaml.DocumentStartEvent: self._start_document,
            yaml.MappingStartEvent: self._start_collection,
            yaml.MappingEndEvent: self._end_collection,
            yaml.SequenceStartEvent: self._start_collection,
            yaml.SequenceEndEvent: self._end_collection,
            yaml.ScalarEvent: self._take_scalar,
            yaml.AliasEvent: self._take_alias,
        }

    def build(self, events: Iterator[yaml.Event]) -> Any:
        for event in events:
            if handler := self.handlers.get(type(event)):  # None at the ends of the stream and of the document.
                handler(event)
        (document,) = self.opened
        return document.value[0] if document.value else None

    def _start_document(self, event: yaml.DocumentStartEvent) -> None:
        if event.version or event.tags:
            raise _RefusedError(event, "found a directive, such as %YAML, wanted none; take the line out")
        if self.opened[0].value:
            raise _RefusedError(event, "found a second document, wanted one; take out this line and what follows it")

    def _start_collection(self, event: yaml.CollectionStartEvent) -> None:
        _refuse_tag(event)
        if len(self.opened) > _MAX_DEPTH:
            raise _RefusedError(event, f"nested deeper than {_MAX_DEPTH} levels, wanted fewer; restore the file")
        if event.anchor is not None:
            self.anchors.pop(event.anchor, None)
        self.opened.append(_Collection({} if isinstance(event, yaml.MappingStartEvent) else [], event.anchor))

    def _end_collection(self, event: yaml.CollectionEndEvent) -> None:
        ended = self.opened.pop()
        value = ended.merged | ended.value if ended.merged else ended.value
        self._take(event, value, ended.num_values, ended.anchor)

    def _take_scalar(self, event: yaml.ScalarEvent) -> None:
        _refuse_tag(event)
        is_plain = event.implicit[0]
        self._take(event, _read_plain(event) if is_plain else event.value, 1, event.anchor)

    def _take_alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self.anchors:
            raise _RefusedError(
                event,
                f"found the alias *{event.anchor}, wanted one whose value, marked &{event.anchor}, ends above it;"
                " quote it if it is text",
            )
        value, num_values = self.anchors[event.anchor]
        self.num_repeated += num_values
        if self.num_repeated > _MAX_REPEATED:
            raise _RefusedError(
                event, f"found aliases that repeat more than {_MAX_REPEATED} values, wanted fewer; write the values out"
            )
        self._take(event, value, num_values, None)

    def _take(self, event: yaml.Event, value: Any, num_values: int, anchor: str | None) -> None:
        """Put a finished value into the innermost collection that has not ended."""
        if anchor is not None:
            self.anchors[anchor] = value, num_values
        inner = self.opened[-1]
        inner.num_values += num_values
        if isinstance(inner.value, dict) and inner.key is _NO_KEY:
            _add_key(event, inner, value)
        elif inner.key is _MERGE:
            inner.merged, inner.key = _merge(event, value), _NO_KEY
        elif value is _MERGE:
            raise _RefusedError(event, "found << as a value, wanted it as a key; quote it if it is text")
        elif isinstance(inner.value, list):
            inner.value.append(value)
        else:
            inner.value[inner.key], inner.key = value, _NO_KEY


def _refuse_tag(event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
    if event.tag is not None:
        raise _RefusedError(event, f"found the tag {event.tag!r}, wanted a value without one; take it out")


def _add_key(event: yaml.Event, mapping: _Collection, key: Any) -> None:
    if not isinstance(key, Hashable):
        raise _RefusedError(event, "found a list or mapping as a key, wanted text; quote it if it is text")
    line = _line(event)
    if key in mapping.lines:
        shown = "<<" if key is _MERGE else repr(key)
        raise _RefusedError(
            event,
            f"key {shown} stands already on line {mapping.lines[key]} of the same mapping, wanted it once"
            " (only the last one would count); take one of the two out",
        )
    mapping.lines[key] = line
    mapping.key = key


def _merge(event: yaml.Event, value: Any) -> dict[Any, Any]:
    mappings = value if isinstance(value, list) else [value]
    if not all(isinstance(mapping, dict) for mapping in mappings):
        raise _RefusedError(event, "found a value of << that is no mapping, wanted an alias of one, such as *name")
    return {key: value for mapping in reversed(mappings) for key, value in mapping.items()}


def _read_plain(event: yaml.ScalarEvent) -> Any:
    """Read a scalar that stands without quotes."""
    text = event.value
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in "+-.0123456789":
        return _read_number(event)
    if text == "=":
        raise _RefusedError(event, "found a lone '=', which DVC refuses, wanted a value; quote it if it is text")
    return _MERGE if text == "<<" else text


def _read_number(event: yaml.ScalarEvent) -> Any:
    """Read a plain scalar that begins as numbers do, and may be text all the same."""
    text = event.value
    digits = text.replace("_", "")
    try:
        if _FLOAT.fullmatch(text):
            return float(digits)
        if _INT.fullmatch(text):
            if len(digits) > _MAX_DIGITS:
                raise ValueError
            return int(digits, _BASES.get(digits.lstrip("+-")[:2], 10))
    except ValueError:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise _RefusedError(
            event, f"found {shown!r}, which is out of range, wanted a smaller number; quote it if it is text"
        ) from None
    if _DATE.fullmatch(text):
        raise _RefusedError(event, f"found the date {text!r}, wanted a number or text; quote it if it is text")
    return text
