"""Proves on tiny weights what the pipeline relies on in a training method.

A method that passes trains, resumes and is shared by processes like the ones that came with the package. One that
fails is told what is wrong with it in a sentence, before it has cost a night.
"""

import importlib
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from loguru import logger
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from coconut.config.methods import PACKAGE, asking_keys, blaming_method, find_method
from coconut.config.schema import BASE, Entry, LatentConfig, RuntimeConfig, TrainConfig
from coconut.config.strict import parse_yaml
from coconut.data.encoding import EncodedExample, encode_batch
from coconut.data.generators.arithmetic import ChainedArithmetic
from coconut.data.streams import generate
from coconut.data.tokenizer import build_word_tokenizer
from coconut.data.views import IGNORED, ViewWriter
from coconut.methods import ANSWER_MARK, Row, State
from coconut.model.fast.thresholds import Thresholds
from coconut.model.feedback import build_feedback
from coconut.model.passes import PassOptions
from coconut.ranks import Ranks
from coconut.training.callbacks import Callbacks
from coconut.training.learner import Tensors
from coconut.training.loop import Trainer
from coconut.training.losses import part_means
from coconut.training.position import Score
from coconut.training.rows import TrainingRow

_NUM_ROWS, _BATCH_SIZE = 24, 6
_WIDTH = 32
_TOLERANCE = 2e-4
"""Of a difference in gradients, relative to the largest of them: float32 with sums in another order."""
_FORCED = Thresholds(min_width=0, min_packed_work=0, min_vectorised_softmax=0, min_weight_elements=0)
"""The fast path in all its parts, which models as small as these would not take."""


_CURE_OF_STATE = "make it a function of the update (state_at) or of the row (row.draw), or a weight of build_modules"


class CheckError(ValueError):
    """A method breaks something that the pipeline relies on."""


def check_method(
    name: str, keys: Mapping[str, Any] | None = None, *, say: Callable[[str], None] = lambda _line: None
) -> None:
    """Prove what the pipeline relies on, for a method as its file is now.

    Args:
        keys: values of its own keys; their defaults, or `example_keys`, where they are left out.
        say: takes a line for each thing that is proved.

    Raises:
        ValueError: there is no such method, or a key is wrong.
        CheckError: naming what does not hold.
        MethodError: the method fails in its own file.
    """
    trial = _Trial(name, {**find_method(name).example_keys, **(keys or {})})
    logger.disable("coconut.training")  # A line for each epoch of a try says nothing.
    try:
        for what in _checks(trial):
            say(f"{name}: {what}")
    finally:
        logger.enable("coconut.training")


def _checks(trial: "_Trial") -> Iterator[str]:
    for check in (
        _check_labels,
        _check_draws,
        _check_cuts,
        _check_order,
        _check_processes,
        _check_fast_path,
        _check_resume,
        _check_question,
    ):
        yield check(trial)


def run(name: str, keys: Sequence[str]) -> int:
    """Check a method for `coconut check-method`, with keys as KEY=VALUE; 0."""
    values = dict(one.partition("=")[::2] for one in keys)
    check_method(name, {key: parse_yaml(text, f"--set {key}") for key, text in values.items()}, say=_write_line)
    return 0


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass
class _Memory:
    """An encoded set in memory."""

    encoded: Sequence[EncodedExample]

    def __len__(self) -> int:
        return len(self.encoded)

    def rows(self, rows: Sequence[int]) -> list[EncodedExample]:
        return [self.encoded[row] for row in rows]

    def examples(self) -> Iterator[EncodedExample]:
        return iter(self.encoded)


class _NoValidation:
    num_oom_retries = 0

    def score(self, state: State) -> Score:  # noqa: ARG002 - it is a `Validation`
        return Score(0.0, 0.0)


