"""`dvc.yaml`, read: its stages with their templates filled in."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.config.strict import read_yaml

_TEMPLATE = re.compile(r"\$\{([^}]*)\}")
_KNOWN_KEYS = {"desc", "cmd", "deps", "params", "outs", "metrics", "plots", "meta", "frozen", "always_changed"}


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of `dvc.yaml`, its templates filled in. Paths are as written there."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    """Outputs and metrics."""
    in_git: tuple[str, ...] = ()
    """Outputs that DVC does not keep (`cache: false`), so that git does."""


def read_pipeline(root: Path | str = ".") -> dict[str, Stage]:
    """Read the stages of `dvc.yaml` in their order, `foreach` unrolled as DVC does it.

    Only what this project's `dvc.yaml` uses is understood: `${a.b}` from `params.yaml`, and
    `foreach` over a mapping with `${key}` and `${item.x}`. Anything else is a `ValueError`,
    never a guess: a dependency that is overlooked would be missing from the fingerprint.
    """
    root = Path(root)
    params = read_mapping(root / "params.yaml")
    return unroll(read_mapping(root / "dvc.yaml"), params)


def unroll(pipeline: dict[str, Any], params: dict[str, Any]) -> dict[str, Stage]:
    """`read_pipeline` of the two files' mappings."""
    stages = {}
    for name, body in _section(pipeline, "stages").items():
        if "foreach" not in body:
            stages[name] = _parse_stage(name, body, params)
            continue
        items = _expand(str(body["foreach"]), params)
        if not isinstance(items, dict):
            raise ValueError(f"dvc.yaml: {name}.foreach: found {body['foreach']!r}, wanted a mapping of params.yaml")
        for key, item in items.items():
            scope = {**params, "key": key, "item": item}
            stages[f"{name}@{key}"] = _parse_stage(f"{name}@{key}", body.get("do") or {}, scope)
    return stages


def lookup(tree: Any, dotted_key: str) -> Any:
    """Value at `a.b.c` in nested mappings.

    >>> lookup({"curriculum": {"cot": {"lr": 0.1}}}, "curriculum.cot.lr")
    0.1
    """
    for key in dotted_key.split("."):
        if not isinstance(tree, dict) or key not in tree:
            raise ValueError(f"params.yaml: {dotted_key}: missing; dvc.yaml asks for it, so add the key")
        tree = tree[key]
    return tree


def canonical(value: Any) -> str:
    """Text that is equal for equal values, however they are written in YAML.

    >>> canonical({"lr": 0.0001, "b": True}) == canonical({"b": True, "lr": 1e-4})
    True
    """
    return json.dumps(_as_value(value), sort_keys=True, default=str)


def _as_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_value(item) for item in value]
    # DVC compares with ==, where 1 and 1.0 are one value.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse_stage(name: str, body: dict[str, Any], scope: dict[str, Any]) -> Stage:
    for key in body:
        if key not in _KNOWN_KEYS:
            raise ValueError(f"dvc.yaml: {name}.{key}: not understood by the fingerprint; known: {sorted(_KNOWN_KEYS)}")
    deps, params = (_texts(body.get(section) or [], scope, f"{name}.{section}") for section in ("deps", "params"))
    outs, in_git = [], []
    for section in ("outs", "metrics", "plots"):
        # An output may be written as {path: {cache: false}}.
        paths = [next(iter(item)) if isinstance(item, dict) else item for item in body.get(section) or []]
        outs += _texts(paths, scope, f"{name}.{section}")
        in_git += [path for item in body.get(section) or [] for path in _uncached(item)]
    (cmd,) = _texts([body.get("cmd")], scope, f"{name}.cmd")
    return Stage(name, cmd, tuple(deps), tuple(params), tuple(outs), tuple(_texts(in_git, scope, name)))


def _uncached(item: Any) -> list[Any]:
    options = next(iter(item.values())) if isinstance(item, dict) else None
    return list(item)[:1] if isinstance(options, dict) and options.get("cache") is False else []


def _texts(items: list[Any], scope: dict[str, Any], place: str) -> list[str]:
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"dvc.yaml: {place}: found {item!r}, wanted text; the fingerprint knows no other form")
    return [str(_expand(item, scope)) for item in items]


def _expand(text: str, scope: dict[str, Any]) -> Any:
    """Fill `${a.b}` into `text`; a text that is nothing else becomes the value itself."""
    whole = _TEMPLATE.fullmatch(text)
    if whole:
        return lookup(scope, whole[1].strip())
    return _TEMPLATE.sub(lambda match: str(lookup(scope, match[1].strip())), text)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: naming the file, what was found and what was wanted.
    """
    return as_mapping(read_yaml(path), path)


def as_mapping(tree: Any, path: Path | str) -> dict[str, Any]:
    """Return what a YAML file holds, where that is a mapping; the error of `read_mapping` else."""
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: found {type(tree).__name__}, wanted a mapping of keys to values")
    return tree


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    section = tree.get(key)
    if not isinstance(section, dict) or not all(isinstance(body, dict) for body in section.values()):
        raise ValueError(f"dvc.yaml: {key}: found {type(section).__name__}, wanted a mapping of names to stages")
    return section
