"""The precision of products, and what counts as out of memory."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from coconut.config.params import load_params
from coconut.devices import build_accelerator, evaluation_precision, is_out_of_memory
from coconut.model.feedback import build_feedback
from coconut.training.objective import Objective
from families import build_family
from update_of_peers import make_views

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


def test_deterministic_algorithms_are_taken_exactly_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found = []
    for is_asked in (False, True, False):
        build_accelerator(dataclasses.replace(RUNTIME, deterministic=is_asked), "fp32")
        found.append((torch.are_deterministic_algorithms_enabled(), "CUBLAS_WORKSPACE_CONFIG" in os.environ))
    assert found == [(False, False), (True, True), (False, True)]


@pytest.mark.parametrize(
    ("capabilities", "asked", "taken"),
    [
        ({"architecture": "x86_64"}, "bf16", "fp32"),
        ({"architecture": "x86_64", "avx512_bf16": False}, "bf16", "fp32"),
        ({"architecture": "x86_64"}, "fp32", "fp32"),
        ({"architecture": "x86_64"}, "tf32", "tf32"),
        ({"architecture": "x86_64", "avx512_bf16": True}, "bf16", "bf16"),
        ({"architecture": "x86_64", "amx_bf16": True}, "bf16", "bf16"),
        ({"architecture": "aarch64"}, "bf16", "bf16"),
    ],
)
def test_evaluation_takes_fp32_where_a_cpu_has_no_instructions_for_bf16(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], asked: str, taken: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert evaluation_precision(RUNTIME, asked) == taken


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_nothing_that_an_update_does_lacks_a_deterministic_algorithm(family: str) -> None:
    """As far as a CPU knows: there the mode changes no byte."""
    gradients = []
    for is_asked in (False, True):
        accelerator = build_accelerator(dataclasses.replace(RUNTIME, deterministic=is_asked), "fp32")
        model = build_family(family, 256, tie_word_embeddings=True)
        one = Objective(model, build_feedback("hidden[-1]", model), accelerator, 0, 2)
        one.accumulate(make_views(num_thoughts=2), dict(model.named_parameters()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    build_accelerator(RUNTIME, "fp32")
    assert torch.equal(*gradients)


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
