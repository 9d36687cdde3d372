"""One curriculum entry from its parent's checkpoint to its own: load, resume, train, guard, write."""

import dataclasses
import json
import tempfile
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from loguru import logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut.checkpoints.feedback import load_feedback, save_feedback
from coconut.checkpoints.folder import META_FILE, load_checkpoint, save_checkpoint
from coconut.checkpoints.meta import CheckpointMeta
from coconut.config.schema import BASE, Entry, Params
from coconut.config.thought import check_layers, parse_thought
from coconut.data.curriculum import plan_view
from coconut.data.encoding import EncodedExample
from coconut.data.examples import MARKERS, read_examples
from coconut.data.mapped import load_encoded
from coconut.data.views import MarkerIds
from coconut.devices import build_accelerator
from coconut.evaluation.evaluator import Evaluator
from coconut.files import check_free_space
from coconut.layout import ENCODED_DIR, EXAMPLES_DIR, LOG_DIR, OUTPUTS_DIR, SPLITS, checkpoint_dir
from coconut.model.head import num_positions
from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.resume import ResumeStore, State, resume_dir
from coconut.pipeline.signals import stop_on_signals
from coconut.tracking import Track, tracking
from coconut.training.loop import Score, Stopped, Trainer, write_history
from coconut.training.optimizer import fits_optimizer

OPTIMIZER_FILE = "optimizer.safetensors"
_SHAPE = ("c_thought", "max_latent_stage", "markers")
_RESTORE = "`dvc repro` restores the checkpoint"
_WRITABLE = "make room, mend its permissions or move away what stands in its place, and run `dvc repro` again"


def train_entry(params: Params, name: str, inputs: StageInputs | None = None) -> None:
    """Train `curriculum.<name>`, resuming if a run with the same inputs was interrupted; write its outputs.

    Args:
        inputs: as they were when the process began; read here if None.

    Raises:
        ValueError: for what a user can mend: damaged inputs or inputs that changed meanwhile, a loss
            that is not finite, an accuracy below `min_accuracy`.
        OSError: if the outputs cannot be written; a finished training is kept as a resume state.
        SystemExit: when asked to stop by a signal, after the state was saved.
    """
    if name not in params.curriculum:
        raise ValueError(
            f"curriculum.{name}: no such entry, wanted one of the curriculum: {', '.join(params.curriculum)}"
        )
    entry = params.curriculum[name]
    # What is edited from now on is noticed before outputs are written.
    inputs = inputs or StageInputs.read(f"train@{name}")
    accelerator = build_accelerator(params.runtime, entry.train.precision)
    parent_dir = checkpoint_dir(entry.parent)
    model, tokenizer, meta = load_checkpoint(parent_dir, device=str(accelerator.device), dtype=_dtype(entry))
    if meta is None and entry.parent != BASE:
        raise ValueError(f"{parent_dir / META_FILE}: no such file, but {entry.parent} was trained; {_RESTORE}")
    _check_the_night(params, entry, model)
    trainer = build_trainer(params, entry, accelerator, model, tokenizer, meta)
    trainer.removed_before = 0 if meta is None else meta.num_removed_at_end
    if not entry.train.reset_optimizer:
        _take_over_optimizer(trainer, params)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        store = _open_store(stack, inputs, accelerator)
        state = store.load()
        if state is not None:
            trainer.restore_state(state.tensors, state.record)
        _check_outputs(trainer, entry, store.num_bytes())
        trainer.should_stop = lambda: stop.requested
        trainer.interrupting = stop.interrupting
        trainer.save = partial(_save, store, trainer)
        trainer.is_cheap_to_save = store.is_due
        trainer.report = lambda progress: store.write_progress(**progress)
        if accelerator.is_main_process:
            trainer.track = stack.enter_context(_tracking(params, entry))
        try:
            trainer.fit()
        except Stopped as stopped:
            logger.warning("{}; `dvc repro` goes on from there", stopped)
            raise stop.preempted() from None
        _pass_gate(trainer, entry)
        inputs.refuse_if_changed()
        if accelerator.is_main_process:
            write_outputs(trainer, tokenizer, params)


