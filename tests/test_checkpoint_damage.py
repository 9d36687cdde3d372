"""Every file of a checkpoint damaged at random: each failure is one message with the file, and no traceback."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coconut import Reasoner, terminal
from coconut.checkpoints.feedback import save_feedback
from coconut.checkpoints.folder import save_checkpoint
from coconut.checkpoints.markers import add_markers
from coconut.checkpoints.meta import CheckpointMeta
from coconut.checkpoints.tensors import read_tensors, save_tensors
from coconut.config.params import parse_params
from coconut.config.schema import LatentConfig
from coconut.data.tokenizer import build_word_tokenizer
from coconut.model.feedback import build_feedback
from coconut.pipeline.record import md5_as_dvc
from coconut.training.learner import Learner
from marks import slow_but
from test_config import shipped_tree
from tiny_models import build_tiny_model

OPTIMIZER_FILE = "optimizer.safetensors"
FILES = (
    *("config.json", "generation_config.json", "coconut.json", "tokenizer.json", "tokenizer_config.json"),
    *("model.safetensors", "thought.safetensors", OPTIMIZER_FILE),
)
NUM_FAST, NUM_SLOW = 12, 100
"""Damages of each file."""
_WANTED = re.compile("wanted|without which|not UTF-8|not valid JSON|no tokenizer|cannot be read")
_CURE = re.compile("restore|fetch|correct|pull|take|set |write|name it|copy|save|download|install")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every file that one can have."""
    folder = tmp_path_factory.mktemp("damage") / "checkpoint"
    model, tokenizer = build_tiny_model("llama"), build_word_tokenizer(["1 + 2 + 3 ?", "3", "6", "### 6", "<<"])
    add_markers(model, tokenizer)
    latent = LatentConfig(1, 2, True, True, uniform_prob=0.0, thought="projection", parallel_iterations=0)
    save_checkpoint(folder, model, tokenizer, CheckpointMeta.of("coconut", 2, latent, prompt="plain"))
    feedback = build_feedback("projection", model)
    save_feedback(folder, feedback)
    learner = Learner(model, feedback, parse_params(shipped_tree()).train)
    take_a_step(learner)
    save_tensors(learner.optimizer_state(), folder / OPTIMIZER_FILE)
    assert {path.name for path in folder.iterdir()} >= set(FILES)
    return folder


def take_a_step(learner: Learner) -> None:
    for parameter in learner.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    learner.step(1e-3)


def use(folder: Path) -> None:
    """Do with a checkpoint what its users do: ask it, and go on from its moments."""
    reasoner = Reasoner.from_pretrained(folder)
    reasoner.solve(["1 + 2 + 3 ?"], max_new_tokens=2)
    path = folder / OPTIMIZER_FILE
    learner = Learner(reasoner.model, reasoner.feedback, parse_params(shipped_tree()).train)
    learner.take_over(read_tensors(path, "the parent's optimizer state"), place=str(path))
    take_a_step(learner)


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 8])):
        # Headers and names stand at the beginning; most of a file of tensors is numbers.
        place = draw.randrange(min(len(changed), draw.choice([64, 4096, len(changed)])))
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def change_length(content: bytes, draw: random.Random) -> bytes:
    cut = draw.randrange(len(content))
    return draw.choice([content[:cut], content[cut:], content + content[:cut], b"", content[:cut] + bytes(40)])


