"""A device that is not the CPU, for machines without a GPU: importing this once makes `pretend:0` of the process.

Its tensors lie in the CPU's memory under another device's name (torch's key `PrivateUse1`): a DLPack capsule is
relabelled, so that they have storages, views and autograd of their own. An operation runs in `_run_on_cpu`, which
refuses what CUDA refuses, above all tensors of two devices.

What it cannot show: speed; anything asynchronous, since every operation is done when it returns; CUDA's own kernels
and their rounding; memory that runs out; random numbers, which are the CPU's; dropout inside of attention kernels.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import library as registry
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
_KEY = "PrivateUse1"
_CPU, _EXTENSION = 1, 12
"""DLPack's numbers of devices."""
_TAKES_CPU_INDICES = ("index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put")
"""Operations that take indices of the CPU on CUDA too."""

_address_of = ctypes.pythonapi.PyCapsule_GetPointer
_address_of.restype, _address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Module(_DummyBackendModule):
    """What torch asks of a backend's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_rng_state(self, device: Any = None) -> Tensor:  # noqa: ARG002
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:  # noqa: ARG002
        torch.set_rng_state(state)

    def set_device(self, device: Any) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
# `Module.to` would make new parameters on such a device and part tied ones, which it does not on CUDA.
torch.__future__.set_swap_module_params_on_conversion(True)
DEVICE = torch.device(NAME, 0)


def _relabel(tensor: Tensor, device: int) -> Tensor:
    """Return the same memory as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor)
    address = _address_of(capsule, b"dltensor")  # The pointer to the data, and then the device: type and number.
    ctypes.c_int32.from_address(address + 8).value = device
    ctypes.c_int32.from_address(address + 12).value = 0
    return torch._C._from_dlpack(capsule)


def _is_here(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _to_cpu(value: Any) -> Any:
    return _relabel(value, _CPU) if _is_here(value) else value


def _from_cpu(value: Any) -> Any:
    return _relabel(value, _EXTENSION) if isinstance(value, Tensor) and value.device.type == "cpu" else value


# --- what is counted ------------------------------------------------------------------------

_counts: list[Counter[str]] = []
_FREE = ("empty", "set_", "resize_", "detach", "_reshape_alias", "lift_fresh")
"""Beginnings of the names of operations that launch nothing on CUDA; views do not either."""
_ASKS = ("_local_scalar_dense", "nonzero", "_unique", "unique", "masked_select", "equal", "is_nonzero")
"""Beginnings of the names of operations whose result, or its size, the host must know before it goes on."""


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count operations, and synchronisations: what CUDA would let the host wait for; each also by its name."""
    _counts.append(Counter())
    try:
        yield _counts[-1]
    finally:
        _counts.pop()


def _add(*names: str) -> None:
    if _counts:
        _counts[-1].update(names)


def _count(op: Any, name: str, args: Any) -> None:
    if not _counts:
        return
    waits = name.startswith(_ASKS)
    if name == "_copy_from":
        # From the device to the host always; the other way only if the caller did not say that it need not wait.
        waits = not _is_here(args[1]) or (not _is_here(args[0]) and not (len(args) > 2 and args[2]))
        waits = waits and args[0].numel() > 0  # CUDA leaves copies of nothing out.
    if name.rstrip("_") in _TAKES_CPU_INDICES:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        waits = any(index.dtype == torch.bool or not _is_here(index) for index in indices)
    if not op.is_view and not name.startswith(_FREE):
        _add("operations", name)
    if waits:
        _add("synchronisations", f"waits in {name}")


# --- operations -----------------------------------------------------------------------------


def _run_on_cpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the memory of its tensors, and give its results to this device."""
    name = op._schema.name.removeprefix("aten::")
    if not op._schema.name.startswith("aten::") or "mkldnn" in name or name.endswith("_for_cpu"):
        raise NotImplementedError(f"Could not run '{op._schema.name}' on '{NAME}': it is the CPU's own")
    _count(op, name, args)
    if name in ("_copy_from", "_copy_from_and_resize"):
        _to_cpu(args[1]).copy_(_to_cpu(args[0]))
        return args[1]
    if name == "set_":
        args[0].data = args[1] if isinstance(args[1], Tensor) else _over_storage(args[0].dtype, *args[1:])
        return args[0]
    if name == "resize_":
        args[0].data = _from_cpu(torch.empty(args[1], dtype=args[0].dtype))
        return args[0]
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    _refuse_mixed(op, name, tensors)
    return _compute(op, args, kwargs, tensors)


def _refuse_mixed(op: Any, name: str, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        is_number = tensor.dim() == 0
        if not (_is_here(tensor) or is_number or name.rstrip("_") in _TAKES_CPU_INDICES):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {NAME} and {tensor.device}: {op}"
            )


def _compute(op: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    twins = {id(tensor): _to_cpu(tensor) for tensor in tensors}
    # The operation resizes an empty `out`, which memory that is lent cannot be.
    has_out = "out" in op._schema.overload_name
    empty = [one for one in pytree.tree_leaves(kwargs) if isinstance(one, Tensor) and not one.numel() and has_out]
    twins |= {id(tensor): torch.empty(0, dtype=tensor.dtype) for tensor in empty}
    # Numbers come as such even where the schema wants a tensor.
    wants = [str(argument.type) == "Tensor" for argument in op._schema.arguments]
    numbers = (int, float)
    args = [torch.tensor(v) if isinstance(v, numbers) and want else v for want, v in zip(wants, args, strict=False)]
    args, kwargs = pytree.tree_map(lambda v: twins.get(id(v), v) if isinstance(v, Tensor) else v, (args, kwargs))
    kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items() if k != "pin_memory"}
    result = op(*args, **kwargs)
    for tensor in empty:
        tensor.data = _from_cpu(twins[id(tensor)])
    given = {id(twins[id(tensor)]): tensor for tensor in tensors}  # What was changed in place is returned itself.
    return pytree.tree_map(lambda v: given[id(v)] if id(v) in given else _from_cpu(v), result)


def _over_storage(dtype: torch.dtype, storage: Any, offset: int = 0, size: Any = (), stride: Any = None) -> Tensor:
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    tensor = torch.empty(0, dtype=dtype).set_(memory, offset, size, stride)
    tensor._keeps = storage  # The memory must not go before the tensor does.
    return _from_cpu(tensor)


_everything, _aten = registry.Library("_", "IMPL"), registry.Library("aten", "IMPL")
_everything.fallback(_run_on_cpu, dispatch_key=_KEY)
_everything.fallback(registry.fallthrough_kernel, dispatch_key=f"Autocast{_KEY}")


# --- attention, which has no kernel that a fallback could run with gradients -----------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:4])
        ctx.rest = inputs[4:]
        _add("operations", "attention")
        if any(tensor is not None and not _is_here(tensor) for tensor in inputs[:4]):
            raise RuntimeError("Expected all tensors to be on the same device: scaled_dot_product_attention")
        given = (None if tensor is None else _to_cpu(tensor.detach()) for tensor in inputs[:4])
        return _from_cpu(_Attention.compute(*given, *inputs[4:]).contiguous())

    @staticmethod
    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, causal: bool, scale: Any, gqa: bool) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=gqa)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _add("operations", "attention backward")
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [_to_cpu(tensor.detach()).requires_grad_() for tensor in inputs]
            output = _Attention.compute(*inputs, _to_cpu(mask), *ctx.rest)
            found = torch.autograd.grad(output, inputs, _to_cpu(gradients[0]))
        return *(_from_cpu(gradient.contiguous()) for gradient in found), *[None] * 4


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    assert dropout_p == 0.0, "this device has no dropout in attention"
    return _Attention.apply(query, key, value, attn_mask, is_causal, scale, enable_gqa)


