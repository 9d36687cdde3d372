"""The project's only reader of YAML: the values that DVC reads (YAML 1.2), or an error with the line and the cure.

DVC reads with ruamel.yaml, which needs .3 s for a `dvc.lock` of 2,300 lines; PyYAML's C loader needs .04 s, but its own
values are those of YAML 1.1 (`yes`, `010`, `12:30`). So it reads by ruamel's table of scalars, which is given here.
`tests/test_strict.py` compares the result with DVC's own reader.
"""

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # A PyYAML built without libyaml has no C loader.

_MAX_DEPTH = 100
"""Levels of nesting. Far beyond it, the C loader ends the process without a word."""
_MAX_VALUES = 1_000_000
"""Values of a document, aliases written out. Ten lines of aliases to aliases can stand for billions of values."""
_UNREADABLE = re.compile(
    "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ufeff\\ufffe\\uffff\\ud800-\\udfff]"
)
"""Characters that YAML forbids, and those that YAML 1.1 and 1.2 read in two ways."""
_DIRECTIVE = re.compile(r"^%(YAML|TAG)\b", re.MULTILINE)
_MERGE: Any = object()
"""The key `<<`: the mapping takes over the values of the mapping, or of the list of mappings, that follows it."""


def _read_float(text: str) -> float:
    return float(re.sub(r"_|\.(?=[a-z])", "", text.lower()))  # Python writes `.inf` and `.nan` without the point.


def _read_int(text: str) -> int:
    digits = text.replace("_", "")
    number = int(digits, {"0b": 2, "0o": 8, "0x": 16}.get(digits.lstrip("+-")[:2], 10))
    str(number)  # It fails where a number has more digits than Python prints, so that no message could show it.
    return number


_SCALARS: dict[str, tuple[str, str, Callable[[str], Any] | str]] = {
    "null": ("~nN", r"~|null|Null|NULL|", lambda _: None),
    "true": ("tT", r"true|True|TRUE", lambda _: True),
    "false": ("fF", r"false|False|FALSE", lambda _: False),
    "float": (
        "-+.0123456789",
        r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9_]+([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _read_float,
    ),
    "int": ("-+0123456789", r"[-+]?(0b[01_]+|0o?[0-7_]+|[0-9_]+|0x[0-9a-fA-F_]+)", _read_int),
    "date": (
        "0123456789",
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}"
        r"(\.[0-9]*)?([ \t]*(Z|[-+][0-9]{1,2}(:[0-9]{2})?))?",
        "found the date {}, wanted a number or text",
    ),
    "equals": ("=", r"=", "found a lone {}, which DVC refuses, wanted a value"),
    "merge": ("<", r"<<", "found << as a value, wanted it as a key"),
}
"""Scalars without quotes, as ruamel.yaml tells them apart: first characters, form, and value or refusal.

All others are text. The names are the loader's tags; one that a document writes itself, such as `!!int`, is refused.
"""
_MERGE_MARK = re.compile(r"^(<{7}|={7}|>{7}|\|{7})(?=[ \r\n]|$)", re.MULTILINE)


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
        raise ValueError(
            f"{place}: not valid YAML: line {_line_at(text, found)} holds the invisible character"
            f" U+{ord(found[0]):04X}, wanted text that can be seen; take it out, or write it as an escape such as"
            ' "\\u2028"'
        )
    if found := _DIRECTIVE.search(text):
        raise ValueError(
            f"{place}: line {_line_at(text, found)}: found a directive, such as %YAML, wanted none; take the line out"
        )
    try:
        return _Yaml12Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{place}: not valid YAML: {_describe(error, text)}") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _line_at(text: str, found: re.Match[str]) -> int:
    return text.count("\n", 0, found.start()) + 1


def find_merge(text: str) -> str | None:
    r"""Say where a text holds the marks of a merge that nobody has settled; None where it holds none.

    >>> find_merge("a: 1\n<<<<<<< HEAD\n")
    'line 2 holds <<<<<<<, the mark of a merge; keep one side of it, and delete the marks'
    """
    found = _MERGE_MARK.search(text)
    if found is None:
        return None
    return (
        f"line {_line_at(text, found)} holds {found[0]}, the mark of a merge; keep one side of it, and delete the marks"
    )


