"""max_pool2d(relu(conv2d(...))) in one kernel each way, where input channels are few.

Only the pooled output and its argmax are written, and the weight's gradient comes straight from
the pooled one. Whatever else is asked for, a gradient in the input, gradients of gradients, other
geometries, is composed of conv2d and max_pool2d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gdfast.backends import Query, chosen, fall_back, preview
from gdfast.backends.fused_pool import fits
from gdfast.geometry import conv2d_is_channels_last, is_channels_last, pair
from gdfast.ops import conv2d_relu_max_pool2d_dispatch as dispatch
from gdfast.ops.casts import autocast
from gdfast.ops.conv2d import are_tensors, settings, why_native
from gdfast.ops.conv2d_autograd import conv, conv_grad_input, conv_grad_weight
from gdfast.ops.conv2d_dispatch import library
from gdfast.ops.max_pool2d import IntOrPair, pool, pool_grad, values_at
from gdfast.ops.ordinary import (
    apply_to_ordinary,
    are_ordinary,
    batched_gradients,
    run_operation,
)

_OP = "conv2d_relu_max_pool2d"


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_size: IntOrPair = 2,
    pool_stride: IntOrPair | None = None,
    pool_padding: IntOrPair = 0,
    backend: str = "auto",
) -> Tensor:
    """max_pool2d(relu(conv2d(input, weight, bias, ...)), pool_size, pool_stride, pool_padding).

    input [N, C, H, W] or [C, H, W], weight [K, C / groups, R, S], bias [K], all of one dtype, as
    for `gdfast.ops.conv2d`; the pooling's arguments are numbers or pairs (height, width), its
    stride pool_size by default. Returns the pooled [N, K, P, Q] or [K, P, Q], channels_last where
    the input or the weight is.

    Values and gradients are those of the three functions in turn: of equal values in a window the
    first gets the gradient, where none is above 0 nobody does (ReLU's gradient at 0 is 0), and a
    NaN outdoes every number. Where one kernel does all, a NaN or an infinity in the input reaches
    the weight's gradient only through windows that see it.

    Raises what `gdfast.ops.conv2d` and `gdfast.ops.max_pool2d` raise.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d_relu_max_pool2d, (input, weight, bias), input, weight, bias, stride, padding,
            dilation, groups, pool_size=pool_size, pool_stride=pool_stride,
            pool_padding=pool_padding, backend=backend,
        )  # fmt: skip
    backend = chosen(backend)
    native = backend == "reference" or not are_tensors(input, weight, bias)
    if not native and (reason := why_native(input, weight)):
        fall_back(_OP, backend, reason)
        native = True
    if native:
        output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return F.max_pool2d(F.relu(output), pool_size, pool_stride, pool_padding)
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = autocast(input, weight, bias)
    pool_size = pair("pool_size", pool_size, _OP)
    pool_stride = pool_size if pool_stride is None else pair("pool_stride", pool_stride, _OP)
    pool_padding = pair("pool_padding", pool_padding, _OP)
    of_conv = settings(_OP, weight, stride, padding, dilation, groups)
    arguments = *of_conv, pool_size, pool_stride
    if input.dim() == 3:
        batch = input.unsqueeze(0)
        return _conv_pool(batch, weight, bias, arguments, pool_padding, backend).squeeze(0)
    return _conv_pool(input, weight, bias, arguments, pool_padding, backend)


# Whether the fused kernels take a call, for each combination of sizes: a check of geometry.
_fused: dict[tuple[Any, ...], bool] = {}
_FUSED_LIMIT = 4096


def _conv_pool(
    input: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple[Any, ...],
    pool_padding: tuple[int, int], backend: str,
) -> Tensor:  # fmt: skip
    if runs_fused(input, weight, arguments, pool_padding, backend):
        return _fused_conv_pool(input, weight, bias, *arguments, backend)
    *conv_arguments, pool_size, pool_stride = arguments
    output = conv(input, weight, bias, *conv_arguments, backend)
    return pool(output, pool_size, pool_stride, pool_padding, (1, 1), False, True, backend)


def runs_fused(
    input: Tensor, weight: Tensor, arguments: tuple[Any, ...], pool_padding: tuple[int, int],
    backend: str,
) -> bool:  # fmt: skip
    """Whether one kernel does all, for checked arguments without the pooling's padding."""
    key = input.shape, weight.shape, arguments, pool_padding
    fused = None if torch.compiler.is_compiling() else _fused.get(key)
    if fused is None:
        geometries = dispatch.geometries(input.shape, weight.shape, *(*arguments, pool_padding))
        fused = fits(*geometries)
        if not torch.compiler.is_compiling():
            if len(_fused) >= _FUSED_LIMIT:
                _fused.clear()
            _fused[key] = fused
    return fused and input.device.type == "cpu" and _has_kernel(input, backend)


def _has_kernel(input: Tensor, backend: str) -> bool:
    if backend != "auto":
        return backend == "cpu"
    return preview(_OP, Query(input.device, input.dtype)) == "cpu"


def _fused_conv_pool(*inputs: Any) -> Tensor:
    if torch.compiler.is_compiling():
        output: Tensor = torch.ops.gdfast.conv2d_relu_max_pool2d.default(*inputs)[0]
    elif not torch.is_grad_enabled():
        output = _run_forward(inputs)[0]
    elif are_ordinary(*inputs[:3]):
        output = _apply_to_ordinary(*inputs)
    else:
        output = ConvReluMaxPool2dFunction.apply(*inputs)
    return output


