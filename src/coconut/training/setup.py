"""A trainer put together: the parent's model, the encoded data, the validation, the parent's optimizer state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut.checkpoints.feedback import load_feedback
from coconut.checkpoints.folder import load_checkpoint
from coconut.checkpoints.meta import META_FILE, CheckpointMeta, read_meta
from coconut.checkpoints.tensors import RESTORE, read_tensors
from coconut.config.methods import blaming_method, build_method
from coconut.config.schema import BASE, Entry, Params
from coconut.config.thought import check_layers, parse_thought
from coconut.data.encoded import EncodedSet, load_encoded
from coconut.data.examples import Example, read_examples
from coconut.data.layouts import Layout, common_layouts
from coconut.data.tokenizer import load_tokenizer
from coconut.data.views import ViewWriter, reasoning_ids
from coconut.devices import build_accelerator, compute_dtype_of, ranks_of
from coconut.evaluation.evaluator import Evaluator
from coconut.layout import ENCODED_DIR, EXAMPLES_DIR, checkpoint_dir, optimizer_file
from coconut.methods import State
from coconut.model.feedback import Feedback
from coconut.model.head import num_positions
from coconut.model.passes import PassOptions
from coconut.ranks import Ranks
from coconut.training.learner import Learner
from coconut.training.loop import Trainer
from coconut.training.optimizer import fits_optimizer
from coconut.training.position import Score

if TYPE_CHECKING:
    from coconut.training.sharding import Shards


def set_up(params: Params, entry: Entry) -> tuple[Trainer, PreTrainedTokenizerBase]:
    """Everything that the training of an entry needs, from the files that other stages have left.

    Raises:
        ValueError: if a file is missing or damaged, or the model cannot do what the curriculum asks for.
    """
    accelerator = build_accelerator(params.runtime, entry.train.precision)
    folder = checkpoint_dir(entry.parent)
    dtype = torch.bfloat16 if entry.train.precision == "bf16-weights" else torch.float32
    shards: Shards | None = None
    if params.runtime.sharding != "none" and accelerator.num_processes > 1:
        tokenizer, meta = load_tokenizer(folder), read_meta(folder) if (folder / META_FILE).is_file() else None
        shards = _load_shards(params, entry, accelerator, meta, dtype)
        model = shards.model
    else:
        model, tokenizer, meta = load_checkpoint(folder, device=str(accelerator.device), dtype=dtype)
    if meta is None and entry.parent != BASE:
        raise ValueError(f"{folder / META_FILE}: no such file, but {entry.parent} was trained; {RESTORE}")
    check_curriculum(params, model, ViewWriter.of(tokenizer))
    check_room_for_answers(params)
    trainer = _build_trainer(params, entry, accelerator, model, tokenizer, meta, shards)
    if shards is not None and trainer.objective.modules is not None:
        raise ValueError(
            f"runtime.sharding: found {shards.kind} with method {entry.method}, which trains a module beside the model,"
            " wanted none"
        )
    if not entry.train.reset_optimizer:
        _take_over_optimizer_state(trainer.learner, entry)
    return trainer, tokenizer


def _build_trainer(
    params: Params,
    entry: Entry,
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parent: CheckpointMeta | None,
    shards: "Shards | None",
) -> Trainer:
    feedback = _load_feedback(params, entry, model, parent) if shards is None else shards.feedback
    evaluator = Evaluator(
        model,
        feedback,
        tokenizer,
        _layout(entry),
        max_new_tokens=params.evaluate.max_new_tokens,
        batch_size=params.runtime.eval_batch,
        autocast=accelerator.autocast,
        options=PassOptions(fast=params.runtime.fast and shards is None),
        # Layers that are gathered when a pass reaches them must be reached by all processes, with the same rows.
        ranks=Ranks() if shards is not None and shards.kind == "pass" else ranks_of(accelerator),
    )
    evaluator.in_step = evaluator.ranks.count < accelerator.num_processes
    trainer = Trainer(
        entry=entry,
        model=model,
        feedback=feedback,
        dataset=load_encoded(ENCODED_DIR, "train"),
        writer=evaluator.writer,
        pad_id=evaluator.pad_id,
        seed=params.seed,
        runtime=params.runtime,
        accelerator=accelerator,
        validation=EntryValidation(
            entry,
            evaluator,
            load_encoded(ENCODED_DIR, "valid", entry.train.validate_examples),
            read_examples(EXAMPLES_DIR / "valid.jsonl"),
            shards,
        ),
        shards=shards,
        parent_state={} if parent is None else parent.state,
    )
    evaluator.poll = trainer.poll
    return trainer


def _load_shards(
    params: Params, entry: Entry, accelerator: Accelerator, parent: CheckpointMeta | None, dtype: torch.dtype
) -> "Shards":
    """Load the parent's weights in parts.

    Raises:
        ValueError: if the entry asks for what sharded weights do not do, or a file is missing or damaged.
    """
    from coconut.training.sharding import load_sharded  # Here, because importing it takes part of a second.

    kind = params.runtime.sharding
    assert kind != "none", "asked for by the caller"
    if entry.train.optimizer != "adamw":
        raise ValueError(f"runtime.sharding: {kind} needs train.optimizer adamw, found {entry.train.optimizer}")
    if kind == "pass" and entry.latent.parallel_iterations:
        raise ValueError(
            "runtime.sharding: pass needs parallel_iterations 0, since the rounds of its thoughts differ from process"
            f" to process; found {entry.latent.parallel_iterations}, which goes with `update`"
        )
    load_thought = partial(_load_feedback, params, entry, parent=parent)
    ranks, compute_dtype = ranks_of(accelerator), compute_dtype_of(accelerator)
    return load_sharded(checkpoint_dir(entry.parent), load_thought, ranks, kind, dtype, compute_dtype)


def _load_feedback(params: Params, entry: Entry, model: PreTrainedModel, parent: CheckpointMeta | None) -> Feedback:
    # Where the parent trained a network of its own, fresh weights in its place would be a silent loss.
    parent_has_weights = parent is not None and parse_thought(parent.thought).has_weights
    return load_feedback(
        checkpoint_dir(entry.parent),
        entry.latent.thought,
        model,
        parallel_iterations=entry.latent.parallel_iterations,
        seed=None if parent_has_weights else params.seed,
    )


def _layout(entry: Entry, state: State | None = None) -> Layout:
    """Return the layout in which the entry's questions are asked."""
    with blaming_method(entry.method, "lay out a question"):
        return build_method(entry).layout(entry.latent_stage, state=state)


