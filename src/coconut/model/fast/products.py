"""Matrix products through the fastest library that this machine has for them.

Legend: I inputs, O outputs; `input` ends in I, whatever stands before.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from coconut.model.fast.thresholds import Thresholds

_MIN_MULTIPLICATIONS = Thresholds().min_multiplications


def linear(
    input: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    min_multiplications: int = _MIN_MULTIPLICATIONS,
) -> Tensor:
    """Multiply like `torch.nn.functional.linear` in any strides; inside autograd functions this is the fast one.

    In float32 torch takes MKL, which on processors that are not Intel's leaves half of their vector width unused:
    100 against 210 GFLOP/s on one core of an AMD EPYC with AVX-512.
    """
    if not torch.is_grad_enabled() and prefers_onednn(input, weight_OI.shape[0], min_multiplications):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight_OI, bias_O, "none", [], "")
        return product
    return functional.linear(input, weight_OI, bias_O)


def prefers_onednn(input: Tensor, num_outputs: int, min_multiplications: int = _MIN_MULTIPLICATIONS) -> bool:
    """Say whether oneDNN multiplies this faster than the library that torch would take."""
    return (
        input.dtype == torch.float32
        and input.numel() * num_outputs >= min_multiplications
        and input.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and is_foreign_to_mkl()
    )


@functools.cache
def is_foreign_to_mkl() -> bool:
    """Say whether this is an x86 processor of another maker than MKL's."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    info = Path("/proc/cpuinfo")
    return info.is_file() and "AuthenticAMD" in info.read_text(encoding="utf-8", errors="replace")
