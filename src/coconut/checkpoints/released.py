"""Checkpoints that others released: how they are prompted, fed back and read, and where their thought's network lies.

A folder with a `coconut.json` says it itself. Others are known by their id on the hub.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from coconut.checkpoints.meta import META_FILE, CheckpointMeta, read_meta
from coconut.checkpoints.tensors import check_header
from coconut.checkpoints.weights import PROJECTOR, weight_files
from coconut.config.schema import LatentConfig

_PARTS = {"1": "inner", "3": "outer", "4": "norm"}
"""Places in the authors' sequence of modules; 0 is a dropout and 2 the GELU."""


def _paper(c_thought: int, max_latent_stage: int, thought: str) -> LatentConfig:
    return LatentConfig(
        c_thought, max_latent_stage, True, True, uniform_prob=0.0, thought=thought, parallel_iterations=0
    )


KNOWN: Mapping[str, CheckpointMeta] = {
    "ModalityDance/latent-tts-coconut": CheckpointMeta.of("coconut", 3, _paper(2, 3, "hidden[-1]"), prompt="plain"),
    "ModalityDance/latent-tts-codi": CheckpointMeta.of(
        "coconut", 6, _paper(1, 6, "projector"), prompt="bare", answer="last_number"
    ),
}
"""By id on the hub. Source: the code that was released with them (LatentTTS), read at commit 6657f20."""


def find_meta(model: str, folder: Path) -> CheckpointMeta | None:
    """Say how a model was trained: by its own `coconut.json`, or by what is known of its id; None for any other.

    Args:
        model: as `params.yaml` names it.
        folder: where its files lie.

    Raises:
        ValueError: its `coconut.json` is damaged.
    """
    return read_meta(folder) if (folder / META_FILE).is_file() else KNOWN.get(model)


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
                if name.startswith(PROJECTOR):
                    number, _, kind = name.removeprefix(PROJECTOR).partition(".")
                    found[f"finish.{_PARTS.get(number, number)}.{kind}"] = file.get_tensor(name)
    return found