@dataclass
class EntryValidation:
    """Loss and accuracy of the entry's layout on the validation split."""

    entry: Entry
    evaluator: Evaluator
    dataset: EncodedSet
    examples: Sequence[Example]
    shards: "Shards | None" = None

    @property
    def num_oom_retries(self) -> int:
        return self.evaluator.num_oom_retries

    def score(self, state: State) -> Score:
        model = self.evaluator.model
        self.evaluator.layout = _layout(self.entry, state)
        was_training = model.training
        model.eval()
        score = self._read() if self.shards is None else self.shards.read_whole(self._read)
        model.train(was_training)
        return score

    def _read(self) -> Score:
        outcomes = self.evaluator.outcomes(self.dataset, self.examples)
        accuracy = sum(outcome.right for outcome in outcomes) / max(1, len(outcomes))
        return Score(self.evaluator.loss(self.dataset), accuracy)


def _take_over_optimizer_state(learner: Learner, entry: Entry) -> None:
    path: Path = optimizer_file(entry.parent)
    state = read_tensors(path, "the parent's optimizer state")
    if state and fits_optimizer(learner.optimizer, state):
        learner.take_over(state, place=str(path))
    elif state:
        logger.warning("{}: of another optimizer than {}; the optimizer starts fresh", path, entry.train.optimizer)
    elif entry.parent != BASE:
        logger.warning("{}: empty, the parent kept no optimizer state; the optimizer starts fresh", path)


def check_curriculum(params: Params, model: PreTrainedModel, writer: ViewWriter) -> None:
    """Find out now, and not after hours of training, what this model cannot do for the curriculum.

    Raises:
        ValueError: if any entry names a layer that the model lacks or words that its vocabulary lacks, or if its
            rows have more columns than the model has positions.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, entry in params.curriculum.items():
        try:
            check_layers(entry.latent.thought, num_layers)
            build_method(entry).check_model(num_layers)
            _check_fits(params, entry, num_positions(model), writer)
        except ValueError as error:
            raise ValueError(f"curriculum.{name}.{error}") from None


def check_room_for_answers(params: Params) -> None:
    """Find out now whether `max_new_tokens` holds the gold texts: a text that is cut off counts as wrong.

    Raises:
        ValueError: if not even the answers fit, so that no question of the validation split can be answered.
    """
    most, split = params.evaluate.max_new_tokens, load_encoded(ENCODED_DIR, "valid")
    answers = [len(row.answer_ids) - 1 for row in split.examples()]  # The end of the text need not be written.
    if min(answers) > most:
        raise ValueError(
            f"evaluate.max_new_tokens: found {most}, but the answers of the validation split take {min(answers)} to"
            f" {max(answers)} tokens, their mark included; wanted at least {max(answers)}, more where steps are said"
        )
    for name, entry in params.curriculum.items():
        layout = _layout(entry)
        lengths = [
            len(reasoning_ids(row.steps_ids, layout)) + length
            for row, length in zip(split.examples(), answers, strict=True)
        ]
        num_cut = sum(length > most for length in lengths)
        if num_cut:
            logger.warning(
                "curriculum.{}: evaluate.max_new_tokens {} cuts off {} of {} gold texts of the validation split, the"
                " longest of which takes {}: such an answer counts as wrong",
                *(name, most, num_cut, len(lengths), max(lengths)),
            )


def _check_fits(params: Params, entry: Entry, room: int, writer: ViewWriter) -> None:
    """Raise a ValueError unless all rows fit; the message begins with a key."""
    with blaming_method(entry.method, "say its layouts"):
        layouts = build_method(entry).training_layouts()
    if all(any(common.covers(layout) for common in common_layouts(params.latent)) for layout in layouts):
        return  # The encode stage has left out what does not fit in the layouts that all entries share.
    for split in ("train", "valid"):
        dataset = load_encoded(ENCODED_DIR, split)
        for layout in layouts:
            writer.answer_ids(dataset.rows([0])[0], layout)
        lengths = (writer.longest(example, layouts, is_prompt=split != "train") for example in dataset.examples())
        length, place = max((length, place) for place, length in enumerate(lengths))
        if length > room:
            raise ValueError(
                f"method: row {place} of {split} takes {length} columns in a layout of method {entry.method}, wanted at"
                f" most the model's {room} positions; take fewer thoughts (c_thought, max_latent_stage, num_thoughts),"
                " or set these in the section `latent`, by which longer examples are left out"
            )
