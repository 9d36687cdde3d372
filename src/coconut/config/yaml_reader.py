"""The project's only reader of YAML: the values that DVC reads (YAML 1.2), or an error with the line and the cure.

DVC reads with ruamel.yaml, which needs .6 s for a `dvc.lock` of 2,800 lines, and PyYAML's own values are those of YAML
1.1 (`yes`, `010`, `12:30`). So PyYAML's C loader reads the file, and the scalars get their values by ruamel's table.
Depth and aliases are bounded, as a damaged or hostile file could ask for any amount of time and memory.
`tests/test_strict.py` compares the result with DVC's own reader.
"""

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml

_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # A PyYAML built without libyaml has no C loader.

_MAX_DEPTH = 100
_MAX_REPEATED = 10_000
"""Values that aliases may repeat in all. Ten lines of aliases to aliases can stand for billions of values."""
_UNREADABLE = re.compile(
    "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ufeff\\ufffe\\uffff\\ud800-\\udfff]"
)
"""Characters that YAML forbids, and those that YAML 1.1 and 1.2 read in two ways."""
_MERGE: Any = object()
"""The key `<<`: the mapping takes over the values of the mapping, or of the list of mappings, that follows it."""


def _read_float(text: str) -> float:
    return float(re.sub(r"_|\.(?=[a-z])", "", text.lower()))  # Python writes `.inf` without the point.


def _read_int(text: str) -> int:
    digits = text.replace("_", "")
    number = int(digits, {"0b": 2, "0o": 8, "0x": 16}.get(digits.lstrip("+-")[:2], 10))
    str(number)  # It fails where a number has more digits than Python prints, so that no message could show it.
    return number


