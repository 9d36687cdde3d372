"""Tokenizers: one is built from the examples for models from scratch, others are loaded from their folders."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loguru import logger
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from coconut.config.messages import first_line, shown
from coconut.data.documents import describe_foreign, read_json_object

UNKNOWN, PAD, EOS = "<unk>", "<pad>", "<eos>"

_PACKAGES = {"tokenizer.model": "sentencepiece", "spiece.model": "sentencepiece", "tekken.json": "mistral-common"}
"""Packages that read a vocabulary without which transformers cannot."""
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_SAMPLES = (
    "Natalia sold clips to 48 of her friends, and then 48/2 = <<48/2=24>>24 in May.\n#### 72",
    "10 - 10 - 5 + 8 - 5 ?\n1234567 * 0.5 == 617283.5\n\n",
    "Every lempus is a brimpus. Is Tom a zumpus or rompus?\n",
    "  It's WE'LL  don't\tnaïve Ünïcödé — “quotes” 数学 Ελλάδα \U0001f600",
    "if x:\n    return [y**2 for y in range(10)]  # $5,000.00 & 50%\r\n",
)
"""Texts by which a tokenizer's class is compared with its file."""


def build_word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    r"""Build a tokenizer that knows every word of `texts`. Words are separated by white space.

    Ids follow the words in sorted order, so they depend only on the set of words.

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
    """Tell whether the folder has a vocabulary. Without one, transformers would make an empty tokenizer."""
    return any((folder / name).is_file() for name in _VOCABULARY_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder, and set a padding token.

    Raises:
        ValueError: The folder has no tokenizer, a damaged one, or one without an end-of-text token.
    """
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder}: no tokenizer, wanted one of {', '.join(_VOCABULARY_FILES)};"
            " copy the tokenizer's files into the folder"
        )
    config = _check_files(folder)
    with _naming_damage(folder):
        tokenizer = _load_as_the_file_says(folder, config.get("tokenizer_class"))
        if tokenizer.eos_token_id is None:
            tokenizer.eos_token = _eos_token_of_model(folder, tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{folder}: the tokenizer has no end-of-text token, without which no answer can end;"
            " name it as eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_as_the_file_says(folder: Path, class_name: Any) -> Any:
    """Load the tokenizer of `tokenizer.json`, or through the class that the folder names.

    In transformers 5, some classes build rules of their own from the vocabulary of the file, which gives other
    ids than those that the model was trained with (Qwen 2, a GPT-2 class over Llama's file). So the class is
    used only if it gives the file's ids. A generic class does. `AutoTokenizer` takes two seconds more.
    """
    has_file = (folder / "tokenizer.json").is_file()
    if has_file and class_name in (None, *_GENERIC_CLASSES):
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if has_file and (sample := _find_difference(folder, tokenizer)) is not None:
        logger.warning(
            "{}: {} encodes {} otherwise than tokenizer.json does; the tokenizer of the file is used",
            *(folder, type(tokenizer).__name__, shown(sample)),
        )
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return tokenizer


def _find_difference(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a text that the tokenizer encodes otherwise than the bare `tokenizer.json`, or None."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.no_truncation()
    core.no_padding()
    for sample in _SAMPLES:
        if (
            tokenizer(sample, add_special_tokens=False)["input_ids"]
            != core.encode(sample, add_special_tokens=False).ids
        ):
            return sample
    return None


def _eos_token_of_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Look up the end-of-text token in `config.json`, because a bare `tokenizer.json` does not name it."""
    path = folder / "config.json"
    eos_id = read_json_object(path).get("eos_token_id") if path.is_file() else None
    if isinstance(eos_id, list) and eos_id:
        eos_id = eos_id[0]
    return tokenizer.convert_ids_to_tokens(eos_id) if type(eos_id) is int and 0 <= eos_id < len(tokenizer) else None


# --- damaged files --------------------------------------------------------------------------


def _check_files(folder: Path) -> dict[str, Any]:
    """Check the kind and the fields of the files, and return the fields of `tokenizer_config.json`.

    Raises:
        ValueError: A file is of another kind or holds a wrong value, or a package to read it is missing.
    """
    for path in [folder / name for name in (*_VOCABULARY_FILES, "merges.txt")] + sorted(folder.glob("*.jinja")):
        foreign = describe_foreign(path.open("rb").read(1024)) if path.is_file() else None
        if (foreign is not None and path.suffix != ".model") or (foreign or "").startswith("found a Git LFS"):
            raise ValueError(f"{path}: {foreign}")
    configs = {name: read_json_object(folder / name) for name in _CONFIG_FILES if (folder / name).is_file()}
    for name, fields in configs.items():
        _check_fields(fields, folder / name)
    present = [name for name in _VOCABULARY_FILES if (folder / name).is_file()]
    package = _PACKAGES.get(present[0])
    if package is not None and find_spec(package.replace("-", "_")) is None:
        raise ValueError(
            f"{folder / present[0]}: the package that reads it is not installed; run `pip install {package}`,"
            " or copy the model's tokenizer.json into the folder"
        )
    return configs.get("tokenizer_config.json", {})


def _check_fields(fields: dict[str, Any], path: Path) -> None:
    """Refuse values at which transformers fails without a word, or takes an empty text for a token."""
    for key, value in fields.items():
        wanted = None
        if key == "model_max_length" and (isinstance(value, bool) or not isinstance(value, int | float | None)):
            wanted = "a number"
        elif key.endswith("_token") and not key.startswith("add_") and not _is_token(value):
            wanted = 'text that is not empty, null, or {"__type": "AddedToken", "content": TEXT, ...}'
        elif key == "chat_template" and not _is_template(value):
            wanted = 'text, null, or a list of {"name": TEXT, "template": TEXT}'
        elif key == "tokenizer_class" and not isinstance(value, str | None):
            wanted = "text or null"
        if wanted is not None:
            found = "an object" if isinstance(value, dict) else shown(value)
            raise ValueError(f"{path}: {shown(key)}: found {found}, wanted {wanted}; take the key out, or correct it")


def _is_token(value: Any) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    return value is None or (isinstance(content, str) and content != "")


def _is_template(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, str | None)
    return all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in value
    )


@contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    # tokenizers raises `Exception` itself for a damaged file, and transformers any kind.
    except Exception as error:
        damage = _damage_of_file(folder / "tokenizer.json")
        reason = damage or first_line(error)
        raise ValueError(f"{folder}: its tokenizer cannot be read: {reason}; restore its files") from error


def _damage_of_file(path: Path) -> str | None:
    """Say what is wrong with a `tokenizer.json`, or return None if it is whole or absent."""
    from tokenizers import Tokenizer

    if not path.is_file():
        return None
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001
        return f"{path.name}: {error}"
    return None
