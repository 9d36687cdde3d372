"""`params.yaml` as frozen dataclasses: the only place where values come from.

One section of the file is one dataclass. Loading is strict: an unknown key, a missing key or a value of the wrong type
is a `ValueError` that names the key, what was found, and what was wanted (`coconut.config.strict`). Where a value may
be None, the file holds a word such as `all`; `null` means the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from coconut.config.extensions import read_format, read_task
from coconut.config.field_map import Fields
from coconut.config.strict import MAX_COUNT, Range, ReadBy, Word
from coconut.layout import FURTHER_TESTS

BASE = "base"
"""The parent of entries that start from the untouched model."""


Count = Annotated[int, Range(1, MAX_COUNT)]
Natural = Annotated[int, Range(0, MAX_COUNT)]
CountOrAll = Annotated[Count | None, Word("all")]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, 1)]
Beta = Annotated[float, Range(0, 0.999999)]
Positive = Annotated[float, Range(1e-30)]
NonNegative = Annotated[float, Range(0)]


# --- data -----------------------------------------------------------------------------------


Generator = Annotated[Any, ReadBy(read_task)]
"""The settings of a task, a dataclass of its module in `coconut.data.generators`."""
Format = Annotated[str, ReadBy(read_format)]
"""How rows are read: `generated`, a published form, `fields`, or the name of a preset."""


@dataclass(frozen=True)
class Source:
    """The origin of one split: the generator, a file below `data.raw_dir`, or a hub set."""

    format: Format
    file: str | None = None
    """A path relative to `data.raw_dir`, or a pattern of several such as `train-*.parquet`, read in order of name."""
    records: str | None = None
    """The path to the rows inside of one JSON object; `*` for the object itself."""
    columns: tuple[str, ...] | None = None
    """The names of the columns of a table whose first line does not name them."""
    hub: str | None = None
    """The id of a data set on the hub, read through `datasets`."""
    hub_config: str | None = None
    hub_split: str | None = None
    hub_revision: str | None = None
    start: Natural = 0
    """The first row that is taken, counted from 0 over the rows that are read."""
    rows: CountOrAll = None
    """How many rows are taken or generated; `all` is for a file or a hub set."""
    fields: Fields | None = None
    """The map of `format: fields`, or what differs from a preset's."""
    generator: Generator | None = None
    """A generator of its own, in place of `data.generator`: a test set of harder questions."""


@dataclass(frozen=True)
class DataConfig:
    """The section `data`: where the examples come from."""

    seed: Seed
    """Seeds the generator. It is not the top-level `seed`, so that a sweep over that one shares its test set."""
    raw_dir: str
    train: Source
    valid: Source
    tests: Mapping[str, Source]
    """Test sets by name. The first one has the plain names in files and metrics; see `DataConfig.splits`."""
    generator: Annotated[Generator | None, Word("none")]
    skip_bad_rows: bool
    max_train: CountOrAll
    """Training examples that are kept: the first ones, after duplicates are dropped."""

    @property
    def splits(self) -> dict[str, Source]:
        """Return every source by the name of its files: train, valid, test (the first set) and `tests/NAME`."""
        return {"train": self.train, "valid": self.valid} | {
            split: self.tests[name] for split, name in self.test_names.items()
        }

    @property
    def test_names(self) -> dict[str, str]:
        """Return the names of the test sets by those of their files."""
        return {f"{FURTHER_TESTS}/{name}" if number else "test": name for number, name in enumerate(self.tests)}

    def path_of(self, split: str) -> str:
        """Return the key of a split in `params.yaml`.

        >>> from coconut.config.params import load_params
        >>> load_params().data.path_of("test")
        'data.tests.test'
        """
        name = self.test_names.get(split)
        return f"data.{split}" if name is None else f"data.tests.{name}"

    def is_multiplication(self, split: str) -> bool:
        """Tell whether a split's answers are digit strings, of which every digit counts."""
        source = self.splits[split]
        is_generated = source.format == "generated" and self.generator_of(source).task == "multiplication"
        return is_generated or source.format == "multiplication"

    def generator_of(self, source: Source) -> Generator:
        """Return the generator of a split that is generated."""
        generator = source.generator or self.generator
        assert generator is not None, "the config requires a generator for generated splits"
        return generator


@dataclass(frozen=True)
class EncodeConfig:
    """The section `encode`: how text becomes token ids."""

    prompt: Literal["plain", "bare", "chat"]
    """`plain` ends the line after the question; `bare` does not, as CODI's checkpoints want it; `chat` puts the
    tokenizer's chat template around it."""


# --- the method -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentConfig:
    """The paper's switches, named as in its code."""

    c_thought: Natural
    """Thoughts that replace one step."""
    max_latent_stage: Natural
    pad_latent_to_max: bool
    """If false, a training view never holds more thoughts than its example has steps."""
    markers: bool
    """Whether thoughts stand between `<|start-latent|>` and `<|end-latent|>`."""
    uniform_prob: Share
    """Probability that a training example is shown at a random stage instead."""
    thought: str
    """What is fed back: `hidden[-1]` is the paper's. See `coconut.config.thought`, `coconut.model.feedback`."""
    parallel_iterations: Natural
    """0 computes the thoughts one after another; T computes all of them together, T times (Jacobi)."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. A curriculum entry may hold any of these values in place of the section's."""

    batch_size: Count
    """Examples per update, over all devices and micro-batches."""
    precision: Literal["fp32", "tf32", "bf16", "bf16-weights"]
    """`tf32` rounds the factors of products to 10 bits on GPUs that can, and is `fp32` elsewhere."""
    optimizer: Literal["adamw", "adamw_8bit"]
    beta1: Beta
    beta2: Beta
    weight_decay: NonNegative
    max_grad_norm: Annotated[Positive | None, Word("none")]
    warmup_updates: Natural
    """Updates of a fresh optimizer over which the learning rate rises linearly to `lr`."""
    schedule: Literal["constant", "cosine", "linear"]
    """Constant, or falling from `lr` at the entry's first update to 0 after its last; the warm-up multiplies it."""
    reset_optimizer: bool
    """If true, the entry begins with a fresh optimizer state; if false, with its parent's, where the parent has any."""
    select: Literal["last", "best"]
    """Which epoch's weights are kept; `best` by validation accuracy."""
    validate_examples: CountOrAll
    """Validation examples that are scored after each epoch: the first ones."""


