"""conv2d, differentiable any number of times: what it takes, and where native PyTorch runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gdfast.backends import chosen, fall_back, tuning
from gdfast.geometry import integer, named_padding, pair
from gdfast.ops import conv2d_dispatch, in_backward
from gdfast.ops.conv2d_autograd import conv
from gdfast.ops.conv2d_layer import Layer
from gdfast.ops.ordinary import is_watched, ordinary_facts

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Asked once: torch.compile of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla"))
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolves images with filters, as `torch.nn.functional.conv2d` does and with its signature.

    input [N, C, H, W] or [C, H, W], weight [K, C / groups, R, S], bias [K], all of one dtype:
    float32, float64, bfloat16 or float16; others run on native PyTorch. stride, padding and
    dilation count pixels: numbers or pairs (height, width); padding may be "same" or "valid" too.
    Returns [N, K, P, Q] or [K, P, Q], channels_last where the input or the weight is.

    Raises RuntimeError for sizes, dtypes and devices that do not fit together and values out of
    range, TypeError for arguments of another type, ValueError for numbers of more than 64 bits and
    an unknown backend, BackendError when the backend asked for by name cannot run this.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups,
            backend=backend,
        )  # fmt: skip
    backend = chosen(backend)
    if backend == "reference" or not are_tensors(input, weight, bias):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    is_plain = not (torch._C._is_any_autocast_enabled() or is_watched())
    if is_plain and (facts := ordinary_facts(input, weight, bias)) is not None:
        arguments = *settings("conv2d", weight, stride, padding, dilation, groups), backend
        key = facts, arguments, tuning.situation()
        layer = conv2d_dispatch.layers.get(key)
        if layer is not None:
            return layer(input, weight, bias)
        if input.dim() == 4 and input.dtype in _DTYPES:
            output = conv(input, weight, bias, *arguments)
            Layer.learn(key, input, weight, bias, arguments)
            return output
    if reason := why_native(input, weight):
        fall_back("conv2d", backend, reason)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = autocast(input, weight, bias)
    arguments = *settings("conv2d", weight, stride, padding, dilation, groups), backend
    if input.dim() == 3:
        return conv(input.unsqueeze(0), weight, bias, *arguments).squeeze(0)
    return conv(input, weight, bias, *arguments)


def settings(
    op: str, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
    """stride, padding, dilation and groups as the operations take them: pairs, sides, a number."""
    stride, dilation = pair("stride", stride, op), pair("dilation", dilation, op)
    if isinstance(padding, str):
        sides = named_padding(padding, weight.shape[2:], stride, dilation, op)
    else:
        rows, columns = pair("padding", padding, op)
        sides = rows, columns, rows, columns
    return stride, sides, dilation, integer("groups", groups, op)


def are_tensors(input: Any, weight: Any, bias: Any) -> bool:
    """Whether all are tensors; native says what else they should have been."""
    return (
        isinstance(input, Tensor)
        and isinstance(weight, Tensor)
        and (bias is None or isinstance(bias, Tensor))
    )


def why_native(input: Any, weight: Any) -> str:
    """Why no backend but native PyTorch's own operators takes a call, or ""."""
    if input.dtype not in _DTYPES:
        return f"no other backend takes {input.dtype}"
    if input.layout is not torch.strided or weight.layout is not torch.strided:
        return f"no other backend takes {input.layout} input with {weight.layout} weight"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms need operators that they know"
    if forward_ad._current_level >= 0:
        return "forward-mode AD needs operators that it knows"
    if torch._C._get_tracing_state() is not None:
        return "a traced model should run without gdfast"
    return ""


def autocast(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """What autocast makes of the arguments of aten.conv2d: all but float64 is lowered."""
    device = input.device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    cast: tuple[Any, ...] = tuple(
        tensor.to(dtype)
        if tensor is not None
        and tensor.dtype != dtype
        and tensor.device.type == device
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
        else tensor
        for tensor in (input, weight, bias)
    )
    if not torch.compiler.is_compiling() and in_backward.targets and cast[1] is not weight:
        in_backward.note_cast(cast[1])
    return cast
