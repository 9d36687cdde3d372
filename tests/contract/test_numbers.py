"""Loss and gradient of models/tiny: against a slow, plain computation, and against numbers that are kept.

The numbers kept are the first update's of every method. Write new ones only after a change that is *meant* to change
what an update is, and say in LOG.md what moved them: the failure's message shows them. The tolerance is that of other
processors, which add up in another order.
"""

import csv
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from coconut import Example, Reasoner
from contract.projects import make_project, run_stages, train_entry

pytestmark = pytest.mark.slow

EXAMPLES = [
    Example("3 + 4 - 5 * 2 ?", ["7", "2", "4"], "4"),
    Example("9 - 1 * 3 + 6 ?", ["8", "2", "8"], "8"),
    Example("1 + 1 ?", ["2"], "2"),
]
FIRST_UPDATES: dict[str, tuple[dict[str, Any], float, float]] = {
    "cot": (train_entry("cot"), 3.177625, 4.5213537),
    "no_cot": (train_entry("no_cot"), 3.1925786, 10.292768),
    "coconut": (train_entry("coconut", "base", 1), 3.2086978, 5.6020064),
    "no_thoughts": (train_entry("no_thoughts", "base", 1), 3.1427753, 4.8073368),
    "pause": (train_entry("pause"), 3.243597, 10.623647),
    "pause_as_thought": (train_entry("pause_as_thought", "base", 1), 3.202825, 5.4449539),
    "icot": (train_entry("icot", icot_tokens_per_epoch=4, icot_smoothing=4), 3.1834377, 4.5711131),
    "jacobi": (train_entry("coconut", "base", 2, parallel_iterations=1), 3.1979995, 6.3963327),
    "projector": (train_entry("coconut", "base", 2, thought="projector"), 3.2030805, 6.544456),
    "marked": (train_entry("coconut", "base", 2, markers=True, c_thought=2), 3.1358657, 5.7524333),
}
"""By entry: its keys, and loss and gradient norm of its first update."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which every entry has trained two updates from the untouched model."""
    entries = {name: fields | {"max_updates": 2} for name, (fields, _, _) in FIRST_UPDATES.items()}
    changes = {"curriculum": entries, "latent.max_latent_stage": 3}
    made = make_project(tmp_path_factory.mktemp("numbers") / "project", changes)
    run_stages([made], "code", "params", "preprocess", "base", "encode", "train")
    return made


def test_the_first_update_of_every_method_has_its_known_numbers(project: Path) -> None:
    found, expected = {}, {}
    for name, (_, loss, grad_norm) in FIRST_UPDATES.items():
        with (project / "outputs" / name / "updates.csv").open(encoding="utf-8") as file:
            first, second = csv.DictReader(file)
        assert (first["update"], second["update"]) == ("1", "2")
        assert float(second["loss"]) != float(first["loss"])
        found[name] = (float(first["loss"]), float(first["grad_norm"]))
        expected[name] = (loss, grad_norm)
    assert found == {name: pytest.approx(numbers, rel=1e-5) for name, numbers in expected.items()}, found


def test_the_numbers_differ_from_method_to_method() -> None:
    """A number that two methods share would guard neither."""
    numbers = [numbers for _, *numbers in FIRST_UPDATES.values()]
    assert len({loss for loss, _ in numbers}) == len(numbers)


def plain_nll(reasoner: Reasoner, example: Example, num_steps: int, num_thoughts: int) -> tuple[Tensor, int]:
    """Read one example the slow way: no batch, no cache, everything anew for every thought."""
    texts = [f"{example.question}\n", *(f"{step}\n" for step in example.steps[num_steps:]), f"### {example.answer}"]
    question, *rest = (reasoner.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    target = [*chain.from_iterable(rest), reasoner.tokenizer.eos_token_id]
    embed, model = reasoner.model.get_input_embeddings(), reasoner.model
    embeds_TD = embed(torch.tensor(question))
    for _ in range(num_thoughts):
        hidden_TD = model.base_model(inputs_embeds=embeds_TD[None], use_cache=False).last_hidden_state[0]
        embeds_TD = torch.cat([embeds_TD, hidden_TD[-1:]])
    num_read = len(embeds_TD)
    embeds_TD = torch.cat([embeds_TD, embed(torch.tensor(target))])
    logits_TV = model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0]
    return functional.cross_entropy(logits_TV[num_read - 1 : -1], torch.tensor(target), reduction="sum"), len(target)


def gradients(reasoner: Reasoner, nll: Tensor) -> dict[str, Tensor]:
    reasoner.model.zero_grad()
    nll.backward()
    return {name: weight.grad.clone() for name, weight in reasoner.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("latent_stage", [0, 1, 3])
def test_loss_and_gradient_are_those_of_reading_each_row_alone(project: Path, latent_stage: int) -> None:
    reasoner = Reasoner.from_pretrained(project / "outputs/coconut/checkpoint", max_latent_stage=3)
    nll, num_tokens = reasoner.nll(EXAMPLES, latent_stage=latent_stage)
    ours = gradients(reasoner, nll)
    rows = [plain_nll(reasoner, example, latent_stage, latent_stage) for example in EXAMPLES]
    plain = torch.stack([row for row, _ in rows]).sum()
    assert num_tokens == sum(number for _, number in rows)
    assert nll.item() == pytest.approx(plain.item(), rel=1e-5)
    theirs = gradients(reasoner, plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)
