"""`params.yaml` as frozen dataclasses: the only place where values come from.

One section of the file is one dataclass. Loading is strict: an unknown key, a missing key
or a value of the wrong type is a `ValueError` that names the key, what was found, and what
was wanted. Numbers are coerced by the type of their field, because DVC writes `1e-05`,
which PyYAML reads as text.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import yaml

from coconut.thought import parse_thought

BASE = "base"
"""The parent of entries that start from the untouched model."""

Method = Literal["cot", "no_cot", "coconut", "no_thoughts", "pause", "pause_as_thought", "icot"]
LATENT_METHODS: tuple[str, ...] = ("coconut", "no_thoughts", "pause_as_thought")
"""Methods for which `latent_stage` says how many steps are gone."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"between {self.low:g} and {self.high:g}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, 1)]
Beta = Annotated[float, Range(0, 0.999999)]
Positive = Annotated[float, Range(1e-30)]
NonNegative = Annotated[float, Range(0)]


# --- data -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainedArithmetic:
    """Left-to-right arithmetic modulo a prime: `10 - 10 - 5 ?`, steps `0`, `6`, answer `6`."""

    task: Literal["chained_arithmetic"]
    num_operations: Annotated[int, Range(1, 10_000)]
    """Each is a step of some tokens: far fewer fill any model's positions."""
    modulus: Annotated[int, Range(3, 10**12)]
    """A prime, so that every operation is a bijection and the answer is uniform."""


@dataclass(frozen=True)
class Graph:
    """ProsQA-like reachability, in the paper's sentences or in symbols."""

    task: Literal["graph_sentences", "graph_symbols"]
    num_nodes: Annotated[int, Range(4)]
    num_edges: Annotated[int, Range(3)]
    min_hops: Count
    max_hops: Count


@dataclass(frozen=True)
class Multiplication:
    """n-digit by n-digit multiplication, digits least significant first, partial products as steps."""

    task: Literal["multiplication"]
    num_digits: Annotated[int, Range(1, 1_000)]
    """The text grows with its square: far fewer fill any model's positions."""


Generator = ChainedArithmetic | Graph | Multiplication

Format = Literal["generated", "gsm8k", "gsm8k_aug", "prosqa", "prontoqa", "multiplication", "canonical"]


@dataclass(frozen=True)
class Source:
    """Where one split comes from: the generator, a file below `data.raw_dir`, or a hub set."""

    format: Format
    file: str | None = None
    """A path relative to `data.raw_dir`."""
    hub: str | None = None
    """The id of a data set on the hub, read through `datasets`."""
    hub_config: str | None = None
    hub_split: str | None = None
    hub_revision: str | None = None
    start: Natural = 0
    """First row taken, counted from 0 over the rows read."""
    rows: Count | None = None
    """How many rows are taken (generated); all of them when null."""


@dataclass(frozen=True)
class DataConfig:
    """What the examples are."""

    seed: Seed
    """Of the generator. Apart from the top-level `seed`, so that a seed sweep shares its test set."""
    raw_dir: str
    train: Source
    valid: Source
    test: Source
    generator: Generator | None
    skip_bad_rows: bool
    max_train: Count | None
    """Training examples kept, the first ones after duplicates went; all when null."""


@dataclass(frozen=True)
class EncodeConfig:
    """How text becomes token ids."""

    prompt: Literal["plain", "chat"]
    """`chat` puts the tokenizer's chat template around the question."""


# --- the method -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentConfig:
    """The paper's switches. Names as in the reference."""

    c_thought: Natural
    """Thoughts that replace one step."""
    max_latent_stage: Natural
    pad_latent_to_max: bool
    """False: a training view never holds more thoughts than its example has steps."""
    markers: bool
    """Whether thoughts stand between `<|start-latent|>` and `<|end-latent|>`."""
    uniform_prob: Share
    """Probability that a training example is shown at a random stage instead."""
    thought: str
    """What is fed back: `hidden[-1]` is the paper's. See `coconut.thought`, `coconut.model.feedback`."""
    parallel_iterations: Natural
    """0: thoughts one after another. T: all together, T times (Jacobi)."""


@dataclass(frozen=True)
class TrainConfig:
    """Values of the optimisation; any of them may stand in a curriculum entry instead."""

    batch_size: Count
    """Examples per update, over all devices and micro-batches."""
    precision: Literal["fp32", "bf16", "bf16-weights"]
    optimizer: Literal["adamw", "adamw_8bit"]
    beta1: Beta
    beta2: Beta
    weight_decay: NonNegative
    max_grad_norm: Positive | None
    warmup_updates: Natural
    """Updates of a fresh optimiser over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine", "linear"]
    """Constant, or falling from the entry's first update on and 0 after its last; the warm-up multiplies it."""
    reset_optimizer: bool
    """True: fresh moments in each entry. False: the parent's, if it has left any."""
    select: Literal["last", "best"]
    """Which epoch's weights are kept; `best` by validation accuracy."""
    validate_examples: Count | None
    """Validation examples scored after each epoch; all when null."""


