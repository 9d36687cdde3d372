"""The training loop of one curriculum entry: `fit` goes through its epochs and updates, `update` is one of them.

A run resumes exactly: everything that the next update depends on is either in the saved state
(weights, optimizer state, place in the epoch, sums, history) or a function of (seed, entry, epoch, row).
"""

import dataclasses
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from coconut.config.methods import MethodError, blaming_method, build_method
from coconut.config.schema import Entry, RuntimeConfig
from coconut.data.encoded import EncodedSet
from coconut.data.views import ViewWriter
from coconut.devices import Stopwatch, explain_failure, machine_load, ranks_of
from coconut.methods import State
from coconut.model.feedback import Feedback
from coconut.model.passes import PassOptions
from coconut.pipeline.signals import Interrupted
from coconut.ranks import RankLostError
from coconut.training.callbacks import Callbacks, Stopped, Validation
from coconut.training.curve import Curve
from coconut.training.learner import Learner, Tensors
from coconut.training.objective import Cost, Objective, check_finite
from coconut.training.optimizer import learning_rate
from coconut.training.position import Position, Score
from coconut.training.progress import Progress, log_epoch, log_first_score
from coconut.training.rows import RowMaker, TrainingRow, epoch_order, split_updates
from coconut.training.schedule import Schedule

if TYPE_CHECKING:
    from coconut.training.sharding import Shards