def build_trainer(
    params: Params,
    entry: Entry,
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parent: CheckpointMeta | None,
) -> Trainer:
    """Put together the parent's model, the encoded data and the validation of an entry.

    Args:
        parent: None for the base model.
    """
    # Of a parent that trained a network of its own, fresh weights in its place would be a silent loss.
    parent_has_weights = parent is not None and parse_thought(parent.thought).finish == "projection"
    feedback = load_feedback(
        checkpoint_dir(entry.parent),
        entry.latent.thought,
        model,
        parallel_iterations=entry.latent.parallel_iterations,
        seed=None if parent_has_weights else params.seed,
    )
    markers = MarkerIds(*tokenizer.convert_tokens_to_ids(list(MARKERS)))
    evaluator = Evaluator(
        model,
        feedback,
        tokenizer,
        plan_view(entry.method, entry.latent_stage, entry.latent),
        markers,
        max_new_tokens=params.evaluate.max_new_tokens,
        batch_size=params.runtime.eval_batch,
        autocast=accelerator.autocast,
    )
    trainer = Trainer(
        entry,
        model,
        feedback,
        load_encoded(ENCODED_DIR, "train"),
        markers,
        evaluator.pad_id,
        params.seed,
        params.runtime,
        accelerator,
        validate=_validation(evaluator, entry),
        validation_retries=lambda: evaluator.num_oom_retries,
    )
    if entry.method == "icot":
        trainer.validate = _validation_of_icot(trainer, evaluator)
    return trainer


def _tracking(params: Params, entry: Entry) -> AbstractContextManager[Track]:
    config = {"model": params.model, "seed": params.seed, **dataclasses.asdict(entry)}
    return tracking(params.runtime.tracker, run=entry.name, config=config, folder=LOG_DIR)


def _dtype(entry: Entry) -> torch.dtype:
    return torch.bfloat16 if entry.train.precision == "bf16-weights" else torch.float32


def _validation(evaluator: Evaluator, entry: Entry) -> Any:
    dataset = load_encoded(ENCODED_DIR, "valid", entry.train.validate_examples)
    examples = read_examples(EXAMPLES_DIR / "valid.jsonl")

    def validate() -> Score:
        was_training = evaluator.model.training
        evaluator.model.eval()
        outcomes = evaluator.outcomes(dataset, examples)
        accuracy = sum(outcome.right for outcome in outcomes) / max(1, len(outcomes))
        score = Score(evaluator.loss(dataset), accuracy)
        evaluator.model.train(was_training)
        return score

    return validate


def _validation_of_icot(trainer: Trainer, evaluator: Evaluator) -> Any:
    """Validate with as many reasoning tokens removed as in the last update."""
    entry, validate = trainer.entry, trainer.validate

    def validate_now() -> Score:
        removed = trainer.num_removed_tokens_so_far
        evaluator.plan = plan_view(entry.method, entry.latent_stage, entry.latent, num_removed_tokens=removed)
        return validate()

    return validate_now


def _take_over_optimizer(trainer: Trainer, params: Params) -> None:
    parent = trainer.entry.parent
    path = checkpoint_dir(parent) / OPTIMIZER_FILE
    if path.exists():
        try:
            moments = load_file(path)
            if not fits_optimizer(trainer.optimizer, moments):
                logger.warning(
                    "{}: of another optimiser than {}; the optimiser starts fresh", path, trainer.entry.train.optimizer
                )
                return
            trainer.take_over_optimizer(moments)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: not whole, or of another model ({error}); {_RESTORE}") from error
    elif parent != BASE and not params.curriculum[parent].train.reset_optimizer:
        raise ValueError(f"{path}: no such file, but {parent} keeps its moments (reset_optimizer: false); {_RESTORE}")
    elif parent != BASE:
        logger.warning("{}: not there, the parent kept no moments; the optimiser starts fresh", path)


def _open_store(stack: ExitStack, inputs: StageInputs, accelerator: Accelerator) -> ResumeStore:
    """The main process locks the store; the others read the state that it found, and never write."""
    if accelerator.is_main_process:
        store = stack.enter_context(ResumeStore.open(inputs.stage, inputs.fingerprint))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        folder = resume_dir() / f"{inputs.stage}-{inputs.fingerprint[:16]}"
        store = ResumeStore(folder, inputs.stage, inputs.fingerprint)
    return store


