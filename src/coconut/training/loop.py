"""The training loop of one curriculum entry: fit -> run_epoch -> update -> validate.

Exactly resumable: everything that the next update depends on is either in the saved state
(weights, moments, place in the epoch, sums, history) or a function of (seed, entry, epoch, row).
"""

import csv
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from coconut.config.schema import Entry, RuntimeConfig
from coconut.data.curriculum import count_removed
from coconut.data.mapped import EncodedSet
from coconut.data.views import MarkerIds
from coconut.devices import peak_memory_mb
from coconut.logs import shows_progress
from coconut.model.feedback import Feedback
from coconut.pipeline.signals import Interrupted
from coconut.training.objective import Cost, Objective, check_finite
from coconut.training.optimizer import build_optimizer, learning_rate, optimizer_tensors, restore_optimizer
from coconut.training.rows import epoch_order, longest_reasoning, split_updates, training_views

Tensors = Mapping[str, Tensor]


class Stopped(Exception):  # noqa: N818 - it is no error: the state is saved, and the stage goes on next time
    """The run was asked to end, and has saved its state."""


@dataclass(frozen=True)
class Score:
    """What validation says of the weights: mean loss in nats per token, share of right answers."""

    loss: float
    accuracy: float


@dataclass
class Sums:
    """What an epoch adds up, in the order of its updates."""

    nll: float = 0.0
    num_tokens: int = 0
    num_columns: int = 0
    num_padding: int = 0
    num_latents: int = 0
    num_updates: int = 0
    grad_norm: float = 0.0
    seconds: float = 0.0

    def add(self, cost: Cost, *, grad_norm: float, seconds: float) -> None:
        self.nll += cost.nll
        self.num_tokens += cost.num_tokens
        self.num_columns += cost.num_columns
        self.num_padding += cost.num_padding
        self.num_latents += cost.num_latents
        self.num_updates += 1
        self.grad_norm += grad_norm
        self.seconds += seconds


@dataclass(frozen=True)
class HistoryRow:
    """One epoch of `history.csv`. Timings are the last columns: the others repeat byte for byte."""

    entry: str
    epoch: int
    update: int
    """Updates of this entry done so far."""
    train_loss: float
    grad_norm: float
    """Mean over the epoch's updates, before clipping."""
    lr: float
    """Of the epoch's last update."""
    valid_loss: float
    valid_accuracy: float
    first_update_loss: float | None
    """Of the parent's weights at this entry's stage, before the first update; first row only."""
    first_update_accuracy: float | None
    num_latents: float
    """Mean per example."""
    tokens: int
    """Columns that hold something, thoughts included."""
    padding_share: float
    tokens_per_s: float
    ms_per_update: float
    seconds: float
    """Since the entry began, over all resumed sessions, validation included."""


@dataclass
class Position:
    """Where a run stands; JSON in the resume state."""

    epoch: int = 0
    update_in_epoch: int = 0
    update: int = 0
    optimizer_updates: int = 0
    sums: Sums = field(default_factory=Sums)
    history: list[dict[str, Any]] = field(default_factory=list)
    first: dict[str, float] | None = None
    best_accuracy: float = -1.0
    seconds: float = 0.0
    num_oom_retries: int = 0
    micro_batch: int | None = None
    lr: float = 0.0

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Position":
        return cls(**{**record, "sums": Sums(**record["sums"])})


