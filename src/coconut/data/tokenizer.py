"""Tokenizers: one built from the examples for models from scratch, and those that folders carry."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

UNKNOWN, PAD, EOS = "<unk>", "<pad>", "<eos>"

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


def build_word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    r"""Build a tokenizer that knows every word of `texts`, where a word is what stands between white space.

    Ids follow the words in sorted order, so they depend on the set of words alone.

    >>> tokenizer = build_word_tokenizer(["10 - 9 ?", "### 9"])
    >>> tokenizer.convert_ids_to_tokens(tokenizer("10 - 9 ?\n")["input_ids"])
    ['10', '-', '9', '?']
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = (UNKNOWN, PAD, EOS)
    words = sorted({word for text in texts for word in text.split()}.difference(special))
    vocabulary = {word: index for index, word in enumerate((*special, *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=UNKNOWN, pad_token=PAD, eos_token=EOS)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder carries a vocabulary; without one, transformers would make an empty tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARY_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder, with a padding token set.

    Raises:
        ValueError: if the folder carries none, a damaged one, or one without an end-of-text token.
    """
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder}: no tokenizer, wanted one of {', '.join(_VOCABULARY_FILES)};"
            " copy the tokenizer's files into the folder"
        )
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            # A bare tokenizer.json does not say what ends a text; the model's config may.
            eos_id = _read_json(folder / "config.json").get("eos_token_id")
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id) if isinstance(eos_id, int) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder}: its tokenizer cannot be read: {reason}; restore its files") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{folder}: the tokenizer has no end-of-text token, without which no answer can end;"
            " name it as eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """The class that reads the folder's tokenizer.

    A generic tokenizer is what its tokenizer.json says. `AutoTokenizer` costs two seconds more, and for some
    families (Qwen 2) it would put its own splitting rules in place of the file's.
    """
    name = _read_json(folder / "tokenizer_config.json").get("tokenizer_class", _GENERIC_CLASSES[0])
    if name in _GENERIC_CLASSES and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _read_json(path: Path) -> dict[str, Any]:
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(fields, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return fields
