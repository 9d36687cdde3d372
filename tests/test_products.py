"""Products through oneDNN equal torch's own, in any layout."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from coconut.model.fast import products


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
