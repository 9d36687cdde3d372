"""The precision of products, and what counts as out of memory."""

import dataclasses
from pathlib import Path

import pytest
import torch

from coconut.config.params import load_params
from coconut.devices import build_accelerator, is_out_of_memory

RUNTIME = dataclasses.replace(load_params(Path(__file__).parents[1] / "params.yaml").runtime, device="cpu")


def test_tf32_is_on_exactly_where_it_is_asked_for() -> None:
    """An entry in tf32 must not leave it on for the next thing that the process does."""
    found = []
    for precision in ("fp32", "tf32", "fp32", "tf32", "fp32"):
        build_accelerator(RUNTIME, precision)
        found.append(torch.backends.cuda.matmul.allow_tf32)
    assert found == [False, True, False, True, False]


def test_on_a_cpu_tf32_is_fp32_to_the_last_bit() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 64), torch.randn(64, 64)
    products = []
    for precision in ("fp32", "tf32"):
        with build_accelerator(RUNTIME, precision).autocast():
            products.append(left @ right)
    build_accelerator(RUNTIME, "fp32")
    assert torch.equal(*products)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
    ],
)
def test_the_texts_of_drivers_and_libraries_are_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