def change_kind(_content: bytes, draw: random.Random) -> bytes:
    return draw.choice(
        [
            *(b"[]", b"null", b"3", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{\0}\0", b"<!doctype html>"),
            *(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", b"\x80\x04K\x01."),
            (1 << 62).to_bytes(8, "little") + b"{}",
        ]
    )


def change_value(content: bytes, draw: random.Random) -> bytes:
    """Of a JSON file one value, at any depth, becomes another kind of value, or its key is gone."""
    try:
        tree = json.loads(content)
    except ValueError:
        return change_kind(content, draw)
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                collect(value)

    collect(tree)
    node, key = draw.choice(places)
    values = [None, True, "", "x", -1, 0, 1.5, 10**9, 10**20, [], [1, "a"], {}, {"a": 1}, "\ud83d"]
    if draw.random() < 0.1:
        del node[key]
    else:
        node[key] = draw.choice(values)
    return json.dumps(tree).encode()


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip_bits, change_length, change_kind, change_value)


def try_damages(whole: Path, folder: Path, name: str, seeds: range) -> int:
    """How many of the damages were found; the others left the file usable."""
    content, num_found = (whole / name).read_bytes(), 0
    shutil.copytree(whole, folder)
    for seed in seeds:
        damage = DAMAGES[seed % len(DAMAGES)]
        (folder / name).write_bytes(damage(content, random.Random(f"{name}/{seed}")))
        try:
            use(folder)
        except ValueError as error:
            num_found += 1
            message = str(error)
            assert str(folder) in message, f"{damage.__name__} {seed}: {message}"
            assert _WANTED.search(message), f"{damage.__name__} {seed}: {message}"
            assert _CURE.search(message), f"{damage.__name__} {seed}: {message}"
        except Exception as error:
            raise AssertionError(f"{damage.__name__} {seed} of {name} ended in {error!r}") from error
    return num_found


@pytest.mark.parametrize("name", slow_but(["config.json", "model.safetensors", "tokenizer.json"], FILES))
def test_a_damaged_file_of_a_checkpoint_is_one_message(name: str, whole: Path, tmp_path: Path) -> None:
    assert try_damages(whole, tmp_path / "damaged", name, range(NUM_FAST)) > NUM_FAST // 4


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.long
def test_many_damages_of_a_file_are_each_one_message(name: str, whole: Path, tmp_path: Path) -> None:
    seeds = range(NUM_FAST, NUM_FAST + NUM_SLOW)
    assert try_damages(whole, tmp_path / "damaged", name, seeds) > NUM_SLOW // 4


def test_weights_of_whole_numbers_are_refused(whole: Path, tmp_path: Path) -> None:
    """As after a change of three letters in the header: their bits are read as numbers around a thousand million."""
    for name in ("model.safetensors", "thought.safetensors"):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content.replace(b'"F32"', b'"I32"'))
        with pytest.raises(ValueError, match=rf"{name}: .*: found \w+ of type (I32|torch.int32), wanted"):
            Reasoner.from_pretrained(folder)


def test_weights_of_eight_bits_are_refused(whole: Path, tmp_path: Path) -> None:
    """Published ones have scales beside them, without which they are other numbers."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole, folder)
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: .*: found weights of type F8_E4M3, wanted"):
        Reasoner.from_pretrained(folder)


def test_logits_that_are_not_finite_are_refused(whole: Path, tmp_path: Path) -> None:
    """As after one flipped bit of an exponent, which leaves every weight finite."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name][:2] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"^\S+/checkpoint: model: \w+ gives logits that .*: its weights are damaged, fetch them again$",
    ):
        Reasoner.from_pretrained(folder)
    reasoner = Reasoner.from_pretrained(folder, prove=False)
    for ask in (reasoner.solve, reasoner.think):
        with pytest.raises(ValueError, match="checkpoint: found logits that are infinite or not"):
            ask(["1 + 2 + 3 ?"])


def test_think_says_of_which_checkpoint_it_answers(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zeros in place of weights give numbers and answers like any others."""
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/cot/checkpoint")
    shutil.copytree(whole, folder)
    out = {"path": folder.as_posix(), "hash": "md5", "md5": md5_as_dvc(folder)}
    Path("dvc.lock").write_text(json.dumps({"stages": {"train@cot": {"cmd": "train", "outs": [out]}}}) + "\n")
    assert terminal.run(["1 + 2 + 3 ?"], entry=str(folder), shows_thoughts=True) == 0
    assert "dvc.lock" not in capsys.readouterr().err
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-400] + bytes(400))
    assert terminal.run(["1 + 2 + 3 ?"], entry=str(tmp_path / folder), shows_thoughts=True) == 0
    assert "outputs/cot/checkpoint: not what dvc.lock names: it is of another run, or" in capsys.readouterr().err


def test_a_whole_checkpoint_is_used_without_an_error(whole: Path) -> None:
    use(whole)
