"""The outputs of a trained entry: room for them, the gate before them, and their writing."""

import json
import tempfile
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from coconut.checkpoints.card import CARD_FILE, describe_entry, write_card
from coconut.checkpoints.feedback import save_thought
from coconut.checkpoints.folder import save_checkpoint
from coconut.checkpoints.meta import CheckpointMeta, Prompt
from coconut.checkpoints.tensors import save_tensors
from coconut.files import check_free_space, cure_of, replace_file
from coconut.layout import OUTPUTS_DIR, checkpoint_dir, optimizer_file
from coconut.model.choice import noted_passes
from coconut.pipeline.resume import resume_dir
from coconut.shards import give_shards
from coconut.training.curve import updates_csv
from coconut.training.loop import Trainer
from coconut.training.position import history_csv

_CURE = "make room, fix its permissions or move away what stands in its place, and run `dvc repro` again"


def check_outputs(trainer: Trainer, num_bytes_of_states: int) -> int:
    """Find out now, and not after hours, that the outputs could not be written.

    Args:
        num_bytes_of_states: what the resume states that are there already take on the disk.

    Returns:
        The size of one resume state in bytes.

    Raises:
        OSError: naming the folder.
    """
    output_dir, train = OUTPUTS_DIR / trainer.entry.name, trainer.entry.train
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        cure = cure_of(error, _CURE)
        raise OSError(f"{output_dir}: cannot be written ({error}), wanted a folder of yours; {cure}") from error
    weights = trainer.learner.parameters.values()
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in weights)
    # Weights and two moments, and the best epoch's; two states lie on the disk, and a third while it is written.
    num_copies = 3 + (train.select == "best") * (1 if train.reset_optimizer else 3)
    to_save = 0 if trainer.is_finished else max(0, 3 * num_copies * num_bytes - num_bytes_of_states)
    check_free_space({resume_dir(): to_save, output_dir: 3 * num_bytes})
    return num_copies * num_bytes


def pass_gate(trainer: Trainer) -> None:
    """Stop before the outputs are written where the validation accuracy is below `min_accuracy`.

    Raises:
        ValueError: naming both.
    """
    entry, position = trainer.entry, trainer.position
    accuracy = position.history[-1]["valid_accuracy"]
    if entry.train.select == "best":
        accuracy = position.best_accuracy
    if entry.min_accuracy is not None and accuracy < entry.min_accuracy:
        raise ValueError(
            f"curriculum.{entry.name}.min_accuracy: validation accuracy {accuracy:.4g}, wanted at least"
            f" {entry.min_accuracy:g}, so that no time is spent on what follows it; lower min_accuracy (the finished"
            " training is kept and taken from there), or train this entry better"
        )


def write_outputs(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    versions: Mapping[str, str],
    peaks_mb: Sequence[float],
) -> None:
    """Write an entry's `checkpoint/`, optimizer state, `history.csv`, `updates.csv` and `train.json`.

    Every process calls it: the first one writes, and the others give it their parts of what is sharded.

    Args:
        prompt: the form of prompt that the entry was trained with.
        versions: of the libraries that trained it.
        peaks_mb: the largest memory of each of its processes.

    Raises:
        OSError: if one of them cannot be written.
    """
    entry, position, schedule = trainer.entry, trainer.position, trainer.schedule
    optimizer_state = {} if entry.train.reset_optimizer else trainer.learner.inherited_optimizer_state()
    model, thought = trainer.model, trainer.feedback.state_dict()
    if trainer.shards is not None:
        model, thought = trainer.shards.gather()
    if not trainer.ranks.is_main:
        give_shards(optimizer_state)
        return
    output_dir, weights_dir = OUTPUTS_DIR / entry.name, checkpoint_dir(entry.name)
    meta = CheckpointMeta.of_entry(entry, prompt=prompt, state=schedule.state_at(position.update))
    try:
        save_checkpoint(weights_dir, model, tokenizer, meta)
        save_thought(weights_dir, thought)
        card = write_card(entry.name, meta, tokenizer, training=describe_entry(entry))
        replace_file(weights_dir / CARD_FILE, card)
        save_tensors(optimizer_state, optimizer_file(entry.name))
        replace_file(output_dir / "history.csv", history_csv(position.history))
        replace_file(output_dir / "updates.csv", updates_csv(position.curve.points, position.curve.names))
        replace_file(output_dir / "train.json", json.dumps(_summary(trainer, versions, peaks_mb), indent=2) + "\n")
    except OSError as error:
        raise OSError(
            f"{output_dir}: cannot be written ({error}); the finished training is kept in {resume_dir()}:"
            f" {cure_of(error, _CURE)}"
        ) from error


def _summary(trainer: Trainer, versions: Mapping[str, str], peaks_mb: Sequence[float]) -> dict[str, object]:
    """Collect what `train.json` says: seconds, updates, memory in MB, load of the machine, passes and versions."""
    loads = [row["load"] for row in trainer.position.history]
    return {
        "train_seconds": round(trainer.watch.seconds, 3),
        "train_cpu_seconds": round(trainer.watch.cpu_seconds, 3),
        "train_load": round(sum(loads) / len(loads), 3),
        "train_updates": trainer.position.update,
        "peak_memory_mb": round(max(peaks_mb), 1),
        "peak_memory_mb_of_processes": [round(peak_mb, 1) for peak_mb in peaks_mb],
        "micro_batch": trainer.objective.micro_batch,
        "train_oom_retries": trainer.num_oom_retries,
        "passes": _passes(trainer),
        "versions": dict(versions),
    }


def _passes(trainer: Trainer) -> str:
    """Say how batches were read, and why."""
    if trainer.shards is not None:
        return "plain: runtime.sharding"
    return noted_passes(trainer.model) if trainer.runtime.fast else "plain: runtime.fast is off"
