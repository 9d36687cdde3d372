"""Dropout's masks belong to rows and positions: the gradient of an update does not depend on how it is cut."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from arms import make_method, rows_of
from coconut.data.collator import collate
from coconut.data.views import IGNORED, View
from coconut.model.dropout import RowDropout, draw_keys, has_dropout
from coconut.model.feedback import Feedback
from coconut.model.latent import latent_nll
from coconut.model.passes import PassOptions
from coconut.training.objective import Objective
from families import build_family
from marks import slow_but
from ways import WAYS

MODELS = {
    "gpt2": {},  # .1 everywhere, as published.
    "llama": {"attention_dropout": 0.1},  # Keys shared by two heads.
    "opt": {},  # Calls the function, not the module.
    "mistral": {"attention_dropout": 0.1, "sliding_window": 4},
}
LENGTHS = [(5, 3, 4), (9, 3, 2), (2, 1, 6), (4, 0, 5), (7, 2, 3), (3, 3, 3)]


def make_views() -> list[View]:
    views = []
    for row, (num_question, num_thoughts, num_target) in enumerate(LENGTHS):
        length = num_question + num_thoughts + num_target
        ids = [(5 + 13 * row + 7 * column) % 90 for column in range(length)]
        labels = [IGNORED] * (length - num_target) + ids[length - num_target :]
        views.append(View(ids, labels, num_question, num_thoughts, num_thoughts))
    return views


def gradient(
    model: PreTrainedModel, rows: list[int], size: int, options: PassOptions, keys: Tensor | None, thoughts: Feedback
) -> Tensor:
    views = make_views()
    model.zero_grad()
    for start in range(0, len(rows), size):
        taken = rows[start : start + size]
        batch = collate([views[row] for row in taken], pad_id=0)
        latent_nll(model, thoughts, batch, options, keys_B=None if keys is None else keys[taken])[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("checkpoint_activations", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", slow_but(["gpt2"], MODELS))
def test_rows_alone_and_in_any_batch_have_the_same_masks(family: str, way: str, checkpoint_activations: bool) -> None:
    model = build_family(family, 64, **MODELS[family]).train()
    keys = torch.arange(len(LENGTHS))
    alone = gradient(model, [0, 1, 2, 3, 4, 5], 1, WAYS["plain"], keys, Feedback())
    options = replace(WAYS[way], checkpoint_activations=checkpoint_activations)
    for rows, size in [([0, 1, 2, 3, 4, 5], 6), ([5, 3, 1, 0, 2, 4], 2)]:
        assert difference(gradient(model, rows, size, options, keys, Feedback()), alone) < 1e-6
    assert difference(gradient(model, [0, 1, 2, 3, 4, 5], 6, options, keys + 1, Feedback()), alone) > 0.1


def test_all_rounds_of_jacobi_iteration_have_the_same_masks() -> None:
    model = build_family("gpt2", 64).train()
    keys, rows = torch.arange(len(LENGTHS)), [0, 1, 2, 3, 4, 5]
    alone = gradient(model, rows, 1, WAYS["plain"], keys, Feedback())
    together = gradient(model, rows, 6, WAYS["narrow"], keys, Feedback(parallel_iterations=3))
    assert difference(together, alone) < 1e-6


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_an_updates_gradient_does_not_depend_on_micro_batches(micro_batch: int) -> None:
    model = build_family("gpt2", 64).train()

    def accumulate(size: int) -> Tensor:
        torch.manual_seed(3)
        objective = Objective(model, Feedback(), Accelerator(cpu=True), 0, size, make_method())
        objective.accumulate(rows_of(make_views()), dict(model.named_parameters()))
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert difference(accumulate(micro_batch), accumulate(6)) < 1e-5


def test_masks_are_as_often_zero_as_they_should_be_and_alike_nowhere() -> None:
    torch.manual_seed(0)
    module = nn.Dropout(0.1)
    position_ids_BT = torch.arange(64).expand(32, 64)
    with RowDropout(nn.Sequential(module), draw_keys(32), position_ids_BT).active(slice(0, 64)):
        drawn = [
            module(torch.ones(32, 64, 256)),
            functional.dropout(torch.ones(32, 64, 256), 0.1),
            functional.dropout(torch.ones(32, 8, 64, 64), 0.1),
        ]
    kept = [(mask > 0).double() - 0.9 for mask in drawn]
    for mask, centred in zip(drawn, kept, strict=True):
        assert mask.mean() == pytest.approx(1, abs=2e-3)
        assert centred.mean(dim=0).std() == pytest.approx((0.09 / 32) ** 0.5, rel=0.02)
        for dim in range(mask.dim()):
            assert abs((centred * centred.roll(1, dims=dim)).mean()) < 0.09 * 0.02, dim
    assert abs((kept[0] * kept[1]).mean()) < 0.09 * 0.02


def test_nothing_is_drawn_for_a_model_without_dropout() -> None:
    assert not has_dropout(build_family("llama", 64))
    assert has_dropout(build_family("gpt2", 64))
    assert has_dropout(build_family("opt", 64))


def test_a_model_in_evaluation_mode_drops_nothing() -> None:
    model = build_family("gpt2", 64)
    keys, rows = torch.arange(len(LENGTHS)), [0, 1, 2, 3, 4, 5]
    wanted = gradient(model, rows, 6, PassOptions(), None, Feedback())
    assert torch.equal(gradient(model, rows, 6, PassOptions(), keys, Feedback()), wanted)
