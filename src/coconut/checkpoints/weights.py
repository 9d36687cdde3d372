"""The model in a Hugging Face folder: what its `config.json` may ask for, and its weights."""

import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from coconut.checkpoints.tensors import RESTORE, check_header, read_dtypes
from coconut.checkpoints.wrappers import find_wrapper
from coconut.config.messages import first_line
from coconut.data.documents import decode_text, parse_json
from coconut.devices import total_memory
from coconut.files import amount

PROJECTOR = "projector."
"""Of a released model: names of the weights of its thought's network, which lie among the model's own."""
_MAX_LAYERS = 1_000
_FETCH = "fetch or write the folder again"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint folder.

    Raises:
        ValueError: if the file is missing, no JSON, nested too deeply, or holds something else.
    """
    try:
        found = parse_json(decode_text(path.read_bytes(), path))
    except OSError as error:
        raise ValueError(f"{path}: found no file to read ({error.strerror}), wanted a JSON object; {_FETCH}") from None
    except ValueError as error:
        text = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: found no usable JSON ({text}), wanted a JSON object; {_FETCH}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found {type(found).__name__}, wanted a JSON object; {_FETCH}")
    return found


# --- config.json ----------------------------------------------------------------------------


def read_config(folder: Path) -> PretrainedConfig:
    """Read `config.json`, and refuse what this project cannot load or must not obey.

    Raises:
        ValueError: if it is damaged, of an unknown family, describes quantised weights, or a model that is too
            large for this machine.
    """
    path = folder / "config.json"
    fields = read_json(path)
    _refuse_fields(fields, path)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read: {' '.join(str(error).split())[:600] or type(error).__name__};"
            " wanted valid JSON with a model_type that transformers knows, and its values;"
            " correct it, or fetch it again"
        ) from error
    # The code that computes attention is this project's choice: sdpa, or eager where a class has no sdpa.
    config._attn_implementation = None
    config._experts_implementation = None
    _check_size(config, path)
    return typing.cast(PretrainedConfig, config)


def _refuse_fields(fields: Mapping[str, Any], path: Path) -> None:
    """Refuse, here and in nested configs, what would be obeyed or cost hours before it was noticed."""
    for key, value in fields.items():
        if key in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method", "an unnamed method") if isinstance(value, Mapping) else value
            raise ValueError(
                f"{path}: {key}: found weights quantised with {method}, which cannot be trained; wanted weights in"
                " float32, float16 or bfloat16: take the model's unquantised folder or repository"
            )
        if key == "transformers_weights":
            raise ValueError(
                f"{path}: {key}: found {value!r:.80}, wanted weights under their usual names, model.safetensors or"
                " model.safetensors.index.json; take the key out and rename the file"
            )
        if "layer" in key and type(value) in (int, float) and value > _MAX_LAYERS:
            raise ValueError(f"{path}: {key}: found {value:g}, wanted at most {_MAX_LAYERS}; correct it, or {_FETCH}")
        if isinstance(value, Mapping):
            _refuse_fields(value, path)


def _check_size(config: PretrainedConfig, path: Path) -> None:
    """Build the model without its weights, and compare its size with the machine's memory."""
    text_config, memory = config.get_text_config(), total_memory()
    sizes = [getattr(text_config, name, None) for name in ("num_hidden_layers", "hidden_size")]
    # Thousands of wide layers take a minute to build, even without weights; each holds more than four such matrices.
    num_layers, width = (size if isinstance(size, int) else 0 for size in sizes)
    num_bytes = 16 * num_layers * width * width
    if num_bytes <= memory:
        with torch.device("meta"):
            model = build_model(config, path)
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if num_bytes > memory:
        raise ValueError(
            f"{path}: found sizes that make {num_bytes / 4e9:.1f} billion parameters or more, {amount(num_bytes)} in"
            f" float32, wanted at most this machine's memory, {amount(memory)}; take a smaller model, or"
            " correct the sizes"
        )


def build_model(config: PretrainedConfig, path: Path) -> PreTrainedModel:
    """Build the causal language model of a config, with random weights.

    Args:
        path: of the config, for the message.

    Raises:
        ValueError: if its family is no such model, or its sizes do not fit together.
    """
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ValueError(
            f"{path}: no decoder-only model can be built from it: {first_line(error)};"
            " wanted the config of a family that AutoModelForCausalLM knows, with sizes that fit together;"
            " correct it, or fetch it again"
        ) from error
    return typing.cast(PreTrainedModel, model)


