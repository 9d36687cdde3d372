"""The weights of a trained thought, beside a checkpoint's."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from coconut.model.feedback import Feedback, build_feedback

WEIGHTS_FILE = "thought.safetensors"


# --- files ----------------------------------------------------------------------------------


def save_feedback(folder: Path, feedback: Feedback) -> None:
    """Write the trained weights beside a checkpoint's; nothing for forms that have none."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in feedback.state_dict().items()}
    if tensors:
        save_file(tensors, folder / WEIGHTS_FILE)
        (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors writes 0600, which other users of a cache cannot read.


def load_feedback(
    folder: Path, thought: str, model: PreTrainedModel, *, parallel_iterations: int = 0, seed: int | None = None
) -> Feedback:
    """Build the feedback that `thought` names, with the trained weights of a checkpoint folder.

    Args:
        seed: what to draw fresh weights from if the folder has none; without it that is an error.

    Raises:
        ValueError: as `build_feedback`, or if weights are missing, damaged, or those of another model.
    """
    feedback = build_feedback(thought, model, parallel_iterations=parallel_iterations, seed=seed or 0)
    wanted, path = feedback.state_dict(), folder / WEIGHTS_FILE
    if not wanted or (seed is not None and not path.is_file()):
        return feedback
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: the weights of thought {thought!r} cannot be read ({error}); restore the checkpoint"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
        raise ValueError(f"{path}: found {shapes}, not the weights of thought {thought!r} with this model; restore it")
    feedback.load_state_dict(found)
    return feedback
