"""The numbers of one update, kept: a change that moves them changes the method, or the arithmetic.

When to update them: after a change that is *meant* to change what an update is (the loss, the views, the order of rows,
the optimizer, the model of `tiny_models`), or a new version of torch that draws other weights. Then check why by
hand, write the new numbers from the failure's message, and say in LOG.md what moved them. Never update them because of
a change that was meant to be one of speed or structure: such a change has a mistake.

The tolerances are those of other CPUs and other numbers of threads, which add up in another order.
"""

import pytest
import torch

from coconut.config.params import parse_params
from test_config import shipped_tree
from test_loop import make_entry, make_trainer

LOSS, GRADIENT_NORM = 4.229177, 3.096691
FIRST_WEIGHTS = [-0.091897, 0.002732, 0.05779, -0.030222]


@pytest.mark.parametrize("micro_batch", ["auto", 3])
def test_the_first_update_has_its_known_numbers(micro_batch: str | int) -> None:
    entry = make_entry(parse_params(shipped_tree()), warmup_updates=0, lr=1e-2, max_grad_norm=None)
    trainer = make_trainer(parse_params(shipped_tree()), entry, micro_batch=micro_batch)
    trainer.update(list(range(8)))
    sums, weight = trainer.position.sums, trainer.model.get_input_embeddings().weight
    assert sums.loss == pytest.approx(LOSS, rel=1e-5)
    assert sums.grad_norm == pytest.approx(GRADIENT_NORM, rel=1e-4)
    # Row 2 is a token of several rows; Adam's first step moves each weight by lr, whatever its gradient's size.
    assert weight[2, :4].tolist() == pytest.approx(FIRST_WEIGHTS, abs=1e-4)
    assert (sums.parts["nll"][1], sums.num_latents) == (33, 17)


def test_the_numbers_depend_on_the_update() -> None:
    """What the test above measures moves with what it is meant to guard."""
    entry = make_entry(parse_params(shipped_tree()), warmup_updates=0, lr=1e-2)
    one, other = (make_trainer(parse_params(shipped_tree()), entry, seed=seed) for seed in (0, 0))
    one.update(list(range(8)))
    other.update(list(range(1, 9)))
    assert one.position.sums.loss != pytest.approx(other.position.sums.loss, rel=1e-4)
    assert not torch.equal(*(t.model.get_input_embeddings().weight for t in (one, other)))