def _save(store: ResumeStore, trainer: Trainer, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    store.save(State(trainer.position.update, tensors, record))


def _check_the_night(params: Params, entry: Entry, model: PreTrainedModel) -> None:
    """Find out now, and not after hours of training, what this model cannot do for an entry.

    Raises:
        ValueError: if any entry's thought is of a layer that the model lacks, or this entry's views do not fit.
    """
    config = model.config.get_text_config()
    for name, other in params.curriculum.items():
        try:
            check_layers(other.latent.thought, config.num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"curriculum.{name}.{error}") from None
    room = num_positions(model)
    shared, own = params.latent, entry.latent
    if all(getattr(own, name) == getattr(shared, name) for name in _SHAPE):
        return  # The encode stage has left out what does not fit in the shape that all entries share.
    for split in SPLITS:
        examples = load_encoded(ENCODED_DIR, split).examples()
        length, place = max((_longest_view(example, entry), place) for place, example in enumerate(examples))
        if length > room:
            raise ValueError(
                f"curriculum.{entry.name}: row {place} of {split} takes {length} columns with its {', '.join(_SHAPE)},"
                f" wanted at most the model's {room} positions;"
                " take fewer thoughts, or set them in `latent`, so that longer examples are left out"
            )


def _longest_view(row: EncodedExample, entry: Entry) -> int:
    """Columns of the longest view of an example that this entry shows."""
    stages = range(entry.latent.max_latent_stage + 2) if entry.latent.uniform_prob else [entry.latent_stage]
    plans = [plan_view(entry.method, stage, entry.latent) for stage in stages]
    num_tokens = [
        plan.num_latents + 2 * plan.markers + sum(map(len, row.steps_ids[plan.num_dropped_steps :])) for plan in plans
    ]
    return len(row.question_ids) + max(num_tokens) + len(row.answer_ids)


def _check_outputs(trainer: Trainer, entry: Entry, num_bytes_of_states: int) -> None:
    """Find out now, and not after hours, that the outputs could not be written."""
    output_dir = OUTPUTS_DIR / entry.name
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OSError(f"{output_dir}: cannot be written ({error}), wanted a folder of yours; {_WRITABLE}") from error
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trainer.parameters.values())
    # Weights, two moments and perhaps the best weights; two states lie side by side, and a third while it is written.
    num_copies = 4 if entry.train.select == "best" else 3
    is_finished = trainer.position.epoch >= trainer.num_epochs
    to_save = 0 if is_finished else max(0, 3 * num_copies * num_bytes - num_bytes_of_states)
    check_free_space({resume_dir(): to_save, output_dir: 3 * num_bytes})


def _pass_gate(trainer: Trainer, entry: Entry) -> None:
    accuracy = trainer.position.history[-1]["valid_accuracy"]
    if entry.train.select == "best":
        accuracy = trainer.position.best_accuracy
    if entry.min_accuracy is not None and accuracy < entry.min_accuracy:
        raise ValueError(
            f"curriculum.{entry.name}.min_accuracy: validation accuracy {accuracy:.4g}, wanted at least"
            f" {entry.min_accuracy:g}, so that no time is spent on what follows it; lower min_accuracy (the finished"
            " training is kept and taken from there), or train this entry better"
        )


def write_outputs(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, params: Params) -> None:
    """Write `checkpoint/`, `history.csv` and `train.json` of an entry, which DVC then takes over.

    Raises:
        OSError: if one of them cannot be written.
    """
    entry = trainer.entry
    output_dir, weights_dir = OUTPUTS_DIR / entry.name, checkpoint_dir(entry.name)
    meta = CheckpointMeta.of(
        entry.method,
        entry.latent_stage,
        entry.latent,
        prompt=params.encode.prompt,
        num_removed_tokens=trainer.num_removed_tokens_so_far,
        num_removed_at_end=trainer.num_removed_tokens,
    )
    history_path, summary_path = output_dir / "history.csv", output_dir / "train.json"
    try:
        save_checkpoint(weights_dir, trainer.model, tokenizer, meta)
        save_feedback(weights_dir, trainer.feedback)
        if not entry.train.reset_optimizer:
            save_file(trainer.optimizer_state(), weights_dir / OPTIMIZER_FILE)
            (weights_dir / OPTIMIZER_FILE).chmod(0o644)
        for path in (history_path, summary_path):
            path.unlink(missing_ok=True)  # It may be linked into DVC's cache, which must not be written to.
        write_history(history_path, trainer.position.history)
        summary_path.write_text(json.dumps(trainer.summary(), indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{output_dir}: cannot be written ({error}); the finished training is kept in {resume_dir()}: {_WRITABLE}"
        ) from error
