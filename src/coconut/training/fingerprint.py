"""What a pipeline stage depends on, read from `dvc.yaml`, and a fingerprint of it.

A resume state may be continued only by a run whose command, code, parameters and input bytes
are those of the run that left it. DVC knows that list already, so it is read from `dvc.yaml`
rather than kept a second time: what is added there is in the fingerprint at once.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CANNOT_CHANGE_BYTES = ("min_accuracy",)
"""Keys of a curriculum entry that decide whether a stage passes, never what it computes."""
_GATE_SUFFIXES = tuple(f".{key}" for key in CANNOT_CHANGE_BYTES)

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


@dataclass(frozen=True)
class StageInputs:
    """The digests of everything one stage depends on, at the moment they were read.

    Read them before the parameters and the data: what is edited after that is noticed by
    `refuse_if_changed`, which is called before outputs are written.
    """

    stage: str
    root: Path
    digests: Mapping[str, str]

    @classmethod
    def read(cls, stage: str, root: Path | str = ".") -> "StageInputs":
        """Digest the command, dependencies and parameters of `stage` in the work tree `root`.

        Raises:
            ValueError: `dvc.yaml` or `params.yaml` lacks something the stage needs.
            FileNotFoundError: a dependency is missing.
        """
        root = Path(root)
        return cls(stage, root, _digest(_find(stage, root), root))

    @classmethod
    def of_command(cls, words: Sequence[str], root: Path | str = ".") -> "StageInputs":
        """`read` for the stage that runs this command, `python stages/train.py cot`; the same errors.

        An `exec` before it in `dvc.yaml` is the shell's.
        """
        command = " ".join(words)
        root = Path(root)
        stages = read_pipeline(root).values()
        stage = next((stage for stage in stages if stage.cmd.removeprefix("exec ") == command), None)
        if stage is None:
            raise ValueError(f"{root / 'dvc.yaml'}: no stage whose cmd is {command!r}")
        return cls(stage.name, root, _digest(stage, root))

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that stand for the stage's name and everything that can change its bytes."""
        return _sha256(json.dumps([self.stage, sorted(self._of_bytes().items())]))

    def _of_bytes(self) -> dict[str, str]:
        return {name: digest for name, digest in self.digests.items() if not name.endswith(_GATE_SUFFIXES)}

    def refuse_if_changed(self) -> None:
        """Raise when an input is no longer what it was: DVC would record the new one for the old result.

        Raises:
            ValueError: naming what changed.
        """
        try:
            now = _digest(_find(self.stage, self.root), self.root)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._complaint('its inputs cannot be read any more')}: {error}") from None
        changed = sorted(name for name in {*now, *self.digests} if now.get(name) != self.digests.get(name))
        if changed:
            raise ValueError(self._complaint(", ".join(changed)))

    def _complaint(self, what: str) -> str:
        return (
            f"{self.stage}: changed while it ran: {what}. Its outputs do not count, since DVC would record the new"
            " inputs for the old result; run `dvc repro` again, or undo the change first to keep a training"
        )


def fingerprint(stage: str, root: Path | str = ".") -> str:
    """Fingerprint of what `stage` depends on; see `StageInputs`."""
    return StageInputs.read(stage, root).fingerprint


def read_pipeline(root: Path | str = ".") -> dict[str, Stage]:
    """Read the stages of `dvc.yaml` in their order, `foreach` unrolled as DVC does it.

    Only what this project's `dvc.yaml` uses is understood: `${a.b}` from `params.yaml`, and
    `foreach` over a mapping with `${key}` and `${item.x}`. Anything else is a `ValueError`,
    never a guess: a dependency that is overlooked would be missing from the fingerprint.
    """
    root = Path(root)
    params = _read_yaml(root / "params.yaml")
    stages = {}
    for name, body in _read_yaml(root / "dvc.yaml")["stages"].items():
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


def _find(stage: str, root: Path) -> Stage:
    stages = read_pipeline(root)
    if stage not in stages:
        raise ValueError(f"{root / 'dvc.yaml'}: no stage {stage!r}; its stages are {', '.join(stages)}")
    return stages[stage]


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _YamlLoader(path.read_bytes()).get_single_data()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run from the repository's top folder") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}; mend the line it names") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: found {type(tree).__name__}, wanted a mapping of keys to values")
    return tree


def _digest(stage: Stage, root: Path) -> dict[str, str]:
    params = _read_yaml(root / "params.yaml")
    digests = {"dvc.yaml: cmd": stage.cmd}
    for key in stage.params:
        value = lookup(params, key)
        if key.startswith("curriculum.") and isinstance(value, dict):
            # Apart from the rest: an edit while the stage runs is refused like any other.
            digests |= {f"params.yaml: {key}.{name}": canonical(value.get(name)) for name in CANNOT_CHANGE_BYTES}
            value = {name: item for name, item in value.items() if name not in CANNOT_CHANGE_BYTES}
        digests[f"params.yaml: {key}"] = canonical(value)
    for dep in stage.deps:
        digests[dep] = digest_path(root / dep)
    return digests


def digest_path(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's relative paths and bytes without Python's caches."""
    if not path.is_dir():
        return _digest_file(path)
    return _sha256(json.dumps([[name, _digest_file(path / name)] for name in _files(path)]))


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and "__pycache__" not in relative.parts and path.suffix != ".pyc":
            yield relative.as_posix()


def _digest_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: a dependency in dvc.yaml, but no such file; run `dvc repro`") from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