def _describe(error: yaml.MarkedYAMLError, text: str) -> str:
    if merge := find_merge(text):
        return merge
    mark = error.problem_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if mark and text[mark.index : mark.index + 1] == "\t":
        return f"{where}found a tab, wanted spaces; replace it"
    context = f", {error.context} from line {error.context_mark.line + 1} on" if error.context_mark else ""
    return f"{where}{error.problem}{context}; fix that line, or quote its value if it is text"


def _refuse(node: Any, message: str) -> NoReturn:
    raise ValueError(f"line {node.start_mark.line + 1}: {message}")


class _Yaml12Loader(_Loader):  # type: ignore[misc]  # The class is known only when the program runs.
    """PyYAML's loader with the scalars of YAML 1.2, and what DVC refuses refused."""

    DEFAULT_SCALAR_TAG, DEFAULT_SEQUENCE_TAG, DEFAULT_MAPPING_TAG = "text", "list", "mapping"
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.num_values = 0
        self.sizes: dict[yaml.Node, int] = {}
        """How many values each finished value holds, itself counted and aliases written out."""

    def descend_resolver(self, parent: yaml.Node | None, _: Any) -> None:
        """Count a level of nesting, which begins at a value in `parent`."""
        self.depth += 1
        if self.depth > _MAX_DEPTH + 1:  # The innermost level is that of scalars.
            _refuse(parent, f"nested deeper than {_MAX_DEPTH} levels, wanted fewer; restore the file")

    def ascend_resolver(self) -> None:
        """Count off a level of nesting."""
        self.depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = True) -> Any:
        """Return the value of a node, which several aliases may stand for."""
        num_before = self.num_values
        value = super().construct_object(node, deep)
        self.num_values += self.sizes.get(node, 1)
        self.sizes.setdefault(node, self.num_values - num_before)
        if self.num_values > _MAX_VALUES:
            _refuse(node, f"found aliases that make more than {_MAX_VALUES} values, wanted fewer; write the values out")
        return value

    def construct_mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        """Return a mapping, in which what `<<` takes over stands first, and the mapping's own values win."""
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            is_merge = key_node.tag == "merge"
            key = _MERGE if is_merge else self.construct_object(key_node)
            if not isinstance(key, Hashable):
                _refuse(key_node, "found a list or mapping as a key, wanted text; quote it if it is text")
            if key in lines:
                message = (
                    f"key {'<<' if is_merge else repr(key)} stands already on line {lines[key]} of the same mapping"
                )
                cure = "wanted it once (only the last one would count); take one of the two out"
                _refuse(key_node, f"{message}, {cure}")
            lines[key] = key_node.start_mark.line + 1
            value = self.construct_object(value_node)
            if not is_merge:
                own[key] = value
                continue
            for mapping in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(mapping, dict):
                    _refuse(value_node, "found a value of << that is no mapping, wanted an alias of one, such as *name")
                merged |= mapping
        return merged | own

    def construct_plain(self, node: yaml.ScalarNode) -> Any:
        """Return the value of a scalar that our table knows."""
        text = node.value
        _, _, read = _SCALARS[node.tag]
        if isinstance(read, str):
            _refuse(node, f"{read.format(repr(text))}; quote it if it is text")
        try:
            return read(text)
        except ValueError:
            shown = text if len(text) <= 40 else f"{text[:37]}..."
            _refuse(node, f"found {shown!r}, which is out of range, wanted a smaller number; quote it if it is text")

    def construct_undefined(self, node: yaml.Node) -> NoReturn:
        """Refuse a tag that stands in the document."""
        _refuse(node, f"found the tag {node.tag!r}, wanted a value without one; take it out")


for _tag, (_first, _form, _) in _SCALARS.items():
    # A document writes null also as nothing at all, which has no first character.
    _firsts = ["", *_first] if _tag == "null" else list(_first)
    _Yaml12Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_form})\Z"), _firsts)
    _Yaml12Loader.add_constructor(_tag, _Yaml12Loader.construct_plain)
_Yaml12Loader.add_constructor("text", _Yaml12Loader.construct_scalar)
_Yaml12Loader.add_constructor("list", _Yaml12Loader.construct_sequence)
_Yaml12Loader.add_constructor("mapping", _Yaml12Loader.construct_mapping)
_Yaml12Loader.add_constructor(None, _Yaml12Loader.construct_undefined)
