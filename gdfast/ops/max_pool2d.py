"""max_pool2d, differentiable any number of times.

Its gradient is linear: grad_output goes where argmax points. The gradient of that picks the values
at argmax, by native PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from gdfast.backends import chosen, fall_back
from gdfast.backends.max_pool2d import indices
from gdfast.geometry import MaxPool2dGeometry, is_channels_last, pair
from gdfast.ops import max_pool2d_dispatch
from gdfast.ops.conv2d import why_native
from gdfast.ops.max_pool2d_dispatch import library
from gdfast.ops.ordinary import (
    apply_to_ordinary,
    are_ordinary,
    batched_gradients,
    run_operation,
)

_OP = "max_pool2d"
IntOrPair = int | list[int] | tuple[int, ...]


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """The largest value of each window of an image, as `torch.nn.functional.max_pool2d` has it.

    input [N, C, H, W] or [C, H, W] of float32, float64, bfloat16 or float16; others run on native
    PyTorch. kernel_size, stride (default: kernel_size), padding and dilation are numbers or pairs
    (height, width). Returns [N, C, P, Q] or [C, P, Q], channels_last where the input is. Of equal
    values the first in a window gets the gradient, and a NaN outdoes every number, as natively.

    Raises RuntimeError for sizes and values out of range, TypeError for arguments of another type,
    ValueError for numbers of more than 64 bits and an unknown backend, BackendError when the
    backend asked for by name cannot run this.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            max_pool2d, (input,), input, kernel_size, stride, padding, dilation, ceil_mode,
            backend=backend,
        )  # fmt: skip
    backend = chosen(backend)
    if backend == "reference" or not isinstance(input, Tensor):
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    if reason := why_native(input, input):
        fall_back(_OP, backend, reason)
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    arguments = *settings(kernel_size, stride, padding, dilation, ceil_mode), False, backend
    if input.dim() == 3:
        return pool(input.unsqueeze(0), *arguments).squeeze(0)
    return pool(input, *arguments)


def settings(
    kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> tuple[Any, ...]:
    """The arguments of `max_pool2d` as the operations take them: pairs, and a bool."""
    kernel = pair("kernel_size", kernel_size, _OP)
    return (
        kernel,
        kernel if stride is None or stride == [] else pair("stride", stride, _OP),
        pair("padding", padding, _OP),
        pair("dilation", dilation, _OP),
        bool(ceil_mode),
    )


def pool(input: Tensor, *arguments: Any) -> Tensor:
    """max_pool2d on checked arguments: kernel, stride, padding, dilation, ceil_mode, relu, backend.

    input [N, C, H, W]; with relu, negative values become 0 and get no gradient.
    """
    if torch.compiler.is_compiling():
        output: Tensor = torch.ops.gdfast.max_pool2d.default(input, *arguments)[0]
    elif not torch.is_grad_enabled():
        output = _run_forward(input, *arguments)[0]
    elif are_ordinary(input):
        output = _apply_to_ordinary(input, *arguments)
    else:
        output = MaxPool2dFunction.apply(input, *arguments)
    return output


def pool_grad(*inputs: Any) -> Tensor:
    """grad_input from grad_output, argmax, input size, its layout, arguments less relu, backend."""
    output: Tensor
    if torch.compiler.is_compiling():
        output = torch.ops.gdfast.max_pool2d_grad.default(*inputs)
    elif batched_gradients():
        # vmap knows native's operators, not ours.
        output = max_pool2d_dispatch.max_pool2d_grad(*(*inputs[:-1], "reference"))
    elif torch.is_grad_enabled():
        output = _MaxPool2dGradFunction.apply(*inputs)
    else:
        output = _run_grad(*inputs)
    return output


def _run_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    op, kernel = torch.ops.gdfast.max_pool2d.default, max_pool2d_dispatch.max_pool2d
    output: tuple[Tensor, Tensor] = run_operation(op, kernel, inputs, inputs[0])
    return output


def _run_grad(*inputs: Any) -> Tensor:
    op, kernel = torch.ops.gdfast.max_pool2d_grad.default, max_pool2d_dispatch.max_pool2d_grad
    output: Tensor = run_operation(op, kernel, inputs, *inputs[:2])
    return output


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *arguments, _, ctx.backend = inputs
    ctx.arguments = arguments
    ctx.input_size = input.shape
    ctx.input_channels_last = is_channels_last(input.shape, input.stride())
    ctx.save_for_backward(output[1])


def _backward_pool(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (argmax,) = ctx.saved_tensors
    grad_input = None
    if ctx.needs_input_grad[0]:
        grad_input = pool_grad(
            grad_output, argmax, ctx.input_size, ctx.input_channels_last, *ctx.arguments,
            ctx.backend,
        )  # fmt: skip
    return grad_input, *[None] * 7


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, argmax, ctx.input_size, _, *ctx.arguments, _ = inputs
    ctx.save_for_backward(argmax)


def _backward_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (argmax,) = ctx.saved_tensors
    grad_grad_output = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = values_at(grad, argmax, ctx.input_size, ctx.arguments)
    return grad_grad_output, *[None] * 9


def values_at(
    input: Tensor, argmax: Tensor, input_size: Sequence[int], arguments: Sequence[Any]
) -> Tensor:
    """The values of [N, C, H, W] that argmax points at, 0 where it points nowhere.

    arguments are kernel, stride, padding, dilation and ceil_mode. Differentiable in input.
    """
    kernel, stride, padding, dilation, ceil_mode = arguments
    geometry = MaxPool2dGeometry.of(
        "max_pool2d_grad", input_size, kernel, stride, padding, dilation, ceil_mode
    )
    index, taken = indices(argmax, geometry)
    picked = input.flatten(2).gather(2, index.flatten(2)).view(argmax.shape)
    return torch.where(taken, picked, 0)


class MaxPool2dFunction(torch.autograd.Function):
    """max_pool2d on checked arguments: `apply(input, kernel, stride, padding, dilation, ceil_mode,
    relu, backend)`.

    input [N, C, H, W]; kernel, stride, padding and dilation are pairs (height, width); relu puts
    max(0, x) behind it. Raises what `max_pool2d` raises.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _run_forward(*inputs)
        _save_pool(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward_pool)


class _MaxPool2dGradFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_grad(ctx, inputs, None)
        return _run_grad(*inputs)

    backward = staticmethod(_backward_grad)


_apply_to_ordinary = apply_to_ordinary(MaxPool2dFunction)

for _name, _save, _backward in (
    ("max_pool2d", _save_pool, _backward_pool),
    ("max_pool2d_grad", _save_grad, _backward_grad),
):
    torch.library.register_autograd(f"gdfast::{_name}", _backward, setup_context=_save, lib=library)