@dataclass(frozen=True)
class EvaluateConfig:
    """How a checkpoint is scored."""

    max_new_tokens: Count
    precision: Literal["fp32", "bf16"]
    max_examples: Count | None
    """Examples of each split that are scored, the first ones; all when null."""


@dataclass(frozen=True)
class Entry:
    """One entry of `curriculum`: a training stage and its evaluation."""

    name: str
    parent: str
    method: Method
    latent_stage: Natural
    epochs: Count
    lr: NonNegative
    min_accuracy: Share | None
    """Validation accuracy below which the stage fails, so that its children do not train."""
    max_updates: Count | None
    """Ends the entry early, for arms that must have equal numbers of updates."""
    icot_tokens_per_epoch: Positive | None
    """Reasoning tokens removed per epoch (`icot` only)."""
    icot_smoothing: Positive | None
    """Rate of the exponential that removes some extra tokens (`icot` only); 4 in the original."""
    icot_remove_all_at: Count | None
    """Removed tokens from which on all reasoning is gone (`icot` only); 39 in the original on GSM8K."""
    latent: LatentConfig
    train: TrainConfig


@dataclass(frozen=True)
class RuntimeConfig:
    """Knobs that cannot change a result. No pipeline stage lists them as a dependency."""

    device: Literal["auto", "cpu", "cuda"]
    threads: Count | None
    """Of the CPU arithmetic; torch's own choice when null."""
    num_workers: Count | None
    """Processes that tokenise; one per core when null."""
    micro_batch: Literal["auto"] | Count
    """Examples per forward pass; `auto` starts from the whole update and halves on out-of-memory."""
    eval_batch: Count
    """Largest generation batch; halved on out-of-memory."""
    save_every_s: NonNegative
    log_every_s: NonNegative
    checkpoint_activations: bool
    tracker: Literal["none", "wandb", "trackio", "tensorboard"]


@dataclass(frozen=True)
class Params:
    """The whole file."""

    model: str
    """Hub id, local Hugging Face folder, or a folder with only a `config.json` (random weights)."""
    revision: str | None
    """Of the hub model."""
    seed: Seed
    data: DataConfig
    encode: EncodeConfig
    latent: LatentConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    runtime: RuntimeConfig
    curriculum: Mapping[str, Entry]


# --- parsing --------------------------------------------------------------------------------