@dataclass
class Trainer:
    """Trains one entry from its parent's weights.

    `save`, `report` and `track` are the trainer's only ways to the outside: the first is given the resume
    state's tensors and record, the second the progress at each interval, the third figures and their
    update. `is_cheap_to_save` may put a save off, so that saving stays a small share of the time however
    large the model is.
    """

    entry: Entry
    model: PreTrainedModel
    feedback: Feedback
    dataset: EncodedSet
    markers: MarkerIds
    pad_id: int
    seed: int
    runtime: RuntimeConfig
    accelerator: Accelerator
    validate: Callable[[], Score]
    validation_retries: Callable[[], int] = lambda: 0
    """How often validation ran out of memory in this session."""
    save: Callable[[dict[str, Tensor], dict[str, Any]], None] = lambda _tensors, _record: None
    report: Callable[[dict[str, Any]], None] = lambda _progress: None
    track: Callable[[Mapping[str, Any], int], None] = lambda _values, _update: None
    is_cheap_to_save: Callable[[], bool] = lambda: True
    should_stop: Callable[[], bool] = lambda: False
    interrupting: Callable[[], AbstractContextManager[None]] = nullcontext
    removed_before: int = 0
    """Reasoning tokens that the parent had removed (`icot` only)."""
    position: Position = field(default_factory=Position)
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = [*self.model.named_parameters(), *((f"feedback.{n}", p) for n, p in self.feedback.named_parameters())]
        self.parameters: dict[str, nn.Parameter] = dict(named)
        self.optimizer = build_optimizer(self.parameters, self.entry.train)
        micro = self.runtime.micro_batch
        self.objective = Objective(
            self.model,
            self.feedback,
            self.accelerator,
            self.pad_id,
            micro_batch=self.entry.train.batch_size if micro == "auto" else micro,
            checkpoint_activations=self.runtime.checkpoint_activations,
        )
        self.session_start = time.monotonic()
        self.last_saved = self.last_reported = self.session_start

    # --- sizes ---

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.dataset) // self.entry.train.batch_size)

    @property
    def num_updates(self) -> int:
        """Of the whole entry."""
        whole = self.updates_per_epoch * self.entry.epochs
        return min(whole, self.entry.max_updates or whole)

    @property
    def num_epochs(self) -> int:
        """Epochs begun; the last one may be cut short by `max_updates`."""
        return -(-self.num_updates // self.updates_per_epoch)

    @property
    def num_removed_tokens(self) -> int:
        """Reasoning tokens that `icot` removes in the update to come."""
        return self._count_removed(self.position.update)

    @property
    def num_removed_tokens_so_far(self) -> int:
        """Reasoning tokens that `icot` had removed in the last update: what the weights are trained for."""
        return self._count_removed(max(0, self.position.update - 1))

    def _count_removed(self, update: int) -> int:
        return count_removed(
            self.entry, update=update, updates_per_epoch=self.updates_per_epoch, start=self.removed_before
        )

    @property
    def num_oom_retries(self) -> int:
        """How often memory ran out, in updates and in validation, over all sessions."""
        return self.objective.num_oom_retries + self.validation_retries()

    @property
    def seconds(self) -> float:
        """Spent on this entry so far, over all sessions."""
        return self.position.seconds + time.monotonic() - self.session_start

    # --- the loop ---

    def fit(self) -> None:
        """Train to the end of the entry, and leave the selected weights in the model.

        Raises:
            Stopped: if the run was asked to end; the state is saved.
            ValueError: on a loss or gradient that is not finite.
        """
        if self.position.first is None:
            self.position.first = dataclasses.asdict(self._score())
            logger.info("{}", _line(self.entry.name, "before the first update", self.position.first))
            self.track({f"valid_{key}": value for key, value in self.position.first.items()}, 0)
        with self._progress_bar() as bar:
            while self.position.epoch < self.num_epochs:
                self.run_epoch(bar)
        if self.entry.train.select == "best":
            self._load_weights(self.best)

    def run_epoch(self, bar: "tqdm[Any]") -> None:
        """Do what is left of the current epoch, validate, and save."""
        position = self.position
        self.model.train()
        for rows in self._remaining_updates():
            self.update(rows)
            bar.update()
            self._at_interval(bar)
        score = self._score()
        self._close_epoch(score)
        if self.entry.train.select == "best" and score.accuracy > position.best_accuracy:
            position.best_accuracy = score.accuracy
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        # Epochs may be shorter than a save; the end of training is kept in every case.
        if self.is_cheap_to_save() or position.epoch >= self.num_epochs:
            self.save_state()

    def update(self, rows: list[int]) -> None:
        """One optimiser update on the mean loss of these rows."""
        started = time.monotonic()
        position, entry = self.position, self.entry
        # Dropout's draws too are a function of the place in the run, so a resumed run repeats them.
        torch.manual_seed(random.Random(f"dropout/{self.seed}/{entry.name}/{position.update}").getrandbits(63))
        views = training_views(
            self.dataset,
            rows,
            entry=entry,
            seed=self.seed,
            epoch=position.epoch,
            markers=self.markers,
            num_removed_tokens=self.num_removed_tokens,
        )
        if entry.method == "icot" and entry.train.reset_optimizer:
            self._reset_after_removal(rows)
        cost = self.objective.accumulate(views, self.parameters)
        limit = entry.train.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), torch.inf if limit is None else limit)
        grad_norm = float(norm)
        try:
            check_finite(
                cost, grad_norm, entry_name=entry.name, epoch=position.epoch, update=position.update, rows=rows
            )
        except ValueError:
            # Unless an update before has spoiled them, who looks for the reason finds the weights before it.
            if all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
                with suppress(OSError):  # A full disk is not the reason that is looked for.
                    self.save_state()
            raise
        position.lr = learning_rate(
            entry,
            update=position.update,
            num_updates=self.num_updates,
            optimizer_updates=position.optimizer_updates,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = position.lr
        self.optimizer.step()
        position.update += 1
        position.update_in_epoch += 1
        position.optimizer_updates += 1
        position.sums.add(cost, grad_norm=grad_norm, seconds=time.monotonic() - started)

    def _reset_after_removal(self, rows: list[int]) -> None:
        """Start with fresh moments whenever `icot` has just removed more of what these rows still showed.

        The learning rate does not warm up again: at a few tokens per epoch it would never be warm.

        Source: Deng et al. 2024 (arXiv:2405.14838), section 3.
        """
        before = self._count_removed(self.position.update - 1) if self.position.update else self.num_removed_tokens
        if self.num_removed_tokens > before and longest_reasoning(self.dataset, rows) > before:
            self.optimizer.state.clear()

    def _remaining_updates(self) -> Iterator[list[int]]:
        order = epoch_order(len(self.dataset), seed=self.seed, entry_name=self.entry.name, epoch=self.position.epoch)
        for number, rows in enumerate(split_updates(order, self.entry.train.batch_size)):
            if number < self.position.update_in_epoch:
                continue
            if self.position.update >= self.num_updates:
                return
            yield rows

    def _close_epoch(self, score: Score) -> None:
        position, sums = self.position, self.position.sums
        num_rows = min(sums.num_updates * self.entry.train.batch_size, len(self.dataset))
        first = position.first if not position.history else None
        tokens = sums.num_columns - sums.num_padding
        row = HistoryRow(
            entry=self.entry.name,
            epoch=position.epoch + 1,
            update=position.update,
            train_loss=sums.nll / max(1, sums.num_tokens),
            grad_norm=sums.grad_norm / max(1, sums.num_updates),
            lr=position.lr,
            valid_loss=score.loss,
            valid_accuracy=score.accuracy,
            first_update_loss=first["loss"] if first else None,
            first_update_accuracy=first["accuracy"] if first else None,
            num_latents=sums.num_latents / max(1, num_rows),
            tokens=tokens,
            padding_share=sums.num_padding / max(1, sums.num_columns),
            tokens_per_s=tokens / max(1e-9, sums.seconds),
            ms_per_update=1e3 * sums.seconds / max(1, sums.num_updates),
            seconds=self.seconds,
        )
        position.history.append(dataclasses.asdict(row))
        logger.info("{}", _line(self.entry.name, f"epoch {row.epoch}", dataclasses.asdict(row)))
        self.track(dataclasses.asdict(row), row.update)
        position.epoch, position.update_in_epoch, position.sums = position.epoch + 1, 0, Sums()

    # --- between updates ---

    def _at_interval(self, bar: "tqdm[Any]") -> None:
        now = time.monotonic()
        if self.should_stop():
            self._stop()
        if now - self.last_saved >= self.runtime.save_every_s and self.is_cheap_to_save():
            self.save_state()
        if now - self.last_reported >= self.runtime.log_every_s:
            self._report(bar)
            self.last_reported = now

    def _score(self) -> Score:
        """Validate. It may take minutes and changes nothing, so that a request to stop need not wait for its end."""
        try:
            with self.interrupting():
                return self.validate()
        except Interrupted:
            self._stop()

    def _stop(self) -> NoReturn:
        self.save_state()
        raise Stopped(f"{self.entry.name}: stopped at update {self.position.update} of {self.num_updates}")

    def _report(self, bar: "tqdm[Any]") -> None:
        sums = self.position.sums
        rate = bar.format_dict["rate"] or 1 / max(1e-9, sums.seconds / max(1, sums.num_updates))
        eta_s = (self.num_updates - self.position.update) / rate
        loss = sums.nll / max(1, sums.num_tokens)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.report({"update": self.position.update, "num_updates": self.num_updates, "loss": loss, "eta_s": eta_s})
        self.track({"running_loss": loss, "lr": self.position.lr}, self.position.update)
        if bar.disable:
            logger.info(
                "{}: update {}/{} loss {:.4f} lr {:.2e} {:.0f} ms/update, {} left",
                self.entry.name,
                self.position.update,
                self.num_updates,
                loss,
                self.position.lr,
                1e3 * sums.seconds / max(1, sums.num_updates),
                tqdm.format_interval(eta_s),
            )

    def _progress_bar(self) -> "tqdm[Any]":
        return tqdm(
            desc=self.entry.name,
            total=self.num_updates,
            initial=self.position.update,
            unit="update",
            disable=not (shows_progress() and self.accelerator.is_main_process),
            dynamic_ncols=True,
        )

    # --- the resume state ---

    def save_state(self) -> None:
        """Hand out all that a later session needs."""
        self.position.seconds, self.session_start = self.seconds, time.monotonic()
        self.position.num_oom_retries = self.num_oom_retries
        self.position.micro_batch = self.objective.micro_batch
        if self.accelerator.is_main_process:
            self.save(self.state_tensors(), dataclasses.asdict(self.position))
        self.last_saved = time.monotonic()

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, moments and the best weights so far, by prefixed names."""
        return {
            **{f"weight:{name}": parameter.detach() for name, parameter in self.parameters.items()},
            **{f"moment:{name}": tensor for name, tensor in self.optimizer_state().items()},
            **{f"best:{name}": tensor for name, tensor in self.best.items()},
        }

    def restore_state(self, tensors: Tensors, record: Mapping[str, Any]) -> None:
        """Continue from what `save` was once given."""
        self.position = Position.from_record(record)
        self.objective.num_oom_retries = self.position.num_oom_retries
        if self.runtime.micro_batch == "auto" and self.position.micro_batch is not None:
            self.objective.micro_batch = self.position.micro_batch
        self._load_weights(_with_prefix(tensors, "weight:"))
        self.best = {name: tensor.clone() for name, tensor in _with_prefix(tensors, "best:").items()}
        self.take_over_optimizer(_with_prefix(tensors, "moment:"))

    def optimizer_state(self) -> dict[str, Tensor]:
        """The moments, as they go to the next entry or the resume state."""
        return optimizer_tensors(self.optimizer, self.parameters, num_updates=self.position.optimizer_updates)

    def take_over_optimizer(self, tensors: Tensors) -> None:
        """Continue with these moments, the parent's or a saved state's."""
        self.position.optimizer_updates = restore_optimizer(self.optimizer, self.parameters, tensors)

    def _load_weights(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def summary(self) -> dict[str, float]:
        """What `train.json` says: seconds, updates, memory in MB."""
        return {
            "train_seconds": round(self.seconds, 3),
            "train_updates": self.position.update,
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "micro_batch": self.objective.micro_batch,
            "train_oom_retries": self.num_oom_retries,
        }


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Write `history.csv`, one row per epoch; numbers with the digits that name them exactly."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(HistoryRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def _with_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _line(name: str, when: str, fields: Mapping[str, Any]) -> str:
    shown = ("train_loss", "loss", "valid_loss", "accuracy", "valid_accuracy", "ms_per_update", "seconds")
    return f"{name}: {when}: " + " ".join(f"{key} {fields[key]:.4g}" for key in shown if key in fields)
