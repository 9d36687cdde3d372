"""Where the starting weights come from: the hub, a local folder, or a seed and a `config.json`."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from loguru import logger
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from coconut.checkpoints.feedback import load_feedback, save_feedback
from coconut.checkpoints.folder import save_checkpoint
from coconut.checkpoints.markers import add_markers
from coconut.checkpoints.released import find_meta
from coconut.checkpoints.support import check_supported
from coconut.checkpoints.weights import build_model, load_model, quiet_transformers, read_config
from coconut.config.messages import first_line
from coconut.config.schema import Params
from coconut.data.examples import ANSWER_MARK, Example
from coconut.data.tokenizer import build_word_tokenizer, has_tokenizer, load_tokenizer
from coconut.files import check_free_space

HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a causal language model in safetensors needs. Folders inside the repository hold other formats.
_WANTED_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED_FILES = ["*/*", "consolidated*"]


def prepare_base(params: Params, examples: Iterable[Example], output_dir: Path) -> None:
    """Write the checkpoint that every curriculum starts from: weights, tokenizer, markers.

    Args:
        examples: read only when a tokenizer has to be built.

    Raises:
        ValueError: if `params.model` cannot be found, read, or used as a decoder-only model.
        OSError: if `output_dir` cannot be written.
    """
    folder = find_model(params.model, params.revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {folder} has no config.json; wanted a Hugging Face folder, or one with a config.json")
    if _has_weights(folder):
        tokenizer = load_tokenizer(folder)
        model = load_model(folder)
        logger.info("base: {} from {}, {}", type(model).__name__, folder, _size(model))
    else:
        tokenizer = _tokenizer_from_scratch(folder, examples)
        model = _random_model(folder, tokenizer, params.seed)
        logger.info("base: {} of {}, random weights from seed {}", type(model).__name__, _size(model), params.seed)
    check_supported(model)
    check_free_space({output_dir: sum(weight.numel() * weight.element_size() for weight in model.parameters())})
    meta = find_meta(params.model, folder)
    num_tokens = len(tokenizer)
    add_markers(model, tokenizer)
    logger.info("base: {} tokens, {} of them new", len(tokenizer), len(tokenizer) - num_tokens)
    feedback = None if meta is None else load_feedback(folder, meta.thought, model)
    save_checkpoint(output_dir, model, tokenizer, meta)
    if meta is not None and feedback is not None:
        save_feedback(output_dir, feedback)
        logger.info("base: trained before, by {} at stage {}, and scored so", meta.method, meta.latent_stage)
    _warn_of_other_tokenizer(output_dir, tokenizer)


def _warn_of_other_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so where `AutoTokenizer` goes by the model's family and overrides what the folder says (Qwen 2)."""
    with quiet_transformers():
        opened = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if type(opened) is not type(tokenizer):
        logger.warning(
            "base: plain AutoTokenizer would read {} as {}; outside this project, open it with {}",
            folder,
            type(opened).__name__,
            "PreTrainedTokenizerFast.from_pretrained",
        )


def _has_weights(folder: Path) -> bool:
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return True
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
    if pickles:
        raise ValueError(
            f"model: {folder} has its weights only as {pickles[0]}, which can run code when opened;"
            " wanted model.safetensors; convert them elsewhere, in an environment that you trust: python -c"
            ' "from transformers import AutoModelForCausalLM as M;'
            f" M.from_pretrained('{folder}').save_pretrained('OUT')\";"
            " or choose a revision that has it"
        )
    return False


def _size(model: PreTrainedModel) -> str:
    return f"{model.num_parameters() / 1e6:.2f} M parameters"


# --- from scratch ---------------------------------------------------------------------------


def _tokenizer_from_scratch(folder: Path, examples: Iterable[Example]) -> PreTrainedTokenizerBase:
    if has_tokenizer(folder):
        return load_tokenizer(folder)
    texts = (
        text for example in examples for text in (example.question, *example.steps, f"{ANSWER_MARK} {example.answer}")
    )
    tokenizer: PreTrainedTokenizerBase = build_word_tokenizer(texts)
    return tokenizer


def _random_model(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    config = read_config(folder)
    text_config = config.get_text_config()
    text_config.vocab_size = max(tokenizer.get_vocab().values()) + 1
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, folder / "config.json")
    model.eval()
    return model


# --- the hub --------------------------------------------------------------------------------


def find_folder(name: Path | str) -> Path:
    """Return a folder, or the local copy of the hub's model of this id, `owner/name`.

    A path below a folder that is here is no id, so that a slip in it is said to be one.

    Raises:
        ValueError: the hub does not give it.
    """
    owner, slash, _ = str(name).partition("/")
    is_id = bool(slash) and _HUB_ID.fullmatch(str(name)) is not None and not Path(owner).exists()
    return find_model(str(name), None) if is_id else Path(name)


def find_model(model: str, revision: str | None) -> Path:
    """Find the folder that `model` names, fetching it from the hub if it is not a local one.

    Raises:
        ValueError: it is no folder here, and the hub does not give it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(model):
        raise ValueError(
            f"model: found {model!r}, which is no folder here and no hub id;"
            " wanted an existing folder or an id like Qwen/Qwen2.5-0.5B"
        )
    return _fetch(model, revision)


def _fetch(model: str, revision: str | None) -> Path:
    """Download a hub model, or take the copy in the local cache when the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    commit, reason = None, ""
    try:
        # Asked first, because this call alone has a time limit: one silent server must not stop the night.
        commit = HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
    try:
        folder = Path(
            snapshot_download(
                model,
                # Not `commit`: the cache remembers what a name stood for only when asked by that name.
                revision=revision,
                local_files_only=commit is None,
                allow_patterns=_WANTED_FILES,
                ignore_patterns=_UNWANTED_FILES,
            )
        )
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"model: {model!r}, revision {revision or 'main'}, is neither a folder here nor in the local hub cache,"
            f" and the hub did not give it: {reason or first_line(error)};"
            " go online, correct the id, or give the path of a Hugging Face folder"
        ) from error
    if commit is None:
        logger.warning("base: the hub was not reached ({}); using the cached copy {}", reason, folder.name)
    logger.info("base: {} at commit {}; set `revision` to it to keep it", model, folder.name)
    return folder
