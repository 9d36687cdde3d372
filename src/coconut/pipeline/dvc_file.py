"""`dvc.yaml`, read: its stages with their templates filled in."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# The same loader in C, where PyYAML has it: every stage reads these files several times.
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEMPLATE = re.compile(r"\$\{([^}]*)\}")
# What YAML 1.2 (DVC) reads as a number and YAML 1.1 (PyYAML) as text: `1e-05`, which DVC itself writes.
_NUMBER_READ_AS_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
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


def read_pipeline(root: Path | str = ".") -> dict[str, Stage]:
    """Read the stages of `dvc.yaml` in their order, `foreach` unrolled as DVC does it.

    Only what this project's `dvc.yaml` uses is understood: `${a.b}` from `params.yaml`, and
    `foreach` over a mapping with `${key}` and `${item.x}`. Anything else is a `ValueError`,
    never a guess: a dependency that is overlooked would be missing from the fingerprint.
    """
    root = Path(root)
    params = read_yaml(root / "params.yaml")
    stages = {}
    for name, body in read_yaml(root / "dvc.yaml")["stages"].items():
        if "foreach" not in body:
            stages[name] = _parse_stage(name, body, params)
            continue
        items = _expand(str(body["foreach"]), params)
        if not isinstance(items, dict):
            raise ValueError(f"dvc.yaml: {name}.foreach: found {body['foreach']!r}, wanted a mapping of params.yaml")
        for key, item in items.items():
            scope = {**params, "key": key, "item": item}
            stages[f"{name}@{key}"] = _parse_stage(f"{name}@{key}", body["do"], scope)
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

    >>> canonical({"lr": 0.0001, "b": True}) == canonical({"b": True, "lr": "1e-4"})
    True
    """
    return json.dumps(_as_value(value), sort_keys=True, default=str)


def _as_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_value(item) for item in value]
    if isinstance(value, str) and _NUMBER_READ_AS_TEXT.fullmatch(value):
        value = float(value)
    # DVC compares with ==, where 1 and 1.0 are one value.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse_stage(name: str, body: dict[str, Any], scope: dict[str, Any]) -> Stage:
    for key in body:
        if key not in _KNOWN_KEYS:
            raise ValueError(f"dvc.yaml: {name}.{key}: not understood by the fingerprint; known: {sorted(_KNOWN_KEYS)}")
    deps, params = (_texts(body.get(section, []), scope, f"{name}.{section}") for section in ("deps", "params"))
    outs = []
    for section in ("outs", "metrics", "plots"):
        # An output may be written as {path: {cache: false}}.
        paths = [next(iter(item)) if isinstance(item, dict) else item for item in body.get(section, [])]
        outs += _texts(paths, scope, f"{name}.{section}")
    (cmd,) = _texts([body.get("cmd")], scope, f"{name}.cmd")
    return Stage(name, cmd, tuple(deps), tuple(params), tuple(outs))


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


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _YamlLoader(path.read_bytes()).get_single_data()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run from the repository's top folder") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}; mend the line it names") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: found {type(tree).__name__}, wanted a mapping of keys to values")
    return tree
