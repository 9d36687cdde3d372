"""Each of the journal's models, as a tiny random one of its kind: prepared, trained for an update, saved, asked.

The values that shape the computation are those of the model's own config.json, scaled down: how many query
heads share a key, whether embeddings are tied and have rows to spare, rotary base, sliding window.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from loguru import logger
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from coconut.checkpoints.feedback import load_feedback, save_feedback
from coconut.checkpoints.folder import load_checkpoint, save_checkpoint
from coconut.checkpoints.meta import CheckpointMeta
from coconut.checkpoints.origin import prepare_base
from coconut.config.methods import build_method
from coconut.config.params import parse_params
from coconut.config.schema import Entry, Params
from coconut.data.encoding import EncodedExample, encode_example
from coconut.data.examples import MARKERS, Example
from coconut.data.tokenizer import build_word_tokenizer
from coconut.data.views import ViewWriter
from coconut.evaluation.evaluator import Evaluator
from coconut.reasoner import Reasoner
from coconut.training.callbacks import Stopped
from coconut.training.loop import Trainer
from test_config import shipped_tree
from test_loop import FakeValidation, Keeper

pytestmark = pytest.mark.slow

EXAMPLES = [Example(f"{a} + {b} + 1 ?", [f"{a + b}", f"{a + b + 1}"], f"{a + b + 1}") for a in (1, 2) for b in (3, 5)]
WORDS = [" ".join(f"{number}" for number in range(12)), "+ ? ### <<"]

_QWEN_HALF: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 28,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "max_window_layers": 3,
    "max_position_embeddings": 128,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 128,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
_QWEN_MATH = _QWEN_HALF | {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "intermediate_size": 140,
    "num_hidden_layers": 4,
    "max_window_layers": 3,
    "rope_theta": 10_000.0,
    "use_mrope": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {
        "model_type": "gpt2",
        "n_embd": 24,
        "n_head": 6,
        "n_layer": 3,
        "n_positions": 128,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
    },
    "Qwen/Qwen2.5-0.5B": _QWEN_HALF,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_HALF,
    "Qwen/Qwen2.5-Coder-0.5B": _QWEN_HALF,
    "Qwen/Qwen2.5-Math-1.5B": _QWEN_MATH,
    "plaguss/Qwen2.5-0.5B-Math-Shepherd-PRM-0.2": _QWEN_HALF,
    "HuggingFaceH4/Qwen2.5-Math-1.5B-Instruct-PRM-0.2": _QWEN_MATH,
}
REWARD_MODELS = [name for name in MODELS if "PRM" in name]
LATENT = {"c_thought": 2, "markers": True, "thought": "hidden[-1]"}


@pytest.fixture(scope="module")
def params() -> Params:
    return parse_params(shipped_tree())


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)


def write_folder(folder: Path, name: str, *, tied: bool = True) -> Path:
    """A Hugging Face folder as the hub has it: random weights with the model's own kind of head."""
    tokenizer = build_word_tokenizer(WORDS)
    values = MODELS[name] | {"vocab_size": len(tokenizer) + 20, "eos_token_id": tokenizer.eos_token_id}
    if not tied:
        values["tie_word_embeddings"] = False
    config = AutoConfig.for_model(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        is_reward_model = name in REWARD_MODELS
        kind = AutoModelForTokenClassification if is_reward_model else AutoModelForCausalLM
        kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Encoded:
    """The examples, indexed as an `EncodedSet` is."""

    def __init__(self, tokenizer: Any) -> None:
        self.encoded = [encode_example(tokenizer, example) for example in EXAMPLES]

    def __len__(self) -> int:
        return len(self.encoded)

    def rows(self, rows: list[int]) -> list[EncodedExample]:
        return [self.encoded[row] for row in rows]


def entry_of(params: Params, **latent: Any) -> Entry:
    entry = params.curriculum["latent_2"]
    return dataclasses.replace(
        entry,
        epochs=1,
        lr=1e-2,
        latent=dataclasses.replace(entry.latent, **(LATENT | latent)),
        train=dataclasses.replace(entry.train, batch_size=4, warmup_updates=0),
    )


def build_trainer(params: Params, entry: Entry, base: Path) -> tuple[Trainer, Any]:
    model, tokenizer, _ = load_checkpoint(base)
    trainer = Trainer(
        entry=entry,
        model=model,
        feedback=load_feedback(base, entry.latent.thought, model, seed=0),
        dataset=Encoded(tokenizer),
        writer=ViewWriter.of(tokenizer),
        pad_id=0,
        seed=0,
        runtime=params.runtime,
        accelerator=Accelerator(cpu=True),
        validation=FakeValidation([0.0] * 9),
    )
    return trainer, tokenizer


def train(params: Params, entry: Entry, base: Path) -> tuple[Trainer, Any]:
    """One update an epoch: the examples fill one batch."""
    trainer, tokenizer = build_trainer(params, entry, base)
    trainer.fit()
    return trainer, tokenizer


def finish(trainer: Trainer, tokenizer: Any, folder: Path) -> None:
    entry = trainer.entry
    save_checkpoint(
        folder,
        trainer.model,
        tokenizer,
        CheckpointMeta.of(entry.method, entry.latent_stage, entry.latent, prompt="plain"),
    )
    save_feedback(folder, trainer.feedback)


@pytest.mark.parametrize("thought", ["hidden[-1]", "projection(hidden[-1]+suppressed[0.5:])"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_this_kind_is_prepared_trained_saved_and_asked(
    params: Params, name: str, thought: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "hub", name)
    prepare_base(dataclasses.replace(params, model=str(folder)), EXAMPLES, tmp_path / "base")
    before = load_checkpoint(tmp_path / "base")[0].state_dict()
    entry = entry_of(params, thought=thought)
    trainer, tokenizer = train(params, entry, tmp_path / "base")

    assert trainer.position.update == 1
    for parameter_name, parameter in trainer.model.named_parameters():
        assert torch.isfinite(parameter).all(), parameter_name
        assert not torch.equal(parameter, before[parameter_name]), parameter_name
    assert trainer.position.history[0]["num_latents"] > 0

    finish(trainer, tokenizer, tmp_path / "trained")
    reasoner = Reasoner.from_pretrained(tmp_path / "trained")
    solutions = reasoner.solve([example.question for example in EXAMPLES], max_new_tokens=8)
    assert {solution.num_thoughts for solution in solutions} == {4}
    model = trainer.model.eval()
    evaluator = Evaluator(
        model,
        trainer.feedback,
        tokenizer,
        build_method(entry).layout(entry.latent_stage),
        max_new_tokens=8,
        batch_size=1,
    )
    ids = [encode_example(tokenizer, example).question_ids for example in EXAMPLES]
    alone = evaluator.decode(evaluator.prompts(ids))
    texts = [tokenizer.decode(row.ids, skip_special_tokens=True) for row in alone]
    assert [solution.text for solution in solutions] == texts
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert isinstance(plain, PreTrainedModel)


def test_a_stopped_run_goes_on_with_the_projections_weights_and_moments(params: Params, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hub", "Qwen/Qwen2.5-0.5B")
    prepare_base(dataclasses.replace(params, model=str(folder)), EXAMPLES, tmp_path / "base")
    entry = dataclasses.replace(entry_of(params, thought="projection"), epochs=2)
    straight, _ = train(params, entry, tmp_path / "base")
    first = build_trainer(params, entry, tmp_path / "base")[0]
    first.callbacks = callbacks = Keeper(stop_after=1)
    with pytest.raises(Stopped):
        first.fit()
    second = build_trainer(params, entry, tmp_path / "base")[0]
    second.restore_state(*callbacks.states[-1])
    second.fit()
    assert sum(name.startswith("feedback.") for name in straight.learner.parameters) == 6
    for name, parameter in straight.learner.parameters.items():
        assert torch.equal(parameter, second.learner.parameters[name]), name
    for name, moment in straight.learner.optimizer_state().items():
        assert torch.equal(moment, second.learner.optimizer_state()[name]), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", REWARD_MODELS)
def test_a_reward_models_head_is_dropped_with_a_warning(
    params: Params, name: str, tied: bool, tmp_path: Path, warnings: list[str]
) -> None:
    folder = write_folder(tmp_path / "hub", name, tied=tied)
    prepare_base(dataclasses.replace(params, model=str(folder)), EXAMPLES, tmp_path / "base")
    dropped = [line for line in warnings if "dropped weights it has no place for" in line]
    assert len(dropped) == 1
    assert "score.bias, score.weight" in dropped[0]
    model, _, _ = load_checkpoint(tmp_path / "base")
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(head, embeddings), "the head starts from the embeddings, tied or not"
    assert any("has to be trained" in line for line in warnings) == (not tied)


def test_a_process_reward_models_own_code_is_not_run_and_its_head_is_dropped(
    params: Params, tmp_path: Path, warnings: list[str]
) -> None:
    """Qwen's own reward models name a class of theirs in config.json, and have a head of two layers."""
    folder = write_folder(tmp_path / "hub", "Qwen/Qwen2.5-Math-1.5B")
    tensors = load_file(folder / "model.safetensors")
    width = tensors["model.norm.weight"].shape[0]
    extra = {"score.0.weight": torch.ones(width, width), "score.0.bias": torch.ones(width)}
    extra |= {"score.2.weight": torch.ones(2, width), "score.2.bias": torch.ones(2)}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Qwen2ForProcessRewardModel"]
    config["auto_map"] = {"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_qwen2_rm.py").write_text("raise SystemExit('remote code was run')\n")
    prepare_base(dataclasses.replace(params, model=str(folder)), EXAMPLES, tmp_path / "base")
    assert any("score.0.bias, score.0.weight, score.2.bias, score.2.weight" in line for line in warnings)
    trainer, _ = train(params, entry_of(params), tmp_path / "base")
    assert trainer.position.update == 1


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "openai-community/gpt2"])
def test_spare_rows_of_the_vocabulary_take_the_markers_and_never_shrink(
    params: Params, name: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "hub", name)
    prepare_base(dataclasses.replace(params, model=str(folder)), EXAMPLES, tmp_path / "base")
    model, tokenizer, _ = load_checkpoint(tmp_path / "base")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) - len(MARKERS) + 20
