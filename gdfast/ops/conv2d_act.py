"""conv2d, bias and activation in one kernel forward, differentiable any number of times.

Backward is the activation's gradient and then conv2d's own two. What that activation needs is its
output, which the next layer keeps anyway. SiLU, and leaky ReLU with a negative slope, need their
argument: where a gradient will be asked for, convolution and activation run one after the other
and the argument is kept, for making it again would cost a convolution, a third of a training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gdfast.backends import chosen, fall_back, memory
from gdfast.backends.activation import (
    activate,
    activation_gradient,
    activation_gradient_of_output,
    output_tells,
)
from gdfast.backends.registry import AUTO
from gdfast.ops import conv2d_act_dispatch as dispatch
from gdfast.ops import conv2d_dispatch
from gdfast.ops.casts import autocast
from gdfast.ops.conv2d import are_tensors, settings, why_native
from gdfast.ops.conv2d_act_dispatch import OP
from gdfast.ops.conv2d_autograd import conv, conv_gradients, learn_whether_native, note_sizes
from gdfast.ops.conv2d_dispatch import library
from gdfast.ops.ordinary import (
    apply_to_ordinary,
    are_ordinary,
    batched_gradients,
    run_operation,
)


def conv2d_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    backend: str = "auto",
) -> Tensor:
    """Convolves images with filters and applies an activation: `activation(
    torch.nn.functional.conv2d(input, weight, bias, ...))`.

    activation: "relu", "relu6", "leaky_relu" (with negative_slope), "silu" or "none". All other
    arguments, sizes, dtypes and the layout of the result are those of `gdfast.ops.conv2d`. At a
    kink the gradient is native's: 0 for ReLU at 0. Backward reads the result, but for SiLU and
    negative slopes: writing to it in place before then makes backward raise RuntimeError.

    Raises ValueError for an unknown activation, and what `gdfast.ops.conv2d` raises.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d_act, (input, weight, bias), input, weight, bias, stride, padding, dilation,
            groups, activation=activation, negative_slope=negative_slope, backend=backend,
        )  # fmt: skip
    dispatch.check_activation(activation)
    backend = chosen(backend)
    native = backend == "reference" or not are_tensors(input, weight, bias)
    if not native and (reason := why_native(input, weight)):
        fall_back(OP, backend, reason)
        native = True
    if native:
        output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return activate(output, activation, negative_slope)
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = autocast(input, weight, bias)
    arguments = settings(OP, weight, stride, padding, dilation, groups)
    ending = activation, negative_slope, backend
    if input.dim() == 3:
        return _conv_act(input.unsqueeze(0), weight, bias, *arguments, *ending).squeeze(0)
    return _conv_act(input, weight, bias, *arguments, *ending)


def _conv_act(*inputs: Any) -> Tensor:
    input, weight, bias, *arguments, activation, negative_slope, backend = inputs
    differentiable = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if activation == "none" or (differentiable and not output_tells(activation, negative_slope)):
        output = conv(input, weight, bias, *arguments, backend)
        return activate(output, activation, negative_slope)
    if torch.compiler.is_compiling():
        output = torch.ops.gdfast.conv2d_act.default(*inputs)
    elif not differentiable:
        output = _run(inputs)
    elif _runs_native(inputs):
        with torch._C._DisableAutocast():  # what is to be cast has been
            stride, padding, *rest = arguments
            output = F.conv2d(input, weight, bias, stride, padding[:2], *rest)
        output = activate(output, activation, negative_slope, inplace=True)
    elif are_ordinary(input, weight, bias):
        output = _apply_to_ordinary(*inputs)
    else:
        output = Conv2dActFunction.apply(*inputs)
    return output


def _run(inputs: tuple[Any, ...]) -> Tensor:
    op = torch.ops.gdfast.conv2d_act.default
    output: Tensor = run_operation(op, dispatch.conv2d_act, inputs, *inputs[:3])
    return output


def _runs_native(inputs: tuple[Any, ...]) -> bool:
    """Whether native's own operators were chosen for all of the layer."""
    input, weight, bias, *_, backend = inputs
    return (
        bool(conv2d_dispatch.all_native)
        and backend == AUTO
        and input.requires_grad
        and weight.requires_grad
        and are_ordinary(input, weight, bias)
        and conv2d_dispatch.all_native.get(dispatch.conv2d_act_key(*inputs), False)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.arguments, ctx.activation, ctx.negative_slope, backend = inputs
    ctx.arguments.append(backend)
    need_input, need_weight, _ = ctx.needs_input_grad[:3]
    saved: tuple[Tensor | None, ...]
    if output_tells(ctx.activation, ctx.negative_slope):
        saved = input if need_weight else None, weight if need_input else None, None, output
    else:
        # Only a graph that was made without gradients gets here: the argument is made again.
        saved = input, weight, bias, None
    ctx.save_for_backward(*saved)
    note_sizes(ctx, input, weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, output = ctx.saved_tensors
    grad = _activation_gradient(ctx, grad_output, input, weight, bias, output)
    return *conv_gradients(ctx, grad, input, weight), *[None] * 7


def _activation_gradient(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None,
    output: Tensor | None,
) -> Tensor:  # fmt: skip
    activation, slope = ctx.activation, ctx.negative_slope
    if activation == "none":
        return grad
    if output is None:
        z = conv(input, weight, bias, *ctx.arguments)
        return activation_gradient(grad, z, activation, slope)
    if (
        torch.is_grad_enabled() or batched_gradients() or torch.compiler.is_compiling()
        or not are_ordinary(grad, output)
    ):  # fmt: skip
        # The output's own gradient in this is 0.
        return activation_gradient(grad, output.detach(), activation, slope)
    size, strides, dtype = output.shape, output.stride(), output.dtype
    if output.device.type == "cpu":
        into = memory.empty_strided(size, strides, dtype)
    else:
        into = torch.empty_strided(size, strides, dtype=dtype, device=output.device)
    return activation_gradient_of_output(grad, output, activation, slope, into)


class Conv2dActFunction(torch.autograd.Function):
    """conv2d_act on checked arguments: `apply(input, weight, bias, stride, padding, dilation,
    groups, activation, negative_slope, backend)`.

    input [N, C, H, W], weight [K, C / groups, R, S], bias [K] or None; stride and dilation are
    pairs (height, width), padding is (rows above, columns left, rows below, columns right). Raises
    what `conv2d_act` raises.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _run(inputs)
        _save(ctx, inputs, output)
        ctx.bias = inputs[2]  # of which only sizes are asked
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, output = ctx.saved_tensors  # once: checkpointing allows no second time
        grad = _activation_gradient(ctx, grad_output, input, weight, bias, output)
        gradients = conv_gradients(ctx, grad, input, weight)
        *arguments, backend = ctx.arguments
        if all(ctx.needs_input_grad[:2]) and backend == AUTO:
            settings = ctx.activation, ctx.negative_slope, backend
            inputs = input, weight, ctx.bias, *arguments, *settings
            key = partial(dispatch.conv2d_act_key, *inputs)
            learn_whether_native(ctx, grad, input, weight, key, key)
        return *gradients, *[None] * 7


_apply_to_ordinary = apply_to_ordinary(Conv2dActFunction)
torch.library.register_autograd(f"gdfast::{OP}", _backward, setup_context=_save, lib=library)
