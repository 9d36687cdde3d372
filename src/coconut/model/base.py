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
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from loguru import logger
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from coconut.data.examples import MARKERS
from coconut.data.tokenizer import load_tokenizer
from coconut.model.meta import CheckpointMeta

META_FILE = "coconut.json"
_CHECK_COLUMNS = 8
_CHECK_TOLERANCE = 1e-4


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


# --- the output head ------------------------------------------------------------------------


def num_positions(model: PreTrainedModel) -> int:
    """Columns that the model can tell apart; a very large number where it has no such limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Turn hidden states after the final norm (..., D) into logits (..., V), as the model itself does.

    Beside the head some families scale the logits (Cohere, Granite) or cap them (Gemma 2);
    `check_supported` finds out whether that is all that this model does.
    """
    logits: Tensor = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None) is not None:
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


@torch.no_grad()
def check_supported(model: PreTrainedModel) -> None:
    """Check that embeddings, body, cache and head, used one by one, give the model's own logits.

    The model reads a few tokens at once; then its body reads their embeddings in two passes over
    one key-value cache, as thoughts require, and `output_logits` follows. This finds models that
    read in both directions, keep their past elsewhere, or do more after the body than we know of.

    Raises:
        ValueError: naming the model's class and what differs.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    # A model with fewer positions than that is a matter of its data, which `encode` judges.
    num_columns = min(_CHECK_COLUMNS, num_positions(model))
    ids_BT = torch.arange(num_columns, device=model.device)[None] % config.vocab_size
    was_training = model.training
    model.eval()
    try:
        wanted_BTV = model(input_ids=ids_BT, use_cache=False).logits
        found_BTV = output_logits(model, _read_in_two_passes(model, ids_BT))
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"model: {name} cannot be read in passes over a key-value cache ({error});"
            " wanted a decoder-only model with attention in every layer"
        ) from error
    finally:
        model.train(was_training)
    if not wanted_BTV.isfinite().all():
        raise ValueError(f"model: the logits of {name} are not finite; its weights are damaged, fetch them again")
    difference = (wanted_BTV - found_BTV).abs().max().item()
    if difference > _CHECK_TOLERANCE * max(1.0, wanted_BTV.abs().max().item()):
        raise ValueError(
            f"model: read in two passes over a key-value cache, {name} gives logits that differ by {difference:.2g}"
            " from those of one pass; wanted a decoder-only model with causal attention in every layer"
            " and a head that is a linear map, scaled or capped at most"
        )


def _read_in_two_passes(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    embeds_BTD = model.get_input_embeddings()(ids_BT)
    columns_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    cut = ids_BT.shape[1] // 2
    hidden_parts = [
        model.base_model(
            inputs_embeds=embeds_BTD[:, columns],
            position_ids=columns_BT[:, columns],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        for columns in (slice(0, cut), slice(cut, None))
    ]
    return torch.cat(hidden_parts, dim=1)


# --- markers --------------------------------------------------------------------------------


def add_markers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and embeddings the three markers; those that are there already stay as they are.

    Rows that no token had used start as copies of the row of `<<`, or of the mean row where that is not
    one token. The embeddings grow if they must (Qwen's have rows to spare) and never shrink.

    Source: Hao et al. 2024 (arXiv:2412.06769), the authors' code.
    """
    from tokenizers import AddedToken

    known_ids = tokenizer.get_vocab()
    num_known = max(known_ids.values()) + 1
    new_markers = [marker for marker in MARKERS if marker not in known_ids]
    tokenizer.add_tokens([AddedToken(marker, normalized=False, special=True) for marker in new_markers], True)
    marker_ids = tokenizer.convert_tokens_to_ids(new_markers)
    num_rows = model.get_input_embeddings().weight.shape[0]
    num_needed = max([num_known, *(index + 1 for index in marker_ids)])
    if num_needed > num_rows:
        # It draws the new rows first; they are overwritten, but the draws would move every later one.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(num_needed, mean_resizing=False)
    new_rows = sorted({*marker_ids, *range(num_rows, num_needed)})
    like = tokenizer.encode("<<", add_special_tokens=False)
    has_like = len(like) == 1 and like[0] != tokenizer.unk_token_id
    source = slice(like[0], like[0] + 1) if has_like else slice(0, min(num_known, num_rows))
    for rows in _vocabulary_rows(model):
        rows[new_rows] = rows[source].mean(dim=0)


def _vocabulary_rows(model: PreTrainedModel) -> list[Tensor]:
    """Every tensor with one row per token: input embeddings, the head's weight unless tied, its bias."""
    weight: Tensor = model.get_input_embeddings().weight.data
    head: Any = model.get_output_embeddings()
    tensors = [weight]
    if head.weight.data_ptr() != weight.data_ptr():
        tensors.append(head.weight.data)
    if getattr(head, "bias", None) is not None:
        tensors.append(head.bias.data)
    return tensors


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
