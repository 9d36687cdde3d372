"""Checkpoints that others released: how they are prompted, fed back and read, and where their thought's network lies.

A folder with a `coconut.json` says it itself. Others are known by their id on the hub.
"""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from coconut.checkpoints.meta import META_FILE, CheckpointMeta, read_meta
from coconut.checkpoints.tensors import check_header
from coconut.checkpoints.weights import PROJECTOR, weight_files
from coconut.config.methods import asking_keys, find_methods
from coconut.config.schema import LatentConfig

_PARTS = {"1": "inner", "3": "outer", "4": "norm"}
"""Places in the authors' sequence of modules; 0 is a dropout and 2 the GELU."""


def find_released(model: str) -> CheckpointMeta | None:
    """Say how a model of the hub was trained that some method knows by its id; None for any other."""
    for name, method in find_methods().items():
        if model in method.released:
            released = method.released[model]
            latent = LatentConfig(
                released.c_thought,
                released.max_latent_stage,
                pad_latent_to_max=True,
                markers=True,
                uniform_prob=0.0,
                thought=released.thought,
                parallel_iterations=0,
            )
            keys = asking_keys(method, released.keys)
            return CheckpointMeta.of(
                name, released.latent_stage, latent, prompt=released.prompt, answer=released.answer, keys=keys
            )
    return None


def find_meta(model: str, folder: Path) -> CheckpointMeta | None:
    """Say how a model was trained: by its own `coconut.json`, or by what is known of its id; None for any other.

    Args:
        model: as `params.yaml` names it.
        folder: where its files lie.

    Raises:
        ValueError: its `coconut.json` is damaged.
    """
    return read_meta(folder) if (folder / META_FILE).is_file() else find_released(model)


def read_projector(folder: Path) -> dict[str, Tensor]:
    """Read the thought's network that lies among a released model's weights, by our names; empty if there is none.

    Raises:
        ValueError: a file of weights is damaged.
    """
    found = {}
    for path in weight_files(folder):
        check_header(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                wrapper, found_here, place = name.rpartition(PROJECTOR)
                if found_here and wrapper[-1:] in ("", "."):
                    number, _, kind = place.partition(".")
                    found[f"finish.{_PARTS.get(number, number)}.{kind}"] = file.get_tensor(name)
    return found
