"""Products through oneDNN equal torch's own, in any layout; weights in its own order give the same bits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from coconut.data.collator import collate
from coconut.data.views import IGNORED, View
from coconut.model.fast import products
from coconut.model.fast.reordered import ReorderedWeights
from coconut.model.feedback import Feedback
from tiny_models import build_tiny_model
from ways import STORE, hidden_states


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "is_foreign_to_mkl", lambda: request.param)
    return bool(request.param)


def draw(num_rows: int = 128, num_columns: int = 96, *, is_transposed: bool = False, seed: int = 0) -> Tensor:
    shape = (num_columns, num_rows) if is_transposed else (num_rows, num_columns)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.t() if is_transposed else drawn


@pytest.mark.parametrize("num_rows", [1, 8, 300])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("layouts", ["contiguous", "weight", "input", "both"])
@pytest.mark.usefixtures("library")
def test_products_equal_those_in_float64(num_rows: int, has_bias: bool, layouts: str) -> None:
    input = draw(num_rows, 96, is_transposed=layouts in ("input", "both"))
    weight = draw(128, 96, is_transposed=layouts in ("weight", "both"), seed=1)
    bias = draw(1, 128, seed=2)[0] if has_bias else None
    with torch.no_grad():
        found = products.linear(input, weight, bias, min_multiplications=0)
    exact = functional.linear(input.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4


@pytest.mark.parametrize("num_rows", [1, 8, 300])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.usefixtures("library")
def test_an_activation_within_a_product_is_the_one_after_it(num_rows: int, is_transposed: bool) -> None:
    """From where it is all but 0 to where it is all but the product itself, with weights in oneDNN's order too."""
    input, bias = 2 * draw(num_rows, 96), draw(1, 128, seed=2)[0]
    weight, kept = draw(128, 96, is_transposed=is_transposed, seed=1) / 4, ReorderedWeights(min_reads=0)
    with torch.no_grad():
        found = [
            products.linear(input, weight, bias, min_multiplications=0, reordered=reordered, then_gelu=True)
            for reordered in (None, kept)
        ]
    product = functional.linear(input.double(), weight.double(), bias.double())
    exact = functional.gelu(product, approximate="tanh")
    assert product.min() < -5 < 5 < product.max()
    for one in found:
        assert one.dtype == torch.float32
        assert (one - exact).abs().max() < 1e-5


@pytest.mark.usefixtures("library")
def test_outside_of_autograd_functions_gradients_are_recorded() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    products.linear(torch.ones(2, 3), weight, min_multiplications=0).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 3), 2.0))


@pytest.mark.usefixtures("library")
def test_the_same_product_gives_the_same_bytes() -> None:
    input, weight = torch.randn(64, 96), torch.randn(128, 96)
    with torch.no_grad():
        assert len({products.linear(input, weight, min_multiplications=0).numpy().tobytes() for _ in range(5)}) == 1


def multiply(
    weight: Tensor, reordered: ReorderedWeights | None, num_rows: int = 8, bias: Tensor | None = None
) -> Tensor:
    input = draw(num_rows, weight.shape[1], seed=num_rows)[:, None]
    with torch.no_grad():
        return products.linear(input, weight, bias, min_multiplications=0, reordered=reordered)


def is_reordered(kept: ReorderedWeights, weight: Tensor) -> bool:
    return kept.of(weight, num_rows=2).is_mkldnn


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "is_foreign_to_mkl", lambda: True)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7, 8, 16, 33, 64, 300])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.usefixtures("onednn")
def test_a_reordered_weight_gives_the_same_bits(num_rows: int, is_transposed: bool, has_bias: bool) -> None:
    for shape in ((128, 96), (51, 77), (5, 256)):
        weight = draw(*shape, is_transposed=is_transposed)
        bias = torch.linspace(-1, 1, shape[0]) if has_bias else None
        kept = ReorderedWeights(min_reads=0)
        wanted = multiply(weight, None, num_rows, bias)
        for _ in range(3):
            assert torch.equal(multiply(weight, kept, num_rows, bias), wanted)
        assert is_reordered(kept, weight)


@pytest.mark.usefixtures("onednn")
def test_a_weight_is_reordered_once_it_has_been_read_often() -> None:
    weight, kept = draw(), ReorderedWeights(min_reads=3)
    assert [kept.of(weight, num_rows).is_mkldnn for num_rows in (2, 1, 5, 1, 2, 1, 2, 1, 9)] == [
        *(False for _ in range(6)),
        True,
        False,  # A single row.
        True,
    ]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.usefixtures("onednn")
def test_a_weight_that_has_changed_is_noticed(is_transposed: bool) -> None:
    weight, kept = torch.nn.Parameter(draw()), ReorderedWeights(min_reads=1)

    def seen() -> Tensor:
        return weight.t() if is_transposed else weight

    for _ in range(3):
        multiply(seen(), kept)
    assert is_reordered(kept, seen())
    with torch.no_grad():
        weight.mul_(2)
    for _ in range(4):
        assert torch.equal(multiply(seen(), kept), multiply(seen(), None))
    assert is_reordered(kept, seen())


@pytest.mark.usefixtures("onednn")
def test_no_more_is_copied_than_was_allowed() -> None:
    first, second, third = (draw(num, 8) for num in (10, 11, 5))
    kept = ReorderedWeights(min_reads=0, max_elements=10 * 8 + 5 * 8)
    assert [is_reordered(kept, weight) for weight in (first, second, third)] == [True, False, True]
    assert [is_reordered(kept, weight) for weight in (first, second, third)] == [True, False, True]
    first.add_(1)
    assert is_reordered(kept, first)  # In the room of its former copy.


@pytest.mark.usefixtures("onednn")
def test_a_weight_in_the_place_of_another_is_not_taken_for_it() -> None:
    kept = ReorderedWeights(min_reads=0)
    for number in range(20):
        weight = draw(64, 512) * number
        assert torch.equal(multiply(weight, kept), multiply(weight, None))
        del weight  # Its memory would be the next one's.


@pytest.mark.usefixtures("onednn")
def test_a_part_of_a_weight_is_not_taken_for_the_whole() -> None:
    weight, kept = draw(), ReorderedWeights(min_reads=0)
    for part in (weight, weight[:64], weight[:, :48], weight.t()[:64], weight[64:], weight):
        assert torch.equal(multiply(part, kept), multiply(part, None))


@pytest.mark.usefixtures("onednn")
def test_gradients_leave_weights_as_they_are() -> None:
    weight, kept = torch.nn.Parameter(draw()), ReorderedWeights(min_reads=0)
    products.linear(torch.ones(2, 96), weight, min_multiplications=0, reordered=kept).sum().backward()
    assert torch.equal(weight.grad, torch.full((128, 96), 2.0))


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.usefixtures("onednn")
def test_batches_of_a_model_read_reordered_weights_and_find_the_same(family: str) -> None:
    model = build_tiny_model(family).eval()
    batch = collate(
        [View([5, 6, 7, 8, 9, 4], [IGNORED] * 6, 4, 2, 2), View([9, 8, 7, 4], [IGNORED] * 4, 2, 2, 2)], pad_id=0
    )
    kept = ReorderedWeights(min_reads=4)
    with torch.no_grad():
        wanted = hidden_states(model, Feedback(), batch, STORE)
        for _ in range(3):
            assert torch.equal(hidden_states(model, Feedback(), batch, replace(STORE, reordered=kept)), wanted)
    assert kept.num_left < ReorderedWeights().num_left