_aten.impl("scaled_dot_product_attention", _attend, f"Autograd{_KEY}")


# --- what is one kernel on CUDA, and several operations on a device that torch knows nothing of --


def _rms_norm_backward(
    gradient: Tensor, input: Tensor, shape: list[int], scale: Tensor, weight: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """As torch gives no CPU this operation. `scale`: what forward has multiplied the input by, before the weight."""
    del shape, mask
    _add("operations", "_fused_rms_norm_backward")
    gradient, input, scale, weight = (_to_cpu(one) for one in (gradient, input, scale, weight))
    normed, weighted = input * scale, gradient * weight
    input_gradient = scale * (weighted - normed * (weighted * normed).mean(dim=-1, keepdim=True))
    return _from_cpu(input_gradient), _from_cpu((gradient * normed).flatten(0, -2).sum(dim=0))


for _name in ("native_layer_norm", "silu_backward", "_fused_rms_norm"):
    _aten.impl(_name, partial(_run_on_cpu, getattr(torch.ops.aten, _name).default), _KEY)
_aten.impl("_fused_rms_norm_backward", _rms_norm_backward, _KEY)


# --- autocast, by CUDA's lists, which are not the CPU's ----------------------------------------

_IN_LOW_PRECISION = "matmul addmm addmv addbmm baddbmm bmm mm mv linear scaled_dot_product_attention"
_IN_FULL_PRECISION = (
    "softmax.int log_softmax.int layer_norm native_layer_norm nll_loss cumsum exp log pow.Tensor_Scalar"
    " pow.Tensor_Tensor rsqrt sum sum.dim_IntList cross_entropy_loss rms_norm"
)


def _autocast(op: Any, *, is_full: bool) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        if not (_is_here(value) and value.is_floating_point() and value.dtype != torch.float64):
            return value
        return value.to(torch.float32 if is_full else torch.get_autocast_dtype(NAME))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{_KEY}"))
        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = pytree.tree_map(cast, (args, kwargs))
            return op(*args, **kwargs)

    return kernel


for _names, _is_full in ((_IN_LOW_PRECISION, False), (_IN_FULL_PRECISION, True)):
    for _name in _names.split():
        _packet, _, _overload = _name.partition(".")
        _operation = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
        _aten.impl(_name, _autocast(_operation, is_full=_is_full), f"Autocast{_KEY}")
