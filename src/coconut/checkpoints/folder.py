"""Checkpoint folders: a plain Hugging Face folder each, with what the method needs in `coconut.json`."""

import difflib
import json
import shutil
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coconut.checkpoints.meta import META_FILE, CheckpointMeta, read_meta
from coconut.checkpoints.tensors import RESTORE
from coconut.checkpoints.weights import load_model, quiet_transformers
from coconut.data.tokenizer import load_tokenizer
from coconut.files import cure_of


def load_checkpoint(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, CheckpointMeta | None]:
    """Load a checkpoint, or any Hugging Face folder, in evaluation mode.

    Returns:
        (model, tokenizer, meta): meta is None where the folder has no `coconut.json`.

    Raises:
        ValueError: if weights, tokenizer or `coconut.json` are missing or damaged.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(_no_checkpoint(folder))
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=dtype)
    meta = read_meta(folder) if (folder / META_FILE).is_file() else None
    return typing.cast(PreTrainedModel, model.to(device)), tokenizer, meta


def save_checkpoint(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, meta: CheckpointMeta | None
) -> None:
    """Write a folder that plain `from_pretrained` opens; the same inputs give the same bytes.

    The files are written to a folder next to it, which then takes its place: an old checkpoint stays until
    the new one is whole, and a file that DVC linked into its cache is replaced, never written through.

    Raises:
        OSError: if the folder cannot be written.
        ValueError: if transformers refuses to save the model or the tokenizer.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with quiet_transformers():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        _drop_traces_of_loading(partial / "tokenizer_config.json")
        if meta is not None:
            text = json.dumps(meta.to_json(), indent=2)
            (partial / META_FILE).write_text(text + "\n", encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which other users of a DVC cache cannot read.
        if folder.is_dir():
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        cure = cure_of(error, f"free disk space or fix the permissions of {folder.parent}")
        raise OSError(f"{folder}: cannot be written ({error}); {cure}") from error


# --- files ----------------------------------------------------------------------------------


def _drop_traces_of_loading(config_path: Path) -> None:
    """Take out of a tokenizer's config how it was loaded, which would make equal tokenizers differ in bytes."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _no_checkpoint(folder: Path) -> str:
    """Say what is wrong with a path that is no checkpoint, and which one may have been meant."""
    if (folder / "checkpoint/config.json").is_file():
        return f"{folder}: found an entry's outputs, wanted its checkpoint; did you mean {folder / 'checkpoint'}?"
    if folder.is_dir():
        return f"{folder}: found a folder without config.json, wanted a checkpoint; correct the path, or {RESTORE}"
    found = "a file" if folder.exists() else "no such folder"
    missing = next((path for path in (folder, *folder.parents) if path.parent.is_dir()), folder)
    names = [path.name for path in missing.parent.iterdir()] if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, names, n=1)
    meant = missing.with_name(near[0]) / folder.relative_to(missing) if near and not missing.exists() else None
    question = f" did you mean {meant}?" if meant else " correct the path, or let `dvc repro` make the checkpoint"
    return f"{folder}: found {found}, wanted a checkpoint;{question}"
