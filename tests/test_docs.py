"""README and docs/ against what they describe: links, commands, keys, layers."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

from coconut.cli import app
from coconut.config import field_map, schema
from coconut.config.extensions import FORMATS, find_presets, find_tasks
from coconut.config.methods import find_method
from test_imports import LAYERS

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src/coconut"
ARCHITECTURE = ROOT / "docs/architecture.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBCOMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", read(page))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_named_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.M))
    code = "\n".join(re.findall(r"`(?:make|coconut) [^`\n]+`|^    (?:make|coconut) .*$", read(page), re.M))
    named = set(re.findall(r"\bmake +([a-z-]+)", code))
    assert named <= targets
    assert set(re.findall(r"\bcoconut +([a-z][a-z-]*)", code)) <= SUBCOMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_repository_that_is_named_exists(page):
    named = re.findall(r"`((?:src|stages|recipes|docs|tests|benchmarks|models)/[\w./-]+)`", read(page))
    assert [path for path in named if not (ROOT / path).exists()] == []


def table_rows() -> dict[str, str]:
    """The rows of the tables of docs/parameters.md by each key that they name."""
    rows = {}
    for line in read(ROOT / "docs/parameters.md").splitlines():
        if line.startswith("| `"):
            keys, _, rest = line[2:].partition(" | ")
            rows |= {key.strip("` "): rest for key in keys.split(",")}
    return rows


def fields_of_schema() -> Iterator[tuple[str, Any]]:
    """The keys as docs/parameters.md writes them, and their types."""
    sections = {
        "data": schema.DataConfig,
        "fields": field_map.Fields,
        "encode": schema.EncodeConfig,
        "latent": schema.LatentConfig,
    }
    sections |= {"train": schema.TrainConfig, "evaluate": schema.EvaluateConfig, "runtime": schema.RuntimeConfig}
    sections |= {"probe": schema.ProbeConfig, "report": schema.ReportConfig}
    # A method that someone adds stands on no page of ours.
    methods = [find_method(name).Keys for name in re.findall("`([a-z_]+)`", table_rows()["method"].partition(" | ")[0])]
    plain = [schema.Source, schema.Entry, *find_tasks(), schema.Params, *methods]
    for prefix, kind in [*sections.items(), *(("", kind) for kind in plain)]:
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            if not dataclasses.is_dataclass(hint) and (kind, name) not in _NOT_KEYS:
                yield f"{prefix}.{name}" if prefix else name, hint


_NOT_KEYS = {
    (schema.DataConfig, "generator"),
    (schema.Params, "curriculum"),
    (schema.Entry, "name"),
    (schema.Entry, "keys"),
}


def words(hint: Any) -> Iterator[str]:
    """The words that a value may be."""
    if hint is schema.Format:
        yield from (*FORMATS, *find_presets())
    elif typing.get_origin(hint) is Literal:
        yield from typing.get_args(hint)
    elif typing.get_origin(hint) is Annotated:
        inner, *notes = typing.get_args(hint)
        yield from (note.text for note in notes if type(note).__name__ == "Word")
        yield from words(inner)
    else:
        for inner in typing.get_args(hint):
            yield from words(inner)


def test_every_parameter_is_described_and_no_other():
    assert table_rows().keys() - {"task"} == dict(fields_of_schema()).keys() - {"task"}


def test_the_words_of_every_parameter_are_listed():
    listed = table_rows()
    assert [
        (key, word) for key, hint in fields_of_schema() for word in words(hint) if f"`{word}`" not in listed[key]
    ] == []


def test_every_key_of_the_shipped_params_is_described():
    params = yaml.safe_load(read(ROOT / "params.yaml"))
    text = read(ROOT / "docs/parameters.md")
    for section, value in params.items():
        keys = [f"{section}.{name}" for name in value] if isinstance(value, dict) else [section]
        if section != "curriculum":
            assert [key for key in keys if f"`{key}`" not in text] == []


def test_quoting_for_hydra_is_shown():
    for page in ("README.md", "docs/recipes.md", "docs/parameters.md"):
        assert "\"latent.thought='hidden[-2]'\"" in read(ROOT / page)


def test_the_extras_are_installed_from_the_work_tree():
    files = [*PAGES, *SOURCES.rglob("*.py"), ROOT / "Makefile", *(ROOT / "recipes").glob("*.yaml")]
    assert [path for path in files if re.search(r"pip install ['\"]?continuous-thought", read(path))] == []


def test_the_layers_are_those_that_the_imports_are_tested_for():
    shown = re.sub(r"\s+", " ", re.findall(r"^    (layout .*?)\n\n", read(ARCHITECTURE), re.M | re.S)[0])
    layers = (", ".join(name for name in layer if name not in ("", "__main__")) for layer in LAYERS)
    assert shown == " < ".join(filter(None, layers))