@dataclass(kw_only=True)
class Trainer:
    """Trains one entry from its parent's weights."""

    entry: Entry
    model: PreTrainedModel
    feedback: Feedback
    dataset: EncodedSet
    writer: ViewWriter
    pad_id: int
    seed: int
    runtime: RuntimeConfig
    accelerator: Accelerator
    validation: Validation
    callbacks: Callbacks = field(default_factory=Callbacks)
    shards: "Shards | None" = None
    """The weights, where no process holds all of them."""
    parent_state: State = field(default_factory=dict)
    """In which the parent's training had left its method."""
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self.method = build_method(self.entry)
        with blaming_method(self.entry.method, "build its modules"):
            modules = self.method.build_modules(self.model, self.seed)
        if modules is not None:
            modules = modules.to(self.model.device)
        self.learner = Learner(self.model, self.feedback, self.entry.train, modules)
        self.schedule = Schedule(self.entry, len(self.dataset), self.parent_state)
        self.position.curve = Curve.over(self.schedule.num_updates)
        self.ranks = ranks_of(self.accelerator)
        self._stops = self._saves = False
        self.rows = RowMaker(self.dataset, self.entry, self.seed, self.writer, self.schedule)
        micro = self.runtime.micro_batch
        self.objective = Objective(
            self.model,
            self.feedback,
            self.accelerator,
            self.pad_id,
            micro_batch=self.entry.train.batch_size if micro == "auto" else micro,
            method=self.method,
            modules=modules,
            options=PassOptions(fast=self.runtime.fast, checkpoint_activations=self.runtime.checkpoint_activations),
            ranks=self.ranks,
            shards=self.shards,
        )
        self.watch = Stopwatch()

    # --- the loop ---

    def fit(self) -> None:
        """Train to the end of the entry, and leave the selected weights in the model.

        Raises:
            Stopped: if the run was asked to end; the state is saved.
            ValueError: if a loss or gradient is not finite, or the model fails on some rows.
            RankLostError: if another process of this training ended; the state is saved.
        """
        name, position, total = self.entry.name, self.position, self.schedule.num_updates
        selects_best = self.entry.train.select == "best"
        if position.first is None:  # The parent's weights at this entry's stage.
            position.first = first = dataclasses.asdict(self.validate())
            log_first_score(name, first)
            self.callbacks.track({f"valid_{key}": value for key, value in first.items()}, 0)
        every_s = self.runtime.log_every_s
        with Progress(name, self.callbacks, every_s=every_s, start=position.update, total=total) as progress:
            while not self.is_finished:
                self.model.train()
                for rows, next_rows in pairwise([*self._remaining_updates(), []]):
                    self.update(rows, next_rows)
                    progress.advance(position)
                    if self._is_asked_to_stop():
                        self._stop()
                    if self._is_asked_to_save():
                        self.save_state()
                score = self.validate()
                self._close_epoch(score)
                if selects_best and score.accuracy > position.best_accuracy:
                    position.best_accuracy = score.accuracy
                    self.learner.keep_best()
                # The end of training is saved in every case, however dear a save is.
                if self.is_finished or self._is_save_due_at_the_end_of_an_epoch():
                    self.save_state()
        if selects_best:
            self.learner.take_best()

    def update(self, rows: list[int], next_rows: Sequence[int] = ()) -> None:
        """One optimizer update on the mean loss of these rows.

        Args:
            next_rows: of the next update of the epoch, whose views are made while an accelerator works on this one.
        """
        started = time.monotonic()
        # Dropout's draws too are a function of the place in the run, so a resumed run repeats them.
        torch.manual_seed(
            random.Random(f"dropout/{self.seed}/{self.entry.name}/{self.position.update}").getrandbits(63)
        )
        if self.entry.train.reset_optimizer and self._restarts_optimizer(rows):
            self.learner.optimizer.state.clear()
        cost = self._accumulate(self.rows.of(rows, self.position.epoch, self.position.update), rows, next_rows)
        self._refuse_unless_finite(cost, rows)
        lr = learning_rate(
            self.entry,
            update=self.position.update,
            num_updates=self.schedule.num_updates,
            optimizer_updates=self.learner.num_updates,
        )
        self.learner.step(lr)
        self.position.advance(
            cost,
            num_updates=self.schedule.num_updates,
            lr=lr,
            grad_norm=cost.grad_norm,
            seconds=time.monotonic() - started,
        )

    def validate(self) -> Score:
        """Score the weights. It may take minutes and changes nothing, so a request to stop does not wait for its end.

        Raises:
            Stopped: if the run was asked to end; the state is saved.
        """
        try:
            with self.callbacks.interrupting():
                return self.validation.score(self.schedule.state_at(self.position.update))
        except Interrupted:
            self._stop()

    def poll(self) -> None:
        """Raise `Interrupted` between two batches of a validation, if the run was asked to end."""
        if self.shards is not None and self.shards.kind == "pass":
            if any(self.ranks.gather(self.callbacks.should_stop())):
                raise Interrupted  # All at once, since each of them reads all rows.
        else:
            self.callbacks.poll()

    # --- the parts of an update ---

    def _remaining_updates(self) -> list[list[int]]:
        position = self.position
        order = epoch_order(len(self.dataset), seed=self.seed, entry_name=self.entry.name, epoch=position.epoch)
        left = list(split_updates(order, self.entry.train.batch_size))[position.update_in_epoch :]
        return left[: self.schedule.num_updates - position.update]

    def _finish_gradient(self, next_rows: Sequence[int]) -> Tensor:
        """Clip the gradient; prepare the next update before this one's numbers are asked for."""
        norm = self.learner.clip_gradients()
        if next_rows:
            self.objective.prepare(self.rows.of(next_rows, self.position.epoch, self.position.update + 1))
        return norm

    def _restarts_optimizer(self, rows: Sequence[int]) -> bool:
        examples = (example for number in rows for example in self.dataset.rows([number]))
        with blaming_method(self.entry.method, "say whether its optimizer begins anew"):
            return self.method.restarts_optimizer(self.schedule.state_at(self.position.update), examples)

    def _accumulate(self, shown: list[TrainingRow], rows: list[int], next_rows: Sequence[int]) -> Cost:
        try:
            cost = self.objective.accumulate(
                shown,
                self.learner.parameters,
                stops=self.ranks.count > 1 and self.callbacks.should_stop(),
                saves=self.shards is not None and self.callbacks.is_save_due(),
                finish=partial(self._finish_gradient, next_rows),
            )
        except (RankLostError, MethodError):
            self._save_alone()
            raise
        except (RuntimeError, IndexError) as error:
            self._save_alone()
            raise ValueError(f"{self._place(rows)}: the model failed: {explain_failure(error)}") from error
        self._stops, self._saves = cost.stops, cost.saves
        return cost

    def _refuse_unless_finite(self, cost: Cost, rows: list[int]) -> None:
        try:
            check_finite(cost, place=self._place(rows))
        except ValueError:
            self._save_before_failing()
            raise

    def _save_alone(self) -> None:
        """Save the weights where this process holds all of them: the others cannot be asked for anything."""
        if self.shards is None:
            self._save_before_failing()

    def _save_before_failing(self) -> None:
        """Save the weights before the update that failed, unless an earlier one has spoiled them."""
        # A full disk, or a device that no longer answers, is not the reason that the user looks for.
        with suppress(OSError, RuntimeError):
            if all(self.ranks.gather(self.learner.is_finite()) if self.shards else [self.learner.is_finite()]):
                self.save_state()

    def _place(self, rows: list[int]) -> str:
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        position = self.position
        return f"curriculum.{self.entry.name}, epoch {position.epoch + 1}, update {position.update + 1}, rows {shown}"

    # --- between updates and epochs ---

    def _is_asked_to_stop(self) -> bool:
        # Several processes must stop after the same update, so they stop after the one in which all were told of it.
        return self._stops or (self.ranks.count == 1 and self.callbacks.should_stop())

    def _is_asked_to_save(self) -> bool:
        # Of sharded weights, every process gives its part: they save after the update in which all were told of it.
        return self._saves or (self.shards is None and self.callbacks.is_save_due())

    def _is_save_due_at_the_end_of_an_epoch(self) -> bool:
        due = self.callbacks.is_save_due()
        return due if self.shards is None else any(self.ranks.gather(due))

    def _close_epoch(self, score: Score) -> None:
        row = self.position.close_epoch(
            score,
            entry_name=self.entry.name,
            num_rows=min(self.position.sums.num_updates * self.entry.train.batch_size, len(self.dataset)),
            seconds=self.watch.seconds,
            cpu_seconds=self.watch.cpu_seconds,
            load=machine_load(),
        )
        log_epoch(row)
        self.callbacks.track(self.position.history[-1], row.update)

    def _stop(self) -> NoReturn:
        self.save_state()
        raise Stopped(f"{self.entry.name}: stopped at update {self.position.update} of {self.schedule.num_updates}")

    # --- the resume state ---

    def save_state(self) -> None:
        """Hand out all that a later session needs."""
        position = self.position
        position.seconds, position.cpu_seconds = self.watch.seconds, self.watch.cpu_seconds
        position.num_oom_retries = self.num_oom_retries
        position.micro_batch = self.objective.micro_batch
        self.callbacks.save(position.update, self.learner.tensors(), dataclasses.asdict(position))

    def restore_state(self, tensors: Tensors, record: Mapping[str, Any]) -> None:
        """Continue from what `callbacks.save` was once given."""
        self.position = position = Position.from_record(record)
        self.watch = Stopwatch(seconds=position.seconds, cpu_seconds=position.cpu_seconds)
        self.objective.num_oom_retries = position.num_oom_retries
        if self.runtime.micro_batch == "auto" and position.micro_batch is not None:
            self.objective.micro_batch = position.micro_batch
        self.learner.restore(tensors)

    # --- what is known of it ---

    @property
    def is_finished(self) -> bool:
        return self.position.epoch >= self.schedule.num_epochs

    @property
    def num_oom_retries(self) -> int:
        """Count how often memory ran out, in updates and in validation, over all sessions."""
        return self.objective.num_oom_retries + self.validation.num_oom_retries
