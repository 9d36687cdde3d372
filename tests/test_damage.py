"""Whatever is damaged in the files that preprocess and encode read, they end well or with one message.

Damages are drawn from a seed: bits, lengths, and values of another type in JSON.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coconut.config.schema import DataConfig, LatentConfig, Source
from coconut.data.encoder import encode_splits
from coconut.data.examples import Example, write_examples
from coconut.data.preprocessing import preprocess
from coconut.data.tokenizer import build_word_tokenizer, load_tokenizer

LATENT = LatentConfig(1, 2, True, False, 0.0, "hidden[-1]", 0)
EXAMPLES = [Example(f"{i} + 2 ?", ["3", "4"][: i % 3], "5") for i in range(6)]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**30, 2.5, 1e999, float("nan"), "", " ", "x", "\x1b[31m", "\u202e", "\ud800"),
    *("<eos>", "####", "###", "9" * 5000, [], [[]], [None], ["a", 1], {}, {"content": ""}, {"a": {"b": []}}),
]
TEMPLATE = "{% for message in messages %}{{ message.content }} ?{% endfor %}"


# --- damages --------------------------------------------------------------------------------


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 30))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def change_length(content: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    noise = rng.randbytes(rng.choice((1, 8, 4000)))
    return rng.choice((content[:start], content[start:], content[:start] + content[stop:], b"",
                       content[:start] + noise + content[start:], content + content[start:stop]))  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def change_value(content: bytes, rng: random.Random) -> bytes:
    """Change one value of a JSON document, or of one line of JSON Lines; lines of text lose or gain a word."""
    lines = content.split(b"\n")
    is_document = len(lines) < 3 or lines[0].strip() in (b"{", b"[")
    number = 0 if is_document else rng.randrange(len(lines))
    text = content if is_document else lines[number]
    try:
        tree = json.loads(text)
    except ValueError:
        words = text.split(b" ")
        words[rng.randrange(len(words))] = rng.choice((b"", b"||", b"####", b"\x00", b"<<", "½".encode()))
        changed = b" ".join(words)
    else:
        *path, last = rng.choice(places(tree)[1:] or [(None,)])
        parent = tree
        for key in path:
            parent = parent[key]
        if last is None:
            tree = rng.choice(VALUES)
        elif rng.random() < 0.2:
            del parent[last]
        else:
            parent[last] = rng.choice(VALUES)
        changed = json.dumps(tree).encode()
        if isinstance(tree, dict) and tree and rng.random() < 0.2:
            changed = changed[:-1] + f", {json.dumps(next(iter(tree)))}: 1}}".encode()
    return changed if is_document else b"\n".join([*lines[:number], changed, *lines[number + 1 :]])


DAMAGES = (flip_bits, change_length, change_value)


# --- what reads the files -------------------------------------------------------------------

RAW = {
    "canonical": json.dumps([{"question": e.question, "steps": list(e.steps), "answer": e.answer} for e in EXAMPLES]),
    "prosqa": "\n".join(json.dumps({"question": e.question, "steps": ["a", "b"], "answer": "c"}) for e in EXAMPLES),
    "gsm8k": "\n".join(json.dumps({"question": f"{i} ?", "answer": "<<1+1=2>>2\n#### 2"}) for i in range(6)),
    "gsm8k_aug": "\n".join(f"{i} ?||<<1+1=2>> He has 2. Yes. #### {i}" for i in range(6)),
    "multiplication": "\n".join(f"5 {i} * 7 4||5 2 + 0 9 4 #### 5 {i} 1" for i in range(6)),
    "prontoqa": json.dumps({
        f"example{i}": {"test_example": {"question": f"A {i}.", "query": "B?", "chain_of_thought": ["a.", "b."],
                                         "answer": "True"}} for i in range(6)}, indent=1),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Whole raw files, examples, and a base checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "raw").mkdir()
    for name, text in RAW.items():
        (folder / "raw" / name).write_text(text)
    (folder / "examples").mkdir()
    for split in ("train", "valid", "test"):
        write_examples(folder / "examples" / f"{split}.jsonl", EXAMPLES)
    tokenizer = build_word_tokenizer(["0 1 2 3 4 5 6 7 8 9 + ? ###"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "checkpoint")
    config = {"model_type": "gpt2", "n_positions": 64, "eos_token_id": 2, "vocab_size": 20}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    return folder


def read_raw(folder: Path, name: str) -> None:
    rows = [{"question": f"held out {i}", "steps": [], "answer": "1"} for i in range(2)]
    (folder / "raw" / "held_out").write_text(json.dumps(rows))
    other = Source("canonical", file="held_out", rows=1)
    train = Source(Path(name).name, file=Path(name).name)  # type: ignore[arg-type]
    for skip in (False, True):
        tests = {"test": Source("canonical", file="held_out", start=1)}
        data = DataConfig(0, str(folder / "raw"), train, other, tests, None, skip, None)
        preprocess(data, folder / "out", folder / "out.json")


def encode(folder: Path, _name: str) -> None:
    load_tokenizer(folder / "checkpoint")
    for prompt in ("plain", "chat"):
        encode_splits(folder / "examples", folder / "checkpoint", folder / "out", prompt=prompt, latent=LATENT,
                      num_processes=1)  # fmt: skip


READERS: dict[str, Callable[[Path, str], None]] = {
    **{f"raw/{name}": read_raw for name in RAW},
    "examples/train.jsonl": encode,
    "checkpoint/config.json": encode,
    "checkpoint/tokenizer.json": encode,
    "checkpoint/tokenizer_config.json": encode,
    "checkpoint/chat_template.jinja": encode,
}


def check_damages(whole: Path, folder: Path, name: str, num_damages: int, seed: int) -> None:
    content = (whole / name).read_bytes()
    for number in range(num_damages):
        rng = random.Random(f"{name}/{seed}/{number}")
        damage = DAMAGES[number % len(DAMAGES)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(damage(content, rng))
        try:
            READERS[name](folder, name)
        except (ValueError, OSError) as error:
            message = str(error)
            place = f"{damage.__name__} {number} of {name}: {message}"
            assert str(folder) in message, place
            assert len(message) < 700 + len(str(folder)), place
            assert message.replace("\n", " ").isprintable(), place
            assert "; " in message, f"no cure: {place}"


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_named_in_one_message(whole, tmp_path, name):
    check_damages(whole, tmp_path / "damaged", name, 30 if name.startswith("raw") else 9, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_a_file_damaged_in_many_ways_is_read_or_named_in_one_message(whole, tmp_path, name):
    check_damages(whole, tmp_path / "damaged", name, 300, seed=1)