def _run_forward(inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    output: tuple[Tensor, Tensor] = run_operation(
        torch.ops.gdfast.conv2d_relu_max_pool2d.default, dispatch.conv2d_relu_max_pool2d, inputs,
        *inputs[:3],
    )  # fmt: skip
    return output


def _grad_weight(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    op = torch.ops.gdfast.conv2d_relu_max_pool2d_grad_weight.default
    output: tuple[Tensor, Tensor | None]
    if torch.compiler.is_compiling():
        output = op(*inputs)
    else:
        kernel = dispatch.conv2d_relu_max_pool2d_grad_weight
        output = run_operation(op, kernel, inputs, *inputs[:3])
    return output


def note(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Keeps what `gradients` goes by beside the tensors that are saved."""
    input, weight, _, *ctx.arguments, ctx.backend = inputs
    ctx.input_size, ctx.weight_size = input.shape, weight.shape
    ctx.weight_channels_last = is_channels_last(weight.shape, weight.stride())
    ctx.channels_last = conv2d_is_channels_last(
        input.shape, input.stride(), weight.shape, weight.stride()
    )


def saved(needs: Sequence[bool], inputs: tuple[Any, ...], argmax: Tensor) -> tuple[Any, ...]:
    """What backward reads."""
    input, weight, *_ = inputs
    return input if needs[1] else None, weight if needs[0] else None, argmax


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    note(ctx, inputs)
    ctx.save_for_backward(*saved(ctx.needs_input_grad, inputs, output[1]))


def _backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = gradients(ctx.needs_input_grad, ctx, grad_output, ctx.saved_tensors)
    return *grads, *[None] * 7


def gradients(
    needs: Sequence[bool], noted: Any, grad_output: Tensor, saved: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias that are asked for, None for others."""
    need_input, need_weight, need_bias = needs[:3]
    if need_input or not need_weight or torch.is_grad_enabled() or batched_gradients():
        return _composed_gradients(needs, noted, grad_output, saved)
    input, _, argmax = saved
    # Hooks on saved tensors may give them back in another layout.
    grad_weight, grad_bias = _grad_weight(
        grad_output, argmax.contiguous(), input, noted.weight_size, noted.weight_channels_last,
        need_bias, *noted.arguments, noted.backend,
    )  # fmt: skip
    return None, grad_weight, grad_bias


def _composed_gradients(
    needs: Sequence[bool], noted: Any, grad_output: Tensor, saved: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients by way of that of the convolution's output, and differentiable again."""
    input, weight, argmax = saved
    need_input, need_weight, need_bias = needs[:3]
    *arguments, pool_size, pool_stride = noted.arguments
    size = dispatch.geometries(noted.input_size, noted.weight_size, *noted.arguments)[0].output_size
    grad_conv = pool_grad(
        grad_output, argmax, size, noted.channels_last, pool_size, pool_stride, (0, 0), (1, 1),
        False, noted.backend,
    )  # fmt: skip
    grad_input = grad_weight = grad_bias = None
    if need_input:
        grad_input = conv_grad_input(
            grad_conv, weight, noted.input_size, noted.channels_last, *arguments, noted.backend
        )
    if need_weight:
        grad_weight, grad_bias = conv_grad_weight(
            grad_conv, input, noted.weight_size, noted.weight_channels_last, need_bias, *arguments,
            noted.backend,
        )  # fmt: skip
    elif need_bias:
        grad_bias = grad_conv.sum((0, 2, 3))
    return grad_input, grad_weight, grad_bias


def _save_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, argmax, input, ctx.weight_size, _, _, *ctx.arguments, ctx.backend = inputs
    ctx.save_for_backward(grad_output, argmax, input)
    ctx.set_materialize_grads(False)


def _backward_grad_weight(
    ctx: Any, grad: Tensor | None, grad_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_output, argmax, input = ctx.saved_tensors
    *arguments, pool_size, pool_stride = ctx.arguments
    windows = pool_size, pool_stride, (0, 0), (1, 1), False
    size = dispatch.geometries(input.shape, ctx.weight_size, *ctx.arguments)[0].output_size
    grad_grad_output = grad_input = None
    if ctx.needs_input_grad[0] and (grad is not None or grad_bias is not None):
        weight = input.new_zeros(ctx.weight_size) if grad is None else grad
        values = conv(input, weight, grad_bias, *arguments, ctx.backend)
        grad_grad_output = values_at(values, argmax, size, windows)
    if ctx.needs_input_grad[2] and grad is not None:
        channels_last = is_channels_last(input.shape, input.stride())
        grad_conv = pool_grad(grad_output, argmax, size, channels_last, *windows, ctx.backend)
        grad_input = conv_grad_input(
            grad_conv, grad, input.shape, channels_last, *arguments, ctx.backend
        )
    return grad_grad_output, None, grad_input, *[None] * 10


class ConvReluMaxPool2dFunction(torch.autograd.Function):
    """The fused kernels on checked arguments: `apply(input, weight, bias, stride, padding,
    dilation, groups, pool_size, pool_stride, backend)`, for what `fused_pool.fits` takes.

    input [N, C, H, W], weight [K, C, R, S], bias [K] or None; padding is (rows above, columns left,
    rows below, columns right), the others pairs (height, width). Raises what
    `conv2d_relu_max_pool2d` raises.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _run_forward(inputs)
        _save(ctx, inputs, output)
        return output[0]

    backward = staticmethod(_backward)


_apply_to_ordinary = apply_to_ordinary(ConvReluMaxPool2dFunction)

for _name, _saver, _formula in (
    (_OP, _save, _backward),
    (f"{_OP}_grad_weight", _save_grad_weight, _backward_grad_weight),
):
    torch.library.register_autograd(f"gdfast::{_name}", _formula, setup_context=_saver, lib=library)
