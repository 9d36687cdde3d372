"""The weights of a trained thought, next to a checkpoint's."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from coconut.checkpoints.released import read_projector
from coconut.checkpoints.tensors import RESTORE, read_tensors, save_tensors
from coconut.model.feedback import Feedback, build_feedback

WEIGHTS_FILE = "thought.safetensors"


def save_feedback(folder: Path, feedback: Feedback) -> None:
    """Write the trained weights next to a checkpoint's; nothing for forms that have none."""
    save_thought(folder, feedback.state_dict())


def save_thought(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the weights of a feedback; see `save_feedback`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if tensors:
        save_tensors(tensors, folder / WEIGHTS_FILE)


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
    if not wanted:
        return feedback
    # A released model holds them among its own weights.
    found = {} if path.is_file() or not (folder / "config.json").is_file() else read_projector(folder)
    if not found and not path.is_file() and seed is not None:
        return feedback
    found = found or read_tensors(path, f"the weights of thought {thought!r}")
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wanted_shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if shapes != wanted_shapes:
        raise ValueError(
            f"{path}: found {str(shapes)[:300]}, not the weights of thought {thought!r} with this model, wanted"
            f" {wanted_shapes}; {RESTORE}"
        )
    for name, tensor in found.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            found_values = "that are not finite" if tensor.is_floating_point() else f"of type {tensor.dtype}"
            raise ValueError(
                f"{path}: {name}: found values {found_values}, wanted finite floating-point ones; {RESTORE}"
            )
    feedback.load_state_dict(found)
    return feedback