SetRule = Literal["marked", "last_number", "digits", "math_verify"]


@dataclass(frozen=True)
class EvaluateConfig:
    """The section `evaluate`: how a checkpoint is scored."""

    max_new_tokens: Count
    precision: Literal["fp32", "tf32", "bf16"]
    max_examples: CountOrAll
    """Examples of each split that are scored: the first ones."""
    tolerance: Annotated[Literal["decimals"] | Positive | None, Word("exact")] = None
    """What a number may differ by from the gold one: nothing; so much; or half a unit of the gold one's last decimal,
    where it has any. Validation while training is always exact."""
    answer_rules: Annotated[Mapping[str, SetRule] | None, Word("none")] = None
    """By test set: where texts say the answer, where that is not as the checkpoint says; or how it is compared."""
    samples: Natural = 0
    """Answers that are drawn for each test question beside the greedy one; 0 for none."""
    temperature: NonNegative = 0.7
    """Of the samples' tokens; 0 takes the most probable ones, so that only thoughts are drawn."""
    thought_noise: Literal["none", "gaussian", "dropout"] = "none"
    """What makes the thoughts of samples differ; see `coconut.model.sampling`."""
    noise_scale: NonNegative = 0.0
    """Standard deviation of every coordinate of a thought, or the probability of dropout."""
    sample_seed: Seed = 0
    expected: Annotated[Mapping[str, Share] | None, Word("none")] = None
    """By test set: the accuracy that others report for the untouched `model`, to be shown beside ours."""


@dataclass(frozen=True)
class ProbeConfig:
    """The section `probe`: how closely the thoughts of every entry are looked at."""

    enabled: bool
    """If false, the stage `probe` leaves empty files, in a second."""
    questions: Count
    """Test questions on which everything is measured: the first ones."""
    shown: Natural
    """Questions that are written out in full, right and wrong ones."""
    top: Annotated[int, Range(1, 100)]
    """Most probable tokens of a thought that are written out."""


@dataclass(frozen=True)
class Entry:
    """One entry of `curriculum`: a training stage and its evaluation."""

    name: str
    parent: str
    method: str
    """The name of a module of `coconut.methods`."""
    latent_stage: Natural
    epochs: Count
    lr: NonNegative
    min_accuracy: Share | None
    """Validation accuracy below which the stage fails, so that its children do not train."""
    max_updates: Count | None
    """The entry ends after so many updates, for arms that must have equal numbers of them."""
    latent: LatentConfig
    train: TrainConfig
    keys: Any
    """The method's own keys, as its `Keys` holds them."""


@dataclass(frozen=True)
class ReportConfig:
    """The section `report`: what the page is about."""

    reference: Annotated[str | None, Word("auto")] = None
    """The entry that the others are compared with; `auto` is the last one of the longest chain of a main method."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Settings that cannot change a result. No pipeline stage lists them as a dependency."""

    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[Annotated[int, Range(1, 4_096)] | None, Word("auto")]
    """Threads of the CPU arithmetic; `auto` leaves the number to torch."""
    num_workers: Annotated[Annotated[int, Range(1, 1_024)] | None, Word("auto")]
    """Processes that tokenise; `auto` is one per core."""
    micro_batch: Literal["auto"] | Count
    """Examples per forward pass; `auto` begins with those of a whole update and halves them on out-of-memory."""
    eval_batch: Count
    """Examples per batch of generation; halved on out-of-memory."""
    save_every_s: NonNegative
    log_every_s: NonNegative
    fast: bool
    """Whether the fast path may be used where it is proved. Either value gives the same numbers but for rounding."""
    checkpoint_activations: bool
    tracker: Literal["none", "wandb", "trackio", "tensorboard"]
    processes: Literal["auto"] | Annotated[int, Range(1, 4_096)] = "auto"
    """Processes on one host that share the rows of a training or an evaluation; `auto` is one per GPU, one on a CPU."""
    sharding: Literal["none", "update", "pass"] = "none"
    """Whether each of several processes holds only a part of weights, gradients and optimizer state while an entry
    trains, and how often they are gathered: once per update, or once per pass."""
    launcher: Annotated[str | None, Word("none")] = None
    """A command, `srun --ntasks-per-node=1`, that starts the stage once on every host of an allocation."""
    deterministic: bool = False
    """Whether a GPU, too, computes the same bytes from the same numbers, by slower algorithms where it must; a CPU
    always does."""


@dataclass(frozen=True)
class Params:
    """The whole file."""

    model: str
    """A hub id, a local Hugging Face folder, or a folder with only a `config.json` (random weights)."""
    revision: Annotated[str | None, Word("main")]
    """Branch, tag or commit of a hub model."""
    seed: Seed
    data: DataConfig
    encode: EncodeConfig
    latent: LatentConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    probe: ProbeConfig
    runtime: RuntimeConfig
    curriculum: Mapping[str, Entry]
    report: ReportConfig = field(default_factory=ReportConfig)
    """Files of before there was this section have none; see `coconut.config.params.load_params`."""
