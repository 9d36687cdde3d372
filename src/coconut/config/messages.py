"""Parts of error messages: how a value is shown, what kind it is, and which name was probably meant."""

import difflib
from collections.abc import Iterable
from typing import Any

_MAX_SHOWN = 60


def shown(value: Any) -> str:
    r"""Write a value so that it fits in a message and holds no character that a terminal would obey.

    >>> shown("red \x1b[31m")
    "'red \\x1b[31m'"
    """
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_SHOWN else f"{value[: _MAX_SHOWN - 3]}...")
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def key_shown(key: Any) -> str:
    r"""Write a key as it stands in the file, or like any other value where a terminal could not show it.

    >>> key_shown("batch_size"), key_shown("a\x1b[31m")
    ('batch_size', "'a\\x1b[31m'")
    """
    text = str(key)
    return text if text.isprintable() and len(text) <= _MAX_SHOWN else shown(text)


def kind_of(value: Any) -> str:
    """Name the kind of a value from YAML or JSON.

    >>> kind_of({}), kind_of(True), kind_of(1.5), kind_of(None)
    ('a mapping', 'true/false', 'a number', 'null')
    """
    return {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }.get(type(value), type(value).__name__)


def first_line(error: BaseException, most: int = 300) -> str:
    r"""Return the first line of an error's text, white space folded, or the error's kind where it has no text.

    >>> first_line(ValueError("a  tensor\nis missing")), first_line(MemoryError())
    ('a tensor', 'MemoryError')
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].split())[:most]


def suggest(name: Any, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the known name that is closest to it, or nothing.

    >>> suggest("batchsize", ["batch_size", "epochs"])
    '; did you mean batch_size?'
    >>> suggest("chess", ["multiplication"])
    ''
    """
    by_plain_name = {_plain(other): other for other in known}
    close = difflib.get_close_matches(_plain(str(name)[:100]), by_plain_name, n=1)
    return f"; did you mean {by_plain_name[close[0]]}?" if close else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
