"""What calls on ordinary tensors in eager code are spared: the dispatcher, functorch's wrappers.

Each of our operations is known to the dispatcher, for torch.compile, export and whatever else looks
at operations on their way. Where nothing looks, it would only find our kernel again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import has_torch_function_variadic

from gdfast import native

_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_functional = torch._is_functional_tensor
_dispatch_modes = torch._C._len_torch_dispatch_stack
_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")


def are_ordinary(*tensors: Any) -> bool:
    """Whether tensors (or None) have memory with their values, and no mode looks at operations.

    Sparse tensors, those on the meta device, zero and negated ones, wrappers of functorch and of
    functionalization, and subclasses' are not ordinary.
    """
    if dispatch_modes():
        return False
    return _native_facts(*tensors) is not None or all(map(_is_ordinary, tensors))


def dispatch_modes() -> int:
    """How many modes look at operations, without the one that records a step: that one is told of
    what kernels do, and records an ordinary step."""
    modes = _dispatch_modes()
    return modes - 1 if modes and native.recorder() else modes


def _is_ordinary(tensor: Any) -> bool:
    if tensor is None:
        return True
    kind = type(tensor)
    if kind is Tensor:
        if _is_wrapped(tensor) or _is_functional(tensor):
            return False
    elif kind is not Parameter:
        return False
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return not (tensor.is_neg() or tensor._is_zerotensor())


def tensor_facts(*tensors: Tensor | None) -> Any:
    """What decides which kernel runs on tensors, as a key: sizes, strides, dtypes and devices."""
    facts = _native_facts(*tensors)
    if facts is not None:
        return facts
    return tuple(t is not None and (t.shape, t.stride(), t.dtype, t.device) for t in tensors)


def ordinary_facts(*tensors: Any) -> Any:
    """`tensor_facts` of ordinary tensors (or None), else None."""
    facts = _native_facts(*tensors)
    if facts is not None:
        return facts
    return tensor_facts(*tensors) if all(map(_is_ordinary, tensors)) else None


def is_watched() -> bool:
    """Whether something looks at operations on their way, or transforms them."""
    return (
        torch.compiler.is_compiling()
        or dispatch_modes() > 0
        or batched_gradients()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def batched_gradients() -> bool:
    """Whether `torch.autograd.grad(..., is_grads_batched=True)` or torch.func calls."""
    return _is_included(_VMAP_MODE) or torch._C._are_functorch_transforms_active()


def _no_facts(*tensors: Any) -> None:
    """Asks nothing: Python's way is gone then."""


def _unwatched_facts(*tensors: Any) -> Any:
    if is_watched() or has_torch_function_variadic(*tensors):
        return None
    return ordinary_facts(*tensors)


def _connect() -> tuple[Callable[..., Any], Callable[..., Any]]:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if native.cpu is None or exchange is None:
        return _no_facts, _unwatched_facts
    watchers = (
        _dispatch_modes,
        torch._C._len_torch_function_stack,
        partial(_is_included, _VMAP_MODE),
        torch._C._are_functorch_transforms_active,
        torch._C._get_tracing_state,
        lambda: forward_ad._current_level >= 0,
    )
    try:
        native.cpu.watch_tensors(
            exchange, (Tensor, Parameter), (torch._C.TensorBase.is_neg,),
            torch._C._increment_version, watchers,
        )  # fmt: skip
    except ValueError:  # another version of the interface
        return _no_facts, _unwatched_facts
    return native.cpu.tensor_facts, native.cpu.unwatched_facts


# Of ordinary tensors with elements, in a tenth of the time; None for all others. And the same in
# eager code that nobody looks at, None elsewhere.
_native_facts, unwatched_facts = _connect()


def run_operation(
    op: Callable[..., Any], kernel: Callable[..., Any], inputs: tuple[Any, ...],
    *tensors: Tensor | None,
) -> Any:  # fmt: skip
    """Runs an operation without recording a gradient formula; `tensors` are those of its inputs."""
    if are_ordinary(*tensors):
        return kernel(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def apply_to_ordinary(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for inputs of which all tensors are ordinary.

    They are no wrappers of functorch, for which torch's own looks at every argument.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply
