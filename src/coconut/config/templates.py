"""The grammar of the values of `fields:` in `params.yaml`: a path to one field, or a template over several.

    value    = path | template (a text with a brace in it)
    template = (text | "{" path "}" | "{{" | "}}")*, with at least one path
    path     = key ("." key)*, where a whole number leads into a list, and `key[role]` to the only one with that role

A path is looked up in mappings and lists, and nowhere else: no code is evaluated, and no attribute is read.
`coconut.data.fields` says what a value gives for a row.
"""

import re
from dataclasses import dataclass

from coconut.config.messages import shown

MAX_DEPTH = 8
"""Keys of one path. Published sets nest three deep."""
_TOKEN = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")


@dataclass(frozen=True)
class Template:
    """Texts and paths in turn: `texts[0] paths[0] texts[1] ...`, one text more than there are paths."""

    texts: tuple[str, ...]
    paths: tuple[str, ...]


def parse_template(value: str) -> Template:
    """Read a path or a template.

    >>> parse_template("answer.text")
    Template(texts=('', ''), paths=('answer.text',))
    >>> parse_template("{Body} {Question} {{in km}}")
    Template(texts=('', ' ', ' {in km}'), paths=('Body', 'Question'))

    Raises:
        ValueError: A brace has no partner, a path is empty or too long, or there is no path at all.
    """
    if "{" not in value and "}" not in value:
        return Template(("", ""), (check_path(value),))
    texts, paths, end = [""], [], 0
    for token in _TOKEN.finditer(value):
        texts[-1] += value[end : token.start()]
        end = token.end()
        if token[0] in ("{{", "}}"):
            texts[-1] += token[0][0]
        elif token[0] in ("{", "}"):
            raise ValueError(
                f"found {shown(value)}, where the {token[0]} at character {token.start() + 1} has no partner;"
                " write {FIELD} for a field, and {{ or }} for a brace"
            )
        else:
            paths.append(check_path(token[0][1:-1]))
            texts.append("")
    texts[-1] += value[end:]
    if not paths:
        raise ValueError(f"found {shown(value)}, which names no field, wanted at least one {{FIELD}}")
    return Template(tuple(texts), tuple(paths))


def check_path(path: str) -> str:
    """Return the path as it is.

    Raises:
        ValueError: A key in it is empty, or it goes deeper than `MAX_DEPTH`.
    """
    keys = path.split(".")
    if not all(keys):
        raise ValueError(f"found {shown(path)}, wanted the name of a field, or a path to it such as answer.text")
    if len(keys) > MAX_DEPTH:
        raise ValueError(f"found a path of {len(keys)} keys, {shown(path)}, wanted at most {MAX_DEPTH}")
    return path
