"""Files of JSON and text from elsewhere: recognise what they are by their content, and parse them strictly."""

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coconut.config.messages import kind_of, shown

_SIGNATURES: Sequence[tuple[bytes, str, str]] = (
    (b"\x1f\x8b", "a gzip archive", "unpack it with gunzip"),
    (b"PK\x03\x04", "a zip archive", "unpack it with unzip"),
    (b"PK\x05\x06", "a zip archive", "unpack it with unzip"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it with unzstd"),
    (b"BZh", "a bzip2 archive", "unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it with unxz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", "unpack it with 7z"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it with unrar"),
    (b"\x04\x22\x4d\x18", "an lz4 archive", "unpack it with lz4 -d"),
    (b"PAR1", "a Parquet table", "save it as JSON Lines"),
    (b"ARROW1", "an Arrow table", "save it as JSON Lines"),
    (b"\x89HDF", "an HDF5 file", "save it as JSON Lines"),
    (b"SQLite format 3\x00", "an SQLite database", "save the table as JSON Lines"),
    (b"%PDF", "a PDF document", "download the data file itself"),
    (b"<?xml", "an XML document, as servers send for an error", "download the data file itself"),
    (b"<<<<<<< ", "an unresolved git conflict", "resolve it, or restore the file"),
    (b"\x80\x02", "a pickle, which can run code when it is opened,", "download the set in another format"),
    (b"\x80\x03", "a pickle, which can run code when it is opened,", "download the set in another format"),
    (b"\x80\x04", "a pickle, which can run code when it is opened,", "download the set in another format"),
    (b"\x80\x05", "a pickle, which can run code when it is opened,", "download the set in another format"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "save the file as UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "save the file as UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "save the file as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save the file as UTF-8"),
)
_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_LIKE = re.compile(rb"\s*version https?://\S*(git-lfs|hawser)\S*")
_TAR_MAGIC = slice(257, 262)
# Atomic groups: comments are skipped once, where a backtracking search would take exponential time.
_HTML = re.compile(rb"\s*(?>(?:(?><!--.*?-->)\s*)*)<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_ANNEX = re.compile(rb"\S*/annex/objects/\S+\s*")
_HEAD_BYTES = 1024


class RepeatedKey(dict[str, Any]):
    """A JSON object in which `key` stands twice. Only the last value is kept, as in Python's own parser."""

    key: str


class JsonFloat(float):
    """A JSON number with a point or an exponent; `text` is how the file writes it."""

    text: str

    def __new__(cls, text: str) -> "JsonFloat":
        number = super().__new__(cls, text)
        number.text = text
        return number


def describe_foreign(content: bytes) -> str | None:
    """Say what a file is, and the cure, where its first bytes show that it is not text in UTF-8.

    >>> describe_foreign(b"version https://git-lfs.github.com/spec/v1")
    'found a Git LFS pointer, wanted the file that it stands for; run `git lfs pull` in its repository'
    >>> describe_foreign(b'{"question": "2 + 2 ?"}') is None
    True
    """
    head = content[:_HEAD_BYTES]
    if head.startswith(_LFS) or _LFS_LIKE.match(head):
        return "found a Git LFS pointer, wanted the file that it stands for; run `git lfs pull` in its repository"
    if _ANNEX.fullmatch(head):
        return "found a git-annex pointer, wanted the file that it stands for; run `git annex get` in its repository"
    for signature, name, cure in _SIGNATURES:
        if head.startswith(signature):
            return f"found {name}, wanted text in UTF-8; {cure}"
    if head[_TAR_MAGIC] == b"ustar":
        return "found a tar archive, wanted text in UTF-8; unpack it with tar"
    if _HTML.match(head):
        return "found a web page (HTML), wanted the data themselves; download the raw file"
    # ASCII text in UTF-16 without a byte order mark has a zero in every second byte.
    if len(head) >= 4 and (not any(head[1::2]) or not any(head[::2])) and any(head):
        return "found UTF-16 text, wanted text in UTF-8; save the file as UTF-8"
    return None


def decode_text(content: bytes, path: Path) -> str:
    """Decode a file's bytes as UTF-8, with or without a byte order mark.

    Raises:
        ValueError: The file is of another kind, or holds a byte that is not UTF-8.
    """
    foreign = describe_foreign(content)
    if foreign is not None:
        raise ValueError(f"{path}: {foreign}")
    try:
        # Some editors write a byte order mark at the beginning, which no parser expects.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line_number}: byte {content[error.start]:#04x} at offset {error.start} is not UTF-8;"
            " restore the file, or save it as UTF-8"
        ) from None


def parse_json(text: str) -> Any:
    """Parse a JSON document; objects in which a key stands twice become `RepeatedKey`.

    Raises:
        json.JSONDecodeError: This `ValueError` says where the text is not JSON.
        ValueError: The text is JSON that Python cannot hold.
    """
    try:
        return json.loads(text, parse_float=JsonFloat, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # Python's own message gives advice to programmers.
        raise ValueError(
            f"it holds a whole number of more than {sys.get_int_max_str_digits()} digits, wanted fewer, or text"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    repeated = RepeatedKey(fields)
    repeated.key = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
    return repeated


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object, such as `config.json`.

    Raises:
        ValueError: The file is damaged or of another kind; the message names the file.
    """
    text = decode_text(path.read_bytes(), path)
    try:
        fields = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}; restore the file"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not usable JSON: {error}, wanted a JSON object; restore the file") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: found {kind_of(fields)}, wanted a JSON object {{...}}; restore the file")
    if isinstance(fields, RepeatedKey):
        raise ValueError(f"{path}: key {shown(fields.key)} stands twice, wanted it once; restore the file")
    return fields