# --- weights --------------------------------------------------------------------------------


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the weights of a Hugging Face folder as a causal language model, in evaluation mode.

    A classification head is dropped with a warning. A language-model head that is missing becomes
    a copy of the input embeddings, with a warning; one that differs from them stays, whatever the config says.
    Anything else that is missing is an error.

    Raises:
        ValueError: if config, weights or `generation_config.json` are missing, damaged or do not fit together.
    """
    config = read_config(folder)
    for path in weight_files(folder):
        check_header(path)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    renaming = _find_renaming(folder, config)
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                key_mapping=renaming or None,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # They come back in the report, and are refused in our words.
            )
    except Exception as error:
        raise ValueError(
            f"{folder}: cannot be loaded as a decoder-only language model: {first_line(error)};"
            " wanted config.json, whole safetensors weights and, if there is one, a generation_config.json of one"
            f" model; {_FETCH}"
        ) from error
    for name, found, wanted in report["mismatched_keys"]:
        raise ValueError(
            f"{folder}: {name} has shape {tuple(found)} in the weights, wanted {tuple(wanted)} by config.json;"
            f" weights and config are of different models; {_FETCH}"
        )
    _check_floating(model, folder)
    _settle_head(model, folder, missing=set(report["missing_keys"]), unexpected=set(report["unexpected_keys"]))
    _note_own_head(model, folder)
    _check_finite(model, folder)
    _check_end_of_text(model, folder)
    model.eval()
    return typing.cast(PreTrainedModel, model)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; an index may name only files next to it."""
    single, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index_path.is_file():
        return [single]
    weight_map = read_json(index_path).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names:
        raise ValueError(
            f"{index_path}: weight_map: found {weight_map!r:.60}, wanted tensor names with the files that hold"
            f" them; {_FETCH}"
        )
    for name in names:
        if re.search(r"[/\\\x00]", name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index_path}: weight_map: found the file {name!r:.80}, wanted the bare name of a .safetensors file"
                f" in the same folder; {_FETCH}"
            )
    return [folder / name for name in names]


def _find_renaming(folder: Path, config: PretrainedConfig) -> dict[str, str]:
    """Find what to take out of the weights' names because a wrapper put it there, and say so."""
    with torch.device("meta"):
        model = build_model(config, folder / "config.json")
    own = [*model.state_dict()]
    bare = [name.removeprefix(f"{model.base_model_prefix}.") for name in own]
    names: list[str] = []
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    renaming = find_wrapper(names, {*own, *bare})
    if renaming:
        parts = " and ".join(pattern.removeprefix("^").replace("\\", "") for pattern in renaming)
        logger.warning("{}: its weights are named as in a wrapper; taken out of their names: {}", folder, parts)
    return dict(renaming)


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
            f" wanted all of them; {_FETCH}"
        )
    if names := sorted(name for name in unexpected if PROJECTOR not in name):
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


def _note_own_head(model: PreTrainedModel, folder: Path) -> None:
    """Correct a config that ties a head of its own, which transformers loads untied but ties when rows are added."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is None or head.weight is embeddings.weight
    if is_tied or not model.config.tie_word_embeddings:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    logger.warning(
        "{}: its config has tie_word_embeddings: true, but its weights hold a head that differs from the input"
        " embeddings; the head is kept, and checkpoints say tie_word_embeddings: false",
        folder,
    )


_WHOLE_FLOATS = ("F64", "F32", "F16", "BF16")


def _check_floating(model: PreTrainedModel, folder: Path) -> None:
    """Refuse weights that are whole numbers, or floats of eight bits and fewer, in their file.

    As plain floats they would be read as something else: such weights have scales beside them.
    """
    # The file may name them with or without a prefix; a mask or a list of positions beside them is no weight.
    tails = {name.partition(".")[2] or name for name, _ in model.named_parameters()}
    tails |= {name for name, _ in model.named_parameters()}
    for path in weight_files(folder):
        for name, dtype in read_dtypes(path).items():
            if dtype not in _WHOLE_FLOATS and tails & {name, name.partition(".")[2]}:
                raise ValueError(
                    f"{path}: {name}: found weights of type {dtype}, wanted floating-point numbers (F32, F16 or BF16);"
                    f" the file is damaged, or quantised: {_FETCH}, or {RESTORE}"
                )


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"{folder}: {name}: found weights that are infinite or not a number, wanted finite ones;"
                f" the file is damaged, or a training went wrong: {_FETCH}"
            )


def _check_end_of_text(model: PreTrainedModel, folder: Path) -> None:
    """Check the ids that end a generated text, which `generation_config.json` or `config.json` names."""
    named = (folder / "generation_config.json").is_file()
    path = folder / ("generation_config.json" if named else "config.json")
    found = None if model.generation_config is None else model.generation_config.eos_token_id
    vocab_size = model.config.get_text_config().vocab_size
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(index) is int and 0 <= index < vocab_size for index in ids):
        raise ValueError(
            f"{path}: eos_token_id: found {found!r:.80}, wanted a token id from 0 to {vocab_size - 1}, or a list of"
            " them; correct it, or fetch the file again"
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
