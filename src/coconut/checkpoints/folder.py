"""Checkpoint folders and the models in them: load, save, add the markers, apply the output head.

A checkpoint is a plain Hugging Face folder; what the method needs beside it stands in `coconut.json`.

Legend: B rows, T columns, D hidden, V vocabulary.
"""

import dataclasses
import json
import shutil
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from loguru import logger
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from coconut.checkpoints.meta import CheckpointMeta
from coconut.data.tokenizer import load_tokenizer

META_FILE = "coconut.json"


def load_checkpoint(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, CheckpointMeta | None]:
    """Load a checkpoint, or any Hugging Face folder, in evaluation mode.

    Returns:
        (model, tokenizer, meta): meta is None where the folder has no `coconut.json`.

    Raises:
        ValueError: if weights, tokenizer or `coconut.json` are missing or damaged.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder, wanted a checkpoint; correct the path, or let `dvc repro` make the checkpoint"
        )
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=dtype)
    meta = _read_meta(folder / META_FILE) if (folder / META_FILE).is_file() else None
    return typing.cast(PreTrainedModel, model.to(device)), tokenizer, meta


def save_checkpoint(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, meta: CheckpointMeta | None
) -> None:
    """Write a folder that plain `from_pretrained` opens; the same inputs give the same bytes.

    Everything is written beside the folder first and moved into place at the end, so that an old
    checkpoint stays until the new one is whole, and a file that DVC linked into its cache is
    replaced, never written through.

    Raises:
        OSError: if the folder cannot be written.
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
            text = json.dumps(dataclasses.asdict(meta), indent=2)
            (partial / META_FILE).write_text(text + "\n", encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which other users of a DVC cache cannot read.
        if folder.is_dir():
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder}: cannot be written ({error}); free disk space or mend the permissions of {folder.parent}"
        ) from error


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the weights of a Hugging Face folder as a causal language model, in evaluation mode.

    A classification head is dropped with a warning. A language-model head that is missing becomes
    a copy of the input embeddings, with a warning. Anything else that is missing is an error.
    """
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # They come back in the report, and are refused in our words.
            )
    except SafetensorError as error:
        raise ValueError(
            f"{folder}: its safetensors file is damaged or cut short ({error}); fetch or write the folder again"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, StrictDataclassError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{folder}: cannot be loaded as a decoder-only language model: {reason};"
            " wanted config.json and whole safetensors weights of a family that AutoModelForCausalLM knows"
        ) from error
    for name, found, wanted in report["mismatched_keys"]:
        raise ValueError(
            f"{folder}: {name} has shape {tuple(found)} in the weights, wanted {tuple(wanted)} by config.json;"
            " weights and config are of different models; fetch the folder again"
        )
    _settle_head(model, folder, missing=set(report["missing_keys"]), unexpected=set(report["unexpected_keys"]))
    model.eval()
    return typing.cast(PreTrainedModel, model)


def _settle_head(model: PreTrainedModel, folder: Path, *, missing: set[str], unexpected: set[str]) -> None:
    """Judge the difference between a folder's weights and the causal language model's."""
    head = model.get_output_embeddings()
    head_names = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if module is head
        for name, _ in module.named_parameters()
    }
    if missing - head_names:
        names = sorted(missing - head_names)
        raise ValueError(
            f"{folder}: its weights lack {len(names)} tensors of a {type(model).__name__}, {names[0]} among them;"
            " wanted all of them; fetch or write the folder again"
        )
    if unexpected:
        names = sorted(unexpected)
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        logger.warning(
            "{}: loaded as {}; dropped weights it has no place for: {}", folder, type(model).__name__, listed
        )
    if missing:
        with torch.no_grad():
            head.weight.copy_(model.get_input_embeddings().weight)
            if getattr(head, "bias", None) is not None:
                head.bias.zero_()
        logger.warning(
            "{}: has no language-model head; it starts as a copy of the input embeddings and has to be trained", folder
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own reports and bars off the terminal: what matters is said in our words."""
    verbosity, shows_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()


# --- files ----------------------------------------------------------------------------------


def _drop_traces_of_loading(config_path: Path) -> None:
    """Take out of a tokenizer's config how it was loaded, which would make equal tokenizers differ in bytes."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _read_meta(path: Path) -> CheckpointMeta:
    wanted = typing.get_type_hints(CheckpointMeta)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; restore the checkpoint") from None
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        keys = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: found {keys}, wanted exactly the keys {sorted(wanted)}; restore the checkpoint")
    for key, kind in wanted.items():
        if type(found[key]) is not kind:
            raise ValueError(f"{path}: {key}: found {found[key]!r}, wanted {kind.__name__}; restore the checkpoint")
    return CheckpointMeta(**found)