_RESOLVERS: tuple[tuple[str, re.Pattern[str], Callable[[str], Any] | str], ...] = (
    ("~nN", re.compile(r"~|null|Null|NULL|"), lambda _: None),
    ("tT", re.compile(r"true|True|TRUE"), lambda _: True),
    ("fF", re.compile(r"false|False|FALSE"), lambda _: False),
    (
        "-+.0123456789",
        re.compile(
            r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|[-+]?\.[0-9_]+([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        _read_float,
    ),
    ("-+0123456789", re.compile(r"[-+]?(0b[01_]+|0o?[0-7_]+|[0-9_]+|0x[0-9a-fA-F_]+)"), _read_int),
    (
        "0123456789",
        re.compile(
            r"[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}"
            r"(\.[0-9]*)?([ \t]*(Z|[-+][0-9]{1,2}(:[0-9]{2})?))?"
        ),
        "found the date {}, wanted a number or text",
    ),
    ("=", re.compile(r"="), "found a lone {}, which DVC refuses, wanted a value"),
    ("<", re.compile(r"<<"), lambda _: _MERGE),
)
"""First characters, form and value of scalars without quotes, or the message that refuses them; all others are text."""


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
    try:
        text = (text.decode("utf-8") if isinstance(text, bytes) else text).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if found := _UNREADABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(
            f"{place}: not valid YAML: line {line} holds the invisible character U+{ord(found[0]):04X},"
            ' wanted text that can be seen; take it out, or write it as an escape such as "\\u2028"'
        )
    try:
        return _Reader(text).read_document()
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{place}: not valid YAML: {_describe(error, text)}") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _describe(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if mark and text[mark.index : mark.index + 1] == "\t":
        return f"{where}found a tab, wanted spaces; replace it"
    context = f", {error.context} from line {error.context_mark.line + 1} on" if error.context_mark else ""
    return f"{where}{error.problem}{context}; fix that line, or quote its value if it is text"


def _refuse(event: Any, message: str) -> NoReturn:
    raise ValueError(f"line {event.start_mark.line + 1}: {message}")


class _Reader(_Loader):  # type: ignore[misc]  # The class is known only when the program runs.
    """PyYAML's loader, which builds values from events by our table and within our bounds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.named: dict[str, tuple[Any, int]] = {}
        """Finished values that have a name, and how many values each of them holds."""
        self.num_read = self.num_repeated = 0

    def read_document(self) -> Any:
        """Return the value of the only document, or None if there is none."""
        self.get_event()
        if self.check_event(yaml.StreamEndEvent):
            return None
        start = self.get_event()
        if start.version or start.tags:
            _refuse(start, "found a directive, such as %YAML, wanted none; take the line out")
        value = self._read(0)
        self.get_event()
        if not self.check_event(yaml.StreamEndEvent):
            _refuse(self.get_event(), "found a second document, wanted one; take out this line and what follows it")
        return value

    def _read(self, depth: int, *, is_key: bool = False) -> Any:
        event = self.get_event()
        if isinstance(event, yaml.AliasEvent):
            return self._read_again(event)
        if event.tag is not None:
            _refuse(event, f"found the tag {event.tag!r}, wanted a value without one; take it out")
        if depth >= _MAX_DEPTH and not isinstance(event, yaml.ScalarEvent):
            _refuse(event, f"nested deeper than {_MAX_DEPTH} levels, wanted fewer; restore the file")
        self.named.pop(event.anchor, None)
        self.num_read += 1
        num_before = self.num_read
        if isinstance(event, yaml.ScalarEvent):
            value = _read_plain(event) if event.implicit[0] else event.value
        elif isinstance(event, yaml.MappingStartEvent):
            value = self._read_mapping(depth)
        else:
            value = []
            while not self.check_event(yaml.SequenceEndEvent):
                value.append(self._read(depth + 1))
            self.get_event()
        if value is _MERGE and not is_key:
            _refuse(event, "found << as a value, wanted it as a key; quote it if it is text")
        if event.anchor is not None:
            self.named[event.anchor] = value, self.num_read - num_before + 1
        return value

    def _read_again(self, event: yaml.AliasEvent) -> Any:
        name = event.anchor
        if name not in self.named:
            message = f"found the alias *{name}, wanted one whose value, marked &{name}, ends above it"
            _refuse(event, f"{message}; quote it if it is text")
        value, num_values = self.named[name]
        self.num_read += num_values
        self.num_repeated += num_values
        if self.num_repeated > _MAX_REPEATED:
            message = f"found aliases that repeat more than {_MAX_REPEATED} values, wanted fewer; write the values out"
            _refuse(event, message)
        return value

    def _read_mapping(self, depth: int) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        while not self.check_event(yaml.MappingEndEvent):
            event = self.peek_event()
            key = self._read(depth + 1, is_key=True)
            if not isinstance(key, Hashable):
                _refuse(event, "found a list or mapping as a key, wanted text; quote it if it is text")
            if key in lines:
                shown = "<<" if key is _MERGE else repr(key)
                message = f"key {shown} stands already on line {lines[key]} of the same mapping, wanted it once"
                _refuse(event, f"{message} (only the last one would count); take one of the two out")
            lines[key] = event.start_mark.line + 1
            event = self.peek_event()
            value = self._read(depth + 1)
            if key is not _MERGE:
                own[key] = value
                continue
            for mapping in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(mapping, dict):
                    _refuse(event, "found a value of << that is no mapping, wanted an alias of one, such as *name")
                merged |= mapping
        self.get_event()
        return merged | own


def _read_plain(event: yaml.ScalarEvent) -> Any:
    text = event.value
    for first, form, read in _RESOLVERS:
        if text[:1] in first and form.fullmatch(text):
            if isinstance(read, str):
                _refuse(event, f"{read.format(repr(text))}; quote it if it is text")
            try:
                return read(text)
            except ValueError:
                shown = text if len(text) <= 40 else f"{text[:37]}..."
                message = f"found {shown!r}, which is out of range, wanted a smaller number; quote it if it is text"
                _refuse(event, message)
    return text
