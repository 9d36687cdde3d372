"""One curriculum entry from its parent's checkpoint to its own: load, resume, train, gate, write."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers
from loguru import logger
from torch import Tensor

from coconut.checkpoints.tensors import load_tensors, save_tensors
from coconut.config.schema import Entry, Params
from coconut.devices import peak_memory_mb
from coconut.layout import LOG_DIR
from coconut.pipeline.batch_limits import BatchLimits, note_batch_limits
from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.plausibility import warnings_about_entry
from coconut.pipeline.resume import ResumeStore, State, TensorsFile, resume_dir
from coconut.pipeline.signals import Stop, stop_on_signals
from coconut.ranks import BatchTooLargeError, Ranks
from coconut.shards import give_shards
from coconut.tracking import Track, tracking
from coconut.training.callbacks import Callbacks, Stopped
from coconut.training.loop import Trainer
from coconut.training.outputs import check_outputs, pass_gate, write_outputs
from coconut.training.setup import set_up


def train_entry(params: Params, name: str, inputs: StageInputs | None = None) -> None:
    """Train `curriculum.<name>`, resuming if a run with the same inputs was interrupted; write its outputs.

    Args:
        inputs: as they were when the process began; read here if None.

    Raises:
        ValueError: for what a user can repair: damaged inputs or inputs that changed meanwhile, a loss
            that is not finite, a model that fails, an accuracy below `min_accuracy`.
        OSError: if the outputs cannot be written; a finished training is kept as a resume state.
        SystemExit: when asked to stop by a signal, after the state was saved.
        BatchTooLargeError: memory ran out in one of several processes that hold shards; they must begin again.
    """
    if name not in params.curriculum:
        raise ValueError(
            f"curriculum.{name}: no such entry, wanted one of the curriculum: {', '.join(params.curriculum)}"
        )
    # What is edited from now on is noticed before outputs are written.
    inputs = inputs or StageInputs.read(f"train@{name}")
    entry = params.curriculum[name]
    folder = ResumeStore.folder_of(inputs.stage, inputs.fingerprint)
    limits = BatchLimits.read(folder)
    params = replace(params, runtime=limits.limit(params.runtime, entry.train.batch_size))
    trainer, tokenizer = set_up(params, entry)
    is_main = trainer.ranks.is_main
    for warning in warnings_about_entry(params.curriculum, name, len(trainer.dataset)):
        logger.warning("{}", warning)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        store = _open_store(stack, inputs, trainer)
        _resume(trainer, store)
        trainer.objective.num_oom_retries = max(trainer.objective.num_oom_retries, limits.num_retries)
        num_bytes = check_outputs(trainer, store.num_bytes())
        if is_main:
            store.warn_if_slow(num_bytes)
            track = stack.enter_context(_tracking(params, trainer.entry))
            trainer.callbacks = _Stage(stop, trainer.ranks, store, track)
        else:
            trainer.callbacks = _Follower(stop, trainer.ranks)
        _agree(trainer)
        try:
            trainer.fit()
        except Stopped as stopped:
            logger.warning("{}; `dvc repro` goes on from there", stopped)
            raise stop.preempted() from None
        except BatchTooLargeError as error:
            note_batch_limits(folder, trainer.ranks.rank, error)
            raise
        pass_gate(trainer)
        inputs.refuse_if_changed()
        peaks_mb = trainer.ranks.gather(peak_memory_mb())
        write_outputs(trainer, tokenizer, params.encode.prompt, versions(), peaks_mb)
        if is_main:
            store.keep_newest_alone()


class _Follower(Callbacks):
    """The callbacks of every process but the main one: they stop with it, and leave files and trackers to it."""

    def __init__(self, stop: Stop, ranks: Ranks) -> None:
        self._stop, self._ranks = stop, ranks

    def save(self, update: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:  # noqa: ARG002
        give_shards(tensors)

    def should_stop(self) -> bool:
        return self._stop.requested

    def interrupting(self) -> AbstractContextManager[None]:
        # Where others wait for this process's part, it gives up between two batches and tells them.
        return self._stop.interrupting() if self._ranks.count == 1 else self._stop.polled()

    def poll(self) -> None:
        self._stop.poll()


class _Stage(_Follower):
    """The callbacks of the main process: resume store, progress for `coconut status`, figures for the tracker."""

    def __init__(self, stop: Stop, ranks: Ranks, store: ResumeStore, track: Track) -> None:
        super().__init__(stop, ranks)
        self._store, self._track = store, track

    def save(self, update: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        self._store.save(State(update, tensors, {"position": record, "versions": versions()}))

    def is_save_due(self) -> bool:
        return self._store.is_due()

    def report(self, progress: Mapping[str, Any]) -> None:
        self._store.write_progress(**progress)

    def track(self, values: Mapping[str, Any], update: int) -> None:
        self._track(values, update)


def versions() -> dict[str, str]:
    """Return the versions of the libraries whose arithmetic the weights depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _open_store(stack: ExitStack, inputs: StageInputs, trainer: Trainer) -> ResumeStore:
    """The main process locks the store; the others read the state that it found, and never write."""
    ranks = trainer.ranks
    if not ranks.is_main:
        ranks.wait()
    store = stack.enter_context(
        ResumeStore.open(
            inputs.stage,
            inputs.fingerprint,
            TensorsFile(save_tensors, load_tensors),
            save_every_s=trainer.runtime.save_every_s,
            is_writer=ranks.is_main,
        )
    )
    if ranks.is_main:
        ranks.wait()
    return store


def _resume(trainer: Trainer, store: ResumeStore) -> None:
    state = store.load()
    if state is None:
        return
    saved, here = state.record["versions"], versions()
    if saved != here:
        differing = [f"{name} {saved.get(name)} (here {here[name]})" for name in here if saved.get(name) != here[name]]
        logger.warning(
            "{}: the resume state was saved with {}; training goes on, but the weights may differ from those of one"
            " version throughout. To start over, delete {}",
            *(trainer.entry.name, ", ".join(differing), store.folder),
        )
    trainer.restore_state(state.tensors, state.record["position"])


def _agree(trainer: Trainer) -> None:
    """Refuse to begin where processes would go on from different states, as hosts with an outdated network disk may.

    Raises:
        ValueError: naming the updates that they found.
    """
    found = trainer.ranks.gather(trainer.position.update)
    if len(set(found)) > 1:
        raise ValueError(
            f"{resume_dir()}: its processes found states of different updates ({', '.join(map(str, found))}), wanted"
            " one folder that all hosts see alike; `dvc repro` again, once the disk shows the same files everywhere"
        )


def _tracking(params: Params, entry: Entry) -> AbstractContextManager[Track]:
    config = {"model": params.model, "seed": params.seed, **asdict(entry)}
    return tracking(params.runtime.tracker, run=entry.name, config=config, folder=LOG_DIR)