@dataclass
class _Kept(Callbacks):
    """Keeps the resume state after so many updates, as the disk would, and stops the run there."""

    after: int
    saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def save(self, update: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        if update == self.after:
            self.saved = {name: tensor.clone() for name, tensor in tensors.items()}, deepcopy(record)

    def is_save_due(self) -> bool:
        return True


@dataclass
class _Trial:
    """A method, tiny models, and a few rows of chained arithmetic."""

    name: str
    keys: Mapping[str, Any]

    def __post_init__(self) -> None:
        task = ChainedArithmetic("chained_arithmetic", num_operations=3, modulus=11)
        examples = list(generate(task, _NUM_ROWS, seed=0))
        # Chains of different lengths, so that rows are padded on both sides.
        examples = [replace(one, steps=one.steps[place % 3 :]) for place, one in enumerate(examples)]
        texts = [text for one in examples for text in (one.question, *one.steps, f"{ANSWER_MARK} {one.answer}")]
        self.tokenizer = build_word_tokenizer(texts)
        self.writer = ViewWriter.of(self.tokenizer)
        self.dataset = _Memory(encode_batch(self.tokenizer, examples))

    def entry(self) -> Entry:
        kind = find_method(self.name)
        latent = LatentConfig(2, 2, True, True, uniform_prob=0.3, thought="hidden[-1]", parallel_iterations=0)
        train = TrainConfig(
            _BATCH_SIZE, "fp32", "adamw", 0.9, 0.98, 0.01, 1.0, 2, "linear", False, "last", validate_examples=None
        )
        found = asking_keys(kind, self.keys)
        if found is None:
            raise ValueError(f"{self.name}: has keys without a default; give them, or set example_keys in its class")
        stage = 1 if kind.has_stages else 0
        return Entry("tried", BASE, self.name, stage, 2, 1e-2, None, None, latent, train, found)

    def model(self, family: str = "gpt2") -> PreTrainedModel:
        size = {"vocab_size": len(self.tokenizer), "bos_token_id": 0, "eos_token_id": self.tokenizer.eos_token_id}
        config: PretrainedConfig = GPT2Config(
            **size, n_embd=_WIDTH, n_layer=2, n_head=4, n_positions=128, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
        )
        if family == "llama":
            config = LlamaConfig(
                **size,
                hidden_size=_WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim > 1:  # Wider than usual: an error of a mask must not hide in a constant output.
                        parameter.mul_(3.0)
        return model

    def trainer(self, family: str = "gpt2", **options: Any) -> Trainer:
        model = self.model(family)
        runtime = RuntimeConfig("cpu", 1, 1, options.pop("micro_batch", "auto"), 8, 0, 1e9, True, False, "none")
        return Trainer(
            entry=self.entry(),
            model=model,
            feedback=build_feedback("hidden[-1]", model),
            dataset=self.dataset,  # type: ignore[arg-type]
            writer=self.writer,
            pad_id=self.tokenizer.pad_token_id or 0,
            seed=0,
            runtime=runtime,
            accelerator=Accelerator(cpu=True),
            validation=_NoValidation(),
            **options,
        )

    def gradient(self, family: str = "gpt2", **options: Any) -> "_Gradient":
        """Return the gradient of the second update; see `prepare`."""
        return self.prepare(family, **options)()

    def prepare(
        self,
        family: str = "gpt2",
        *,
        rows: Sequence[int] | None = None,
        ranks: Ranks | None = None,
        options: PassOptions | None = None,
        micro_batch: int = _BATCH_SIZE,
    ) -> "Callable[[], _Gradient]":
        """Return what computes the gradient of the second update, whose state is no longer the first one's."""
        trainer = self.trainer(family)
        objective = trainer.objective
        objective.micro_batch, objective.options = micro_batch, options or objective.options
        objective.ranks = ranks or objective.ranks
        trainer.model.train()
        shown = trainer.rows.of(list(range(_BATCH_SIZE)), 0, 1)
        return partial(_Gradient.of, trainer, [shown[row] for row in rows or range(_BATCH_SIZE)])


@dataclass
class _Gradient:
    parts: dict[str, float]
    gradients: dict[str, Tensor] = field(repr=False)

    @classmethod
    def of(cls, trainer: Trainer, shown: Sequence[TrainingRow]) -> "_Gradient":
        cost = trainer.objective.accumulate(shown, trainer.learner.parameters)
        gradients = {name: p.grad for name, p in trainer.learner.parameters.items() if p.grad is not None}
        return cls(part_means(cost.parts), gradients)

    def difference(self, other: "_Gradient") -> str:
        """Say in what this differs from another one beyond rounding; an empty text if in nothing."""
        for name in self.parts.keys() | other.parts.keys():
            here, there = self.parts.get(name, float("nan")), other.parts.get(name, float("nan"))
            if not abs(here - there) <= 1e-4 * max(1.0, abs(there)):
                return f"part {name!r} of the loss is {here:.6g} and {there:.6g}"
        if self.gradients.keys() != other.gradients.keys():
            return f"only one has a gradient of {min(self.gradients.keys() ^ other.gradients.keys())}"
        largest = max((float(one.abs().max()) for one in other.gradients.values()), default=0.0)
        for name, gradient in self.gradients.items():
            worst = float((gradient - other.gradients[name]).abs().max())
            if not worst <= _TOLERANCE * largest:
                return f"the gradient of {name} differs by {worst:.2g}, where the largest one is {largest:.2g}"
        return ""


def _require(difference: str, sentence: str) -> None:
    if difference:
        raise CheckError(f"{sentence}: {difference}")


# --- the checks, from what a row looks like to what is left on the disk ---


def _check_labels(trial: _Trial) -> str:
    entry, method = trial.entry(), trial.trainer().method
    state = method.state_at(0, 4, {})
    for place, example in enumerate(trial.dataset.examples()):
        with blaming_method(trial.name, "lay out a row"):
            views = method.views(Row(example, random.Random(place), state, trial.writer))
        if list(views) != list(method.readings):
            raise CheckError(
                f"views() names {list(views)}, but readings are {list(method.readings)}; make them the same"
            )
        for name, view in views.items():
            first = view.prefix_length + view.num_slots + (entry.latent.markers and view.num_slots > 0)
            first = max(first, len(example.question_ids))
            for column, label in enumerate(view.labels):
                if label != IGNORED and column < first:
                    raise CheckError(
                        f"reading {name!r}: the label of column {column} is {label}, but targets begin at column"
                        f" {first}: a label on the question or on a slot asks the model to predict it; use {IGNORED}"
                    )
                if label not in (IGNORED, view.input_ids[column]):
                    raise CheckError(
                        f"reading {name!r}: column {column} holds token {view.input_ids[column]}, but its label is"
                        f" {label}: a label is the token of its own column, which the column before it predicts"
                    )
            if view.num_supervised == 0:
                raise CheckError(f"reading {name!r}: no column has a label, so that nothing is learnt from it")
    return "labels stand only on targets"


def _check_draws(trial: _Trial) -> str:
    first, again, other = (_computed_with_seed(trial, seed) for seed in (1, 1, 2))
    _require(
        again.difference(first),
        "the same update is another one when it is computed again: something that it depends on is kept outside of the"
        f" resume state; {_CURE_OF_STATE}",
    )
    _require(
        other.difference(first),
        "the same update is another one with another state of the global random generators: draw from row.draw or from"
        " draws, which are keyed by the row, or a resumed run repeats something else",
    )
    return "an update depends on its rows and the weights alone, on no global generator and nothing kept elsewhere"


def _computed_with_seed(trial: _Trial, seed: int) -> "_Gradient":
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a method may use it
    compute = trial.prepare()
    torch.manual_seed(seed)
    return compute()


def _check_cuts(trial: _Trial) -> str:
    for family in ("gpt2", "llama"):
        whole = trial.gradient(family)
        for size in (4, 1):
            _require(
                trial.gradient(family, micro_batch=size).difference(whole),
                f"the gradient depends on how the update is cut ({family}, micro-batches of {size} and of"
                f" {_BATCH_SIZE}): divide by the counts of the whole update (reading.nll, reading.mean_over_rows), and"
                " take means over rows from reading.whole, not over the micro-batch",
            )
    return "the gradient is the same for every cut into micro-batches, so padding does not matter"


def _check_order(trial: _Trial) -> str:
    _require(
        trial.gradient(rows=[3, 5, 0, 2, 4, 1]).difference(trial.gradient()),
        "the gradient depends on the order of the rows in an update",
    )
    return "the order of rows does not matter"


def _check_processes(trial: _Trial) -> str:
    alone = trial.gradient()
    for rank, shared in enumerate(_in_two_processes(trial)):
        _require(
            shared.difference(alone),
            f"two processes that share an update come to another gradient (process {rank}): what a loss needs of all"
            " rows must come from reading.whole",
        )
    return "two processes give the gradient of one"


def _check_fast_path(trial: _Trial) -> str:
    for family in ("gpt2", "llama"):
        plain = trial.gradient(family, options=PassOptions(fast=False))
        for thresholds in (Thresholds(), _FORCED):
            fast = trial.gradient(family, options=PassOptions(thresholds=thresholds))
            _require(fast.difference(plain), f"the fast path gives another gradient than the plain one ({family})")
    return "the fast path gives the gradient of the plain one"


def _check_resume(trial: _Trial) -> str:
    straight = _run(trial)
    interrupted = _Kept(after=3)
    _run(trial, callbacks=interrupted)
    assert interrupted.saved is not None, "a state is saved after every update"
    # As after a kill: the module is loaded anew, and knows only what the resume state holds.
    _reload(trial.name)
    resumed = _run(trial, resumed=interrupted.saved)
    for name, tensor in straight.items():
        if not torch.equal(tensor, resumed[name]):
            raise CheckError(
                f"a resumed run ends with other bytes than an uninterrupted one ({name}): something that an update"
                f" depends on is kept outside of the resume state; {_CURE_OF_STATE}"
            )
    return "a resumed run ends with the bytes of an uninterrupted one"


def _check_question(trial: _Trial) -> str:
    trainer = trial.trainer()
    method, entry = trainer.method, trial.entry()
    with blaming_method(trial.name, "lay out a question"):
        layout = method.layout(entry.latent_stage, state=method.state_at(1, 4, {}))
        prompt = trial.writer.prompt(trial.dataset.encoded[0].question_ids, layout)
        longest = max(trial.writer.longest(example, method.training_layouts()) for example in trial.dataset.encoded)
        shown = trainer.rows.of(list(range(_NUM_ROWS)), 0, 0)
    for row in shown:
        for name, view in row.views.items():
            if len(view.input_ids) > longest:
                raise CheckError(
                    f"reading {name!r}: a row takes {len(view.input_ids)} columns, but by training_layouts() at most"
                    f" {longest}: list the layouts of all readings there, so that what does not fit a model is found"
                    " before it trains"
                )
    return f"a question is asked with {prompt.num_slots} slots, {prompt.num_thoughts} of them thoughts"


def _run(
    trial: _Trial,
    callbacks: _Kept | None = None,
    resumed: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> Tensors:
    _reload(trial.name)
    trainer = trial.trainer(callbacks=callbacks or Callbacks())
    if resumed is not None:
        trainer.restore_state(*resumed)
    trainer.fit()
    return {name: tensor.clone() for name, tensor in trainer.learner.tensors().items()}


def _reload(name: str) -> None:
    find_method.cache_clear()
    sys.modules.pop(f"{PACKAGE}.{name}", None)
    importlib.invalidate_caches()


class _Meeting:
    """Where two threads that stand for processes exchange what each of them has."""

    def __init__(self) -> None:
        self.values: list[Any] = [None, None]
        self.barrier = threading.Barrier(2, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class _ThreadRanks(Ranks):
    """Two threads, each with a model of its own, that send each other what processes would."""

    meeting: _Meeting = field(default_factory=_Meeting)

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)

    def sum_on_host(self, numbers: Sequence[float]) -> list[float]:
        return [sum(pair) for pair in zip(*self.meeting.exchange(self.rank, list(numbers)), strict=True)]

    def sum_(self, tensors: Any) -> None:
        tensors = list(tensors)
        copies = [tensor.detach().clone() for tensor in tensors]
        first, second = self.meeting.exchange(self.rank, copies)
        with torch.no_grad():
            for tensor, one, two in zip(tensors, first, second, strict=True):
                tensor.copy_(one + two)


def _in_two_processes(trial: _Trial) -> list[_Gradient]:
    meeting, errors = _Meeting(), list[BaseException]()
    found: dict[int, _Gradient] = {}

    # One after another: what a model is made of is drawn from a generator that threads share.
    computes = [trial.prepare(ranks=_ThreadRanks(rank, 2, meeting=meeting)) for rank in range(2)]

    def work(rank: int) -> None:
        try:
            found[rank] = computes[rank]()
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that waits
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return [found[rank] for rank in range(2)]
