"""SIM-CoT, on Coconut and on CODI: loss and gradients equal slow versions written from the formulas, row by row."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from arms import make_method, writer_of
from coconut.config.params import parse_params
from coconut.config.schema import LatentConfig
from coconut.data.encoding import EncodedExample
from coconut.data.views import MarkerIds
from coconut.methods import Method, Row
from coconut.methods.codi import Keys as CodiKeys
from coconut.model.feedback import Feedback, build_feedback
from coconut.model.passes import PassOptions
from coconut.training.objective import Objective
from coconut.training.rows import TrainingRow
from inprocess import make_folder, succeed
from test_codi import ROWS, TwoTokensBefore, slow_loss
from test_config import shipped_tree
from tiny_models import build_tiny_model

LATENT = LatentConfig(2, 2, True, True, 0.0, "hidden[-1]", 0)
IDS, EOS = MarkerIds(60, 61, 62), 1
WRITERS = {"sim_cot": writer_of(IDS), "sim_codi": TwoTokensBefore(None, IDS)}  # type: ignore[arg-type]
EXAMPLES = [*ROWS, EncodedExample([5, 6], [[8], [9, 10, 11], [12], [13, 14]], [3, 20, EOS])]
"""Of three, one, two and four steps."""


@pytest.fixture
def small(tmp_path: Path) -> str:
    """Return a folder with the config of a model that is narrower than the others here."""
    config = build_tiny_model("llama").config.to_dict() | {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": 11}), encoding="utf-8")
    return str(tmp_path)


class Trial:
    """A method with its weights, and the rows of an update."""

    def __init__(self, name: str, family: str = "gpt2", *, stage: int = 0, **keys: Any) -> None:
        self.method: Method = make_method(name, stage, LATENT, **keys)
        self.model = build_tiny_model(family).train()
        self.feedback: Feedback = build_feedback("projector" if name == "sim_codi" else "hidden[-1]", self.model)
        modules = self.method.build_modules(self.model, 7)
        assert modules is not None
        self.modules: nn.Module = modules
        views = (self.method.views(Row(one, random.Random(0), {}, WRITERS[name])) for one in EXAMPLES)
        self.rows = [TrainingRow(one, shown, 0) for one, shown in zip(EXAMPLES, views, strict=True)]
        named = {"model": self.model, "feedback": self.feedback, "training": self.modules}
        self.parameters = {f"{kind}.{key}": p for kind, one in named.items() for key, p in one.named_parameters()}

    def cost(self, micro_batch: int = 9, **options: Any) -> Any:
        objective = Objective(
            *(self.model, self.feedback, Accelerator(cpu=True), 0, micro_batch, self.method),
            modules=self.modules,
            options=PassOptions(**options),
        )
        return objective.accumulate(self.rows, self.parameters)

    def said(self, thoughts_1CD: Tensor, ids: Sequence[int], first_position: int) -> Tensor:
        """The nats of a step, said by the decoder from its thoughts, with nothing beside it."""
        words = self.model.get_input_embeddings()(torch.tensor([ids]))
        embeds = self.modules.entry(torch.cat([thoughts_1CD, words], dim=1))  # type: ignore[operator]
        positions = torch.arange(first_position, first_position + embeds.shape[1])[None]
        decoder: PreTrainedModel = self.modules.decoder  # type: ignore[assignment]
        logits = decoder(inputs_embeds=embeds, position_ids=positions).logits[0, thoughts_1CD.shape[1] - 1 : -1]
        return functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")

    def fed(self, ids: Sequence[int], num_thoughts: int) -> Tensor:
        """What is fed after these ids, 1 x K x D, each thought from the whole sequence before it."""
        embeds = self.model.get_input_embeddings()(torch.tensor([ids]))
        for _ in range(num_thoughts):
            hidden = self.model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1:]
            embeds = torch.cat([embeds, hidden if self.feedback.finish is None else self.feedback.finish(hidden)], 1)
        return embeds[:, len(ids) :]

    def check(self, wanted: Tensor, **options: Any) -> None:
        gradients = torch.autograd.grad(wanted, list(self.parameters.values()))
        cost = self.cost(**options)
        assert cost.loss == pytest.approx(float(wanted.detach()), rel=1e-5)
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True):
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=5e-5 * largest, msg=name)


def slow_sim_cot(trial: Trial, gone: int, groups: int, weight: float) -> Tensor:
    """With so many steps gone and groups of two thoughts; a group says a step, and the last one what is left."""
    embed, nll, num_tokens, explain = trial.model.get_input_embeddings(), 0.0, 0, 0.0
    for question, steps, answer in EXAMPLES:
        fed = trial.fed([*question, IDS.start], 2 * groups)
        target = [token for step in steps[gone:] for token in step] + answer
        parts = [embed(torch.tensor([[*question, IDS.start]])), fed, embed(torch.tensor([[IDS.end, *target]]))]
        hidden = trial.model.base_model(inputs_embeds=torch.cat(parts, dim=1), use_cache=False).last_hidden_state
        logits = trial.model.lm_head(hidden[0, -len(target) - 1 : -1])
        nll = nll + functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
        num_tokens += len(target)
        texts = [list(step) for step in steps[:gone]]
        while len(texts) > groups:
            texts[-2:] = [texts[-2] + texts[-1]]
        said = [trial.said(fed[:, 2 * j : 2 * j + 2], [*ids, EOS], 1) for j, ids in enumerate(texts)]
        explain = explain + torch.stack(said).mean()
    return nll / num_tokens + weight * explain / len(EXAMPLES)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("stage", "gone"), [(1, 1), (2, 2), (3, 9)])
@pytest.mark.parametrize("micro_batch", [4, 1])
def test_coconuts_thoughts_say_the_steps_that_are_gone(family: str, stage: int, gone: int, micro_batch: int) -> None:
    trial = Trial("sim_cot", family, stage=stage, explain_weight=0.7)
    trial.check(slow_sim_cot(trial, gone, min(stage, 2), 0.7), micro_batch=micro_batch)


def test_thoughts_from_the_start_say_only_the_steps_that_are_gone() -> None:
    trial = Trial("sim_cot", stage=1, num_thoughts=6)
    trial.check(slow_sim_cot(trial, 1, 3, 1.0))


def test_a_decoder_of_another_width_reads_through_a_map_of_its_own(small: str) -> None:
    trial = Trial("sim_cot", stage=2, explain_model=small)
    trial.check(slow_sim_cot(trial, 2, 2, 1.0), micro_batch=2)
    again = Trial("sim_cot", stage=2, explain_model=small).modules.state_dict()
    assert all(torch.equal(again[name], one) for name, one in trial.modules.state_dict().items())
    other = trial.method.build_modules(trial.model, 8)
    assert other is not None
    assert not torch.equal(other.state_dict()["entry.weight"], again["entry.weight"])


def test_few_logits_at_once_give_the_same_update() -> None:
    trial = Trial("sim_cot", stage=3)
    loss = trial.cost().loss
    gradients = {name: p.grad.clone() for name, p in trial.parameters.items() if p.grad is not None}
    assert trial.cost(max_logits=200).loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(trial.parameters[name].grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_decoder_begins_as_the_model_and_drops_nothing() -> None:
    model = build_tiny_model("gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5).train()
    modules = make_method("sim_cot", 1, LATENT).build_modules(model, 0)
    assert modules is not None
    assert not any(module.training for module in modules.modules())
    found, wanted = dict(modules.named_parameters()), dict(model.named_parameters())
    for name, parameter in found.items():
        own = name.removeprefix("decoder.").replace("lm_head.weight", "transformer.wte.weight")
        assert torch.equal(parameter, wanted[own])
        assert parameter is not wanted[own], name
    assert len(found) == len(wanted)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("micro_batch", [4, 1])
@pytest.mark.parametrize("num_thoughts", [2, 4])
def test_codis_thoughts_say_the_steps_of_the_teacher(family: str, micro_batch: int, num_thoughts: int) -> None:
    trial = Trial("sim_codi", family, num_thoughts=num_thoughts, explain_weight=0.7)
    explain = torch.zeros(())
    for question, steps, _ in EXAMPLES:
        fed = trial.fed([*question, IDS.start], num_thoughts)
        texts = [list(step) for step in steps[:-1]]
        while len(texts) > num_thoughts:
            texts[-2:] = [texts[-2] + texts[-1]]
        said = [trial.said(fed[:, j : j + 1], [*ids, EOS], 0) / (len(ids) + 1) for j, ids in enumerate(texts)]
        if said:
            explain = explain + torch.stack(said).mean()
    keys = CodiKeys(num_thoughts=num_thoughts)
    wanted = slow_loss(trial.model, trial.feedback, keys, EXAMPLES) + 0.7 * explain / len(EXAMPLES)
    trial.check(wanted, micro_batch=micro_batch)


def test_a_step_that_the_decoder_has_no_room_for_is_named(tmp_path: Path) -> None:
    build_tiny_model("gpt2", n_positions=4).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="explain_model: found 4 positions, wanted more, for a step of 4 tokens"):
        Trial("sim_cot", stage=2, explain_model=str(tmp_path)).cost()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"explain_wieght": 1.0}, "latent_1.explain_wieght: unknown key; .* did you mean explain_weight"),
        ({"explain_weight": -1}, "latent_1.explain_weight: found -1.0, wanted at least 0"),
        ({"c_thought": 0}, "c_thought: found 0, wanted at least 1"),
        ({"c_thought": 2, "num_thoughts": 5}, "num_thoughts: found 5, wanted a multiple of c_thought, which is 2"),
        ({"method": "coconut", "explain_weight": 1}, "only for method sim_codi or sim_cot, found method coconut"),
    ],
)
def test_keys_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    tree = shipped_tree()
    tree["curriculum"]["latent_1"] |= {"method": "sim_cot"} | changes
    with pytest.raises(ValueError, match=message):
        parse_params(tree)


@pytest.mark.parametrize("name", ["sim_cot", "sim_codi"])
def test_a_decoder_that_no_folder_holds_is_refused_before_anything_trains(name: str, small: str) -> None:
    make_method(name, 0, LATENT, explain_model=small).check_model(2)
    make_method(name, 0, LATENT).check_model(2)
    with pytest.raises(
        ValueError, match="explain_model: found 'models/tny', wanted same, or a folder that holds a con"
    ):
        make_method(name, 0, LATENT, explain_model="models/tny").check_model(2)


@pytest.mark.slow
def test_no_output_of_the_pipeline_holds_a_weight_of_the_decoder(tmp_path: Path) -> None:
    entry = {"parent": "base", "method": "sim_cot", "latent_stage": 2, "epochs": 1, "lr": 1e-3, "select": "best"}
    changes = {"curriculum": {"sim": entry}, "train.reset_optimizer": False}
    project = make_folder(tmp_path / "project", changes)
    succeed(project, "preprocess", "base", "encode", "train@sim")

    def names(path: str) -> set[str]:
        with safe_open(project / "outputs" / path, framework="pt") as file:
            return set(file.keys())

    weights = names("base/checkpoint/model.safetensors")
    assert names("sim/checkpoint/model.safetensors") == weights
    assert {name.rpartition("/")[0] for name in names("sim/optimizer.safetensors") if "/" in name} == weights
    assert "explain" in (project / "outputs/sim/updates.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