_ENTRY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
_ENTRY_OPTIONS = {"min_accuracy", "max_updates", "icot_tokens_per_epoch", "icot_smoothing", "icot_remove_all_at"}
_ENTRY_REQUIRED = ("parent", "method", "latent_stage", "epochs", "lr")
_TASKS: dict[str, type] = {
    "chained_arithmetic": ChainedArithmetic,
    "graph_sentences": Graph,
    "graph_symbols": Graph,
    "multiplication": Multiplication,
}


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and check the whole file.

    Raises:
        ValueError: naming the file, the key, what was found and what was wanted.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; run from the repository's top folder") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: found a folder, wanted a params file, such as {path / 'params.yaml'}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    try:
        return parse_params(_read_tree(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}; mend the line it names") from None
    except RecursionError:
        raise ValueError(f"{path}: not usable YAML: nested too deeply; restore the file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    """Names the line of what YAML itself would let pass, or refuse in words for programmers."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """Refuse a key that stands twice, where YAML lets the last one win."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"line {line}: key {key.value!r} stands already on line {lines[key.value]} of the same mapping,"
                    " wanted it once (only the last one would count); take one of the two out"
                )
            lines[key.value] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Name a value that Python cannot hold, such as a number of 5,000 digits or a 13th month."""
        try:
            return super().construct_object(node, deep)
        except ValueError:
            if not isinstance(node, yaml.ScalarNode):
                raise
            shown = node.value if len(node.value) <= 40 else f"{node.value[:37]}..."
            raise ValueError(
                f"line {node.start_mark.line + 1}: found {shown!r}, which is out of range, wanted a smaller number"
                " or a date that exists; mend it, or quote it if it is text"
            ) from None


def _read_tree(text: str) -> Any:
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def parse_params(tree: Any) -> Params:
    """Turn the parsed YAML of a params file into `Params`; see `load_params`."""
    _expect_mapping(tree, "the file")
    latent = _parse(tree.get("latent", _MISSING), LatentConfig, "latent")
    train = _parse(tree.get("train", _MISSING), TrainConfig, "train")
    curriculum = _parse_curriculum(tree.get("curriculum", _MISSING), latent, train)
    plain = {**tree, "latent": latent, "train": train, "curriculum": curriculum}
    params: Params = _parse(plain, Params, "")
    if not params.data.raw_dir.strip():
        raise ValueError("data.raw_dir: found an empty text, wanted a folder, such as data/raw")
    sources = (params.data.train, params.data.valid, params.data.test)
    for split, source in zip(("train", "valid", "test"), sources, strict=True):
        _check_source(source, f"data.{split}", params.data.generator)
    return params


def _parse_curriculum(tree: Any, latent: LatentConfig, train: TrainConfig) -> dict[str, Entry]:
    _expect_mapping(tree, "curriculum")
    if not tree:
        raise ValueError("curriculum: found no entry, wanted at least one")
    entries = {}
    for name, fields in tree.items():
        if not isinstance(name, str):
            raise ValueError(
                f"curriculum: key {name!r} is {_kind(name)}, wanted text"
                f' (DVC silently drops such entries); quote it and start with a letter: "stage_{name}"'
            )
        if not _ENTRY_NAME.fullmatch(name) or name in (BASE, "report", "logs", "evaluations", "overnight"):
            raise ValueError(
                f"curriculum.{name}: not a usable name; wanted letters, digits, '_' and '-', starting with"
                " a letter, and not base, report, logs, evaluations or overnight: it becomes a folder below outputs/"
            )
        entries[name] = _parse_entry(fields, name, latent, train)
    _check_tree(entries)
    return entries


def _parse_entry(fields: Any, name: str, latent: LatentConfig, train: TrainConfig) -> Entry:
    path = f"curriculum.{name}"
    _expect_mapping(fields, path)
    latent_keys = {field.name for field in dataclasses.fields(LatentConfig)}
    train_keys = {field.name for field in dataclasses.fields(TrainConfig)}
    known = [*_ENTRY_REQUIRED, *sorted(_ENTRY_OPTIONS), *sorted(latent_keys), *sorted(train_keys)]
    for key in fields:
        if key not in known:
            raise ValueError(f"{path}.{key}: unknown key; known here: {', '.join(known)}")
    own = {key: fields.get(key) for key in _ENTRY_OPTIONS}
    own |= {key: fields.get(key, _MISSING) for key in _ENTRY_REQUIRED}
    overrides = {
        section: dataclasses.asdict(section) | {key: fields[key] for key in keys & fields.keys()}
        for section, keys in ((latent, latent_keys), (train, train_keys))
    }
    return typing.cast(
        Entry,
        _parse(
            own
            | {
                "name": name,
                "latent": _parse(overrides[latent], LatentConfig, path),
                "train": _parse(overrides[train], TrainConfig, path),
            },
            Entry,
            path,
        ),
    )


def _check_tree(entries: Mapping[str, Entry]) -> None:
    for name, entry in entries.items():
        if entry.parent != BASE and entry.parent not in entries:
            raise ValueError(
                f"curriculum.{name}.parent: found {entry.parent!r}, wanted {BASE!r} or an entry: {', '.join(entries)}"
            )
    for name, entry in entries.items():
        _check_lineage(entries, name)
        _check_stage(entry, None if entry.parent == BASE else entries[entry.parent])


def _check_lineage(entries: Mapping[str, Entry], name: str) -> None:
    lineage = [name]
    while (parent := entries[lineage[-1]].parent) != BASE:
        if parent in lineage:
            raise ValueError(
                f"curriculum.{name}.parent: a cycle, {' <- '.join([*lineage, parent])}; let one of them start from base"
            )
        lineage.append(parent)


def _check_stage(entry: Entry, parent: Entry | None) -> None:
    path = f"curriculum.{entry.name}"
    try:
        parse_thought(entry.latent.thought)
    except ValueError as error:
        raise ValueError(f"{path}.{error}") from None
    if entry.method == "icot" and (entry.icot_tokens_per_epoch is None or entry.icot_smoothing is None):
        raise ValueError(f"{path}: method icot needs icot_tokens_per_epoch and icot_smoothing; add both")
    icot_keys = ("icot_tokens_per_epoch", "icot_smoothing", "icot_remove_all_at")
    if entry.method != "icot" and any(given := [key for key in icot_keys if getattr(entry, key) is not None]):
        raise ValueError(f"{path}.{given[0]}: only for method icot, found method {entry.method}; take it out")
    if entry.method == "icot" and entry.train.select != "last":
        raise ValueError(
            f"{path}.select: found {entry.train.select!r}, wanted 'last' with method icot,"
            " whose early epochs are scored with more of the reasoning left"
        )
    if entry.method not in LATENT_METHODS:
        if entry.latent_stage != 0:
            raise ValueError(f"{path}.latent_stage: found {entry.latent_stage}, wanted 0 with method {entry.method}")
        return
    if parent is not None and entry.latent_stage < parent.latent_stage:
        raise ValueError(
            f"{path}.latent_stage: found {entry.latent_stage}, wanted at least {parent.latent_stage},"
            f" the stage of its parent {parent.name!r}"
        )


def _check_source(source: Source, path: str, generator: Generator | None) -> None:
    if source.format != "generated":
        if (source.file is None) == (source.hub is None):
            raise ValueError(f"{path}: wanted exactly one of file (below data.raw_dir) and hub, found both or none")
        if source.file is not None and not _stays_below(source.file):
            raise ValueError(
                f"{path}.file: found {source.file!r}, wanted a path below data.raw_dir, which DVC watches for changes;"
                " move the file there, or set data.raw_dir to its folder"
            )
        if source.hub is not None and source.hub_split is None:
            raise ValueError(f"{path}.hub_split: missing; name the split of {source.hub} to read, such as train")
        return
    if generator is None:
        raise ValueError(f"{path}.format: found 'generated', but data.generator is null; give it a task")
    if source.rows is None:
        raise ValueError(f"{path}.rows: found null, wanted the number of examples to generate")
    if source.file is not None or source.hub is not None:
        raise ValueError(f"{path}: found a file or hub beside format 'generated', which reads none; take it out")


def _stays_below(file: str) -> bool:
    path = PurePath(file)
    return not path.is_absolute() and ".." not in path.parts


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


_MISSING: Any = _Missing()
_MISSING_KEY = "{}: missing; add the key, recipes/ shows every one of them"


def _kind(value: Any) -> str:
    return {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        type(None): "null",
        _Missing: "nothing",
    }.get(type(value), type(value).__name__)


def _expect_mapping(value: Any, path: str) -> None:
    if value is _MISSING:
        raise ValueError(_MISSING_KEY.format(path))
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: found {_kind(value)}, wanted a mapping of keys to values")


def _parse(value: Any, kind: Any, path: str) -> Any:
    """Check `value` against the annotation `kind` and return it in that type."""
    origin = typing.get_origin(kind)
    if value is _MISSING:
        raise ValueError(_MISSING_KEY.format(path))
    if kind is Generator:
        return _parse_generator(value, path)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(value, kind, path)
    if origin is Annotated:
        base, bounds = typing.get_args(kind)
        number = _parse(value, base, path)
        if not bounds.low <= number <= bounds.high:
            raise ValueError(f"{path}: found {number!r}, wanted {bounds}")
        return number
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"{path}: found {value!r}, wanted one of {', '.join(map(str, choices))}")
        return value
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, typing.cast(type, kind)) else _parse_dataclass(value, kind, path)
    if origin is Mapping or origin is typing.get_origin(Mapping[str, Entry]):
        return value
    return _parse_scalar(value, kind, path)


def _parse_dataclass(value: Any, kind: Any, path: str) -> Any:
    _expect_mapping(value, path or "the file")
    hints = typing.get_type_hints(kind, include_extras=True)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            raise ValueError(f"{prefix}{key}: unknown key; known here: {', '.join(hints)}")
    arguments = {}
    for field in dataclasses.fields(kind):
        if field.name not in value and field.default is not dataclasses.MISSING:
            continue
        arguments[field.name] = _parse(value.get(field.name, _MISSING), hints[field.name], prefix + field.name)
    return kind(**arguments)


def _parse_generator(value: Any, path: str) -> Any:
    _expect_mapping(value, path)
    task = value.get("task")
    if not isinstance(task, str) or task not in _TASKS:
        raise ValueError(f"{path}.task: found {task!r}, wanted one of {', '.join(_TASKS)}")
    return _parse_dataclass(value, _TASKS[task], path)


def _parse_union(value: Any, kind: Any, path: str) -> Any:
    members = typing.get_args(kind)
    if value is None and type(None) in members:
        return None
    alternatives = [member for member in members if member is not type(None)]
    if set(alternatives) == set(typing.get_args(Generator)):
        return _parse_generator(value, path)
    errors = []
    for member in alternatives:
        try:
            return _parse(value, member, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0] if len(errors) == 1 else "; or ".join(errors))


def _parse_scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float and type(value) in (int, float, str):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    # type(), not isinstance(): True is an int to Python, not to a reader.
    elif type(value) is kind:
        return value
    names = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}
    raise ValueError(f"{path}: found {value!r} ({_kind(value)}), wanted {names[kind]}")
