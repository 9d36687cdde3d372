"""Recipes: other set-ups as what differs from the shipped one, and `coconut recipe`, which writes a whole params.yaml.

Each key that a recipe names in a section takes the place of the shipped one with all that it holds, and its
`curriculum` that of the whole shipped curriculum.
"""

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import typer
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from coconut.config.messages import shown, suggest
from coconut.config.params import parse_params
from coconut.config.schema import NonNegative
from coconut.config.strict import MISSING, expect_mapping, parse, parse_yaml, read_yaml
from coconut.files import replace_file
from coconut.report.tables import Table

RECIPES_DIR = Path("recipes")
PARAMS_FILE = Path("params.yaml")
DEFAULT = "default"
"""The recipe that is whole: the shipped `params.yaml`, on which all others stand."""


@dataclasses.dataclass(frozen=True)
class About:
    """The mapping `about` of a recipe: what `coconut recipe` lists."""

    model: str
    data: str
    machine: str
    hours: Literal["unknown"] | NonNegative
    """Of the whole pipeline on that machine: measured, or reckoned from the number of updates."""
    ran: str
    """Whether those who wrote it ran it: with how many seeds, how far, or `no`."""
    what: str


def find_recipes(root: Path = Path()) -> dict[str, Path]:
    """Return the files of all recipes by name, the shipped set-up first."""
    paths = {path.stem: path for path in sorted((root / RECIPES_DIR).glob("*.yaml"))}
    if DEFAULT not in paths:
        raise ValueError(f"{RECIPES_DIR / DEFAULT}.yaml: no such file; run from the repository's top folder")
    return {DEFAULT: paths[DEFAULT]} | paths


def read_about(path: Path) -> About:
    """Read what a recipe says of itself; a mistake in it is a ValueError that names the file and the key."""
    tree = read_yaml(path)
    try:
        expect_mapping(tree, "the file")
        about: About = parse(tree.get("about", MISSING), About, "about")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return about


def whole_params(name: str, root: Path = Path()) -> str:
    """Return the whole `params.yaml` of a recipe; a mistake in it is a ValueError that names the file and the key."""
    paths = find_recipes(root)
    if name not in paths:
        raise ValueError(f"recipe {shown(name)}: unknown; `coconut recipe` lists those there are{suggest(name, paths)}")
    read_about(paths[name])
    text, round_trip = paths[name].read_text(encoding="utf-8"), YAML()
    round_trip.width = sys.maxsize
    head = "".join(re.findall(r"\A(?:#.*\n)+", text))
    whole = round_trip.load(paths[DEFAULT].read_text(encoding="utf-8"))
    _put_on_top(whole, round_trip.load(text.removeprefix(head)))
    del whole["about"]
    round_trip.dump(whole, stream := io.StringIO())
    head += f"# `coconut recipe {name}` writes this file. Every value of the pipeline stands here.\n\n"
    text = head + _spaced(stream.getvalue())
    try:
        parse_params(parse_yaml(text, PARAMS_FILE.name))
    except ValueError as error:
        raise ValueError(f"{paths[name]}: {error}") from None
    return text


def _put_on_top(whole: Any, recipe: Any, *, is_section: bool = False) -> None:
    """Take over what a recipe names, with the comment beside it where there is one."""
    for key, value in recipe.items():
        shipped = None if is_section or key == "curriculum" else whole.get(key)
        if isinstance(shipped, Mapping) and isinstance(value, Mapping):
            _put_on_top(shipped, value, is_section=True)
            continue
        whole[key] = value
        _spread(value)
        if "#" in str(recipe.ca.items.get(key)):
            whole.ca.items[key] = recipe.ca.items[key]


def _spread(value: Any) -> None:
    """Give each key of a mapping that stands on one line its own, so that a changed value changes one line."""
    if isinstance(value, CommentedMap) and value:
        value.fa.set_block_style()
        for inner in value.values():
            _spread(inner)


def _spaced(text: str) -> str:
    """Put one empty line before each section, and leave none in it but those of the curriculum."""
    blocks = [
        block.rstrip() if block.startswith("curriculum:") else re.sub(r"\n\s*(?=\n|\Z)", "", block)
        for block in re.split(r"^(?=\w)", text, flags=re.M)[1:]
    ]
    return "".join(f"\n{block}\n" if "\n" in block else f"{block}\n" for block in blocks)


def run(name: str | None, *, is_forced: bool) -> int:
    """List the recipes, or write the params.yaml of one of them."""
    if name is None:
        rows = [[name, *map(str, dataclasses.astuple(read_about(path)))] for name, path in find_recipes().items()]
        header = ["recipe", *(field.name for field in dataclasses.fields(About))]
        sys.stdout.write(Table(header, rows, num_text_columns=len(header)).to_text() + "\n")
        return 0
    text = whole_params(name)
    if not is_forced and _is_edited():
        found = f"{PARAMS_FILE}: found changes that are neither in git nor a recipe's"
        if not sys.stdin.isatty():
            raise ValueError(f"{found}; commit or save it first, or overwrite it with --force")
        if not typer.confirm(f"{found}. Overwrite it?"):
            return 1
    replace_file(PARAMS_FILE, text)
    sys.stdout.write(f"{PARAMS_FILE} is now that of {RECIPES_DIR}/{name}.yaml\n")
    return 0


def _is_edited() -> bool:
    """Say whether params.yaml holds what neither git nor a recipe could bring back."""
    content = PARAMS_FILE.read_bytes() if PARAMS_FILE.exists() else b""
    kept = [b""]
    writer = re.search(r"^# `coconut recipe (\S+)`", content.decode(errors="replace"), re.M)
    with contextlib.suppress(ValueError):  # Of a recipe that has gone, or is no longer valid.
        kept += [whole_params(writer[1]).encode()] if writer else []
    with contextlib.suppress(OSError):  # No git here.
        committed = subprocess.run(["git", "show", f"HEAD:./{PARAMS_FILE}"], capture_output=True, check=False)
        kept.append(committed.stdout)
    return content not in kept
