"""conv2d, differentiable any number of times: what it takes, and where native PyTorch runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gdfast.backends import chosen, fall_back
from gdfast.geometry import integer, named_padding, pair
from gdfast.ops.casts import autocast
from gdfast.ops.conv2d_autograd import conv
from gdfast.ops.conv2d_planned import layer_of, learn

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    tensors = input, weight, bias
    key, layer = layer_of(tensors, stride, padding, dilation, groups, backend)
    if layer is not None:
        return layer.run(tensors)
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups,
            backend=backend,
        )  # fmt: skip
    backend = chosen(backend)
    if backend == "reference" or not are_tensors(input, weight, bias):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if reason := why_native(input, weight):
        fall_back("conv2d", backend, reason)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = autocast(input, weight, bias)
    arguments = *settings("conv2d", weight, stride, padding, dilation, groups), backend
    if input.dim() == 3:
        return conv(input.unsqueeze(0), weight, bias, *arguments).squeeze(0)
    output = conv(input, weight, bias, *arguments)
    if key is not None:
        learn(key, (input, weight, bias), arguments)
    return output


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
