"""The gradient formulas of conv2d and of its two gradients.

conv2d is linear in its input and in its weight, so every derivative of it and of its two gradients
is again one of the three. Each of them is a dispatcher operation with a gradient formula, which is
what torch.compile and export see, and an autograd Function with the same formula, which costs half
as much per call and is what eager code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast.backends import tuning
from gdfast.backends.registry import AUTO
from gdfast.geometry import conv2d_is_channels_last, is_channels_last
from gdfast.ops import conv2d_dispatch, in_backward
from gdfast.ops.conv2d_dispatch import library
from gdfast.ops.ordinary import (
    apply_to_ordinary,
    are_ordinary,
    batched_gradients,
    run_operation,
    tensor_facts,
)


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, weight, bias, *ctx.arguments = inputs
    ctx.has_bias = bias is not None
    need_input, need_weight, _ = ctx.needs_input_grad[:3]
    ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
    note_sizes(ctx, input, weight)


def note_sizes(ctx: Any, input: Tensor, weight: Tensor) -> None:
    """Keeps the sizes and layouts that the gradients of a convolution get."""
    need_input, need_weight = ctx.needs_input_grad[:2]
    if need_input:
        ctx.input_size = input.shape
        ctx.input_channels_last = conv2d_is_channels_last(
            input.shape, input.stride(), weight.shape, weight.stride()
        )
    if need_weight:
        ctx.weight_size = weight.shape
        ctx.weight_channels_last = is_channels_last(weight.shape, weight.stride())


def _backward_conv2d(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return *conv_gradients(ctx, grad_output, *ctx.saved_tensors), *[None] * 5


def conv_gradients(
    ctx: Any, grad_output: Tensor, input: Tensor | None, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias that a context asks for, None for others."""
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = grad_bias = None
    if need_input:
        grad_input = conv_grad_input(
            grad_output, weight, ctx.input_size, ctx.input_channels_last, *ctx.arguments
        )
    begun = in_backward.begin(ctx, grad_output, input) if in_backward.targets else None
    if begun is not None:
        (grad_bias,) = begun
    elif need_weight:
        grad_weight, grad_bias = conv_grad_weight(
            grad_output, input, ctx.weight_size, ctx.weight_channels_last, need_bias,
            *ctx.arguments,
        )  # fmt: skip
    elif need_bias:
        grad_bias = grad_output.sum((0, 2, 3))
    return grad_input, grad_weight, grad_bias


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, weight, _, _, *ctx.arguments = inputs
    ctx.weight_channels_last = is_channels_last(weight.shape, weight.stride())
    ctx.save_for_backward(grad_output, weight)


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, weight = ctx.saved_tensors
    grad_grad_output = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_grad_output = conv(grad, weight, None, *ctx.arguments)
    if ctx.needs_input_grad[1]:
        grad_weight, _ = conv_grad_weight(
            grad_output, grad, weight.shape, ctx.weight_channels_last, False, *ctx.arguments
        )
    return grad_grad_output, grad_weight, None, None, None, None, None, None, None


def _save_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, input, _, _, _, *ctx.arguments = inputs
    ctx.input_channels_last = is_channels_last(input.shape, input.stride())
    ctx.save_for_backward(grad_output, input)
    ctx.set_materialize_grads(False)


def _backward_grad_weight(
    ctx: Any, grad: Tensor | None, grad_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_output, input = ctx.saved_tensors
    grad_grad_output = grad_input = None
    if ctx.needs_input_grad[0]:
        if grad is not None:
            grad_grad_output = conv(input, grad, grad_bias, *ctx.arguments)
        elif grad_bias is not None:
            grad_grad_output = grad_bias.view(1, -1, 1, 1).expand_as(grad_output)
    if ctx.needs_input_grad[1] and grad is not None:
        grad_input = conv_grad_input(
            grad_output, grad, input.shape, ctx.input_channels_last, *ctx.arguments
        )
    return grad_grad_output, grad_input, *[None] * 8


class Conv2dFunction(torch.autograd.Function):
    """conv2d on checked arguments: `apply(input, weight, bias, stride, padding, dilation, groups,
    backend)`.

    input [N, C, H, W], weight [K, C / groups, R, S], bias [K] or None; stride and dilation are
    pairs (height, width), padding is (rows above, columns left, rows below, columns right). Raises
    what `conv2d` raises.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_conv2d(ctx, inputs, None)
        return _run("conv2d", inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors  # once: checkpointing allows no second time
        gradients = conv_gradients(ctx, grad_output, input, weight)
        if all(ctx.needs_input_grad[:2]) and ctx.arguments[-1] == AUTO:
            key_of_layer = partial(layer_key, input, weight, ctx.has_bias, ctx.arguments)
            key_of_forward = partial(forward_key, input, weight, ctx.has_bias, ctx.arguments)
            learn_whether_native(ctx, grad_output, input, weight, key_of_layer, key_of_forward)
        return *gradients, *[None] * 5


def forward_key(
    input: Tensor, weight: Tensor, has_bias: bool, arguments: Sequence[Any]
) -> tuple[Any, ...]:
    bias = weight.new_empty(weight.shape[0]) if has_bias else None  # as the layer's own was
    return conv2d_dispatch.conv2d_key(input, weight, bias, *arguments)


def layer_key(
    input: Tensor, weight: Tensor, has_bias: bool, arguments: Sequence[Any]
) -> tuple[Any, ...]:
    stride, padding, dilation, groups, _ = arguments
    return (
        tensor_facts(input, weight), has_bias,
        *stride, *padding, *dilation, groups, tuning.situation(),
    )  # fmt: skip


def learn_whether_native(
    ctx: Any, grad_output: Tensor, input: Tensor, weight: Tensor,
    key_of_layer: Callable[[], Any], key_of_forward: Callable[[], Any],
) -> None:  # fmt: skip
    """Notes, by the key of a layer, whether native was chosen for all three passes of it."""
    if torch.compiler.is_compiling() or not are_ordinary(grad_output, input, weight):
        return
    dispatch, arguments = conv2d_dispatch, ctx.arguments
    layer = key_of_layer()
    if layer in dispatch.all_native:
        return
    if len(dispatch.all_native) >= dispatch.KERNELS_LIMIT:
        dispatch.all_native.clear()
    top, left, below, right = arguments[1]
    of_gradients = (
        dispatch.conv2d_grad_input_key(
            grad_output, weight, ctx.input_size, ctx.input_channels_last, *arguments
        ),
        dispatch.conv2d_grad_weight_key(
            grad_output, input, ctx.weight_size, ctx.weight_channels_last, False, *arguments
        ),
    )
    dispatch.all_native[layer] = (
        (top, left) == (below, right)
        and dispatch.runs_native(key_of_forward())
        and all(map(dispatch.runs_native, of_gradients))
    )


def _conv2d_native(inputs: tuple[Any, ...]) -> Tensor | None:
    """The layer's output by native's own operator, where it was chosen for all of the layer."""
    input, weight, bias, *arguments = inputs
    if not (conv2d_dispatch.all_native and arguments[-1] == AUTO):
        return None
    if not (input.requires_grad and weight.requires_grad and are_ordinary(input, weight, bias)):
        return None
    if not conv2d_dispatch.all_native.get(layer_key(input, weight, bias is not None, arguments)):
        return None
    stride, padding, dilation, groups, _ = arguments
    with torch._C._DisableAutocast():  # what is to be cast has been
        return F.conv2d(input, weight, bias, stride, padding[:2], dilation, groups)


class _GradInputFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_grad_input(ctx, inputs, None)
        return _run("conv2d_grad_input", inputs)

    backward = staticmethod(_backward_grad_input)


class _GradWeightFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        _save_grad_weight(ctx, inputs, None)
        return _run("conv2d_grad_weight", inputs)

    backward = staticmethod(_backward_grad_weight)


def _run(name: str, inputs: tuple[Any, ...]) -> Any:
    """Runs one of the operations without recording its own gradient formula."""
    op, kernel, tensors = _OPERATIONS[name]
    if torch.compiler.is_compiling():
        return op(*inputs)
    return run_operation(op, kernel, inputs, *inputs[:tensors])


# The dispatcher's operation, what it finds, and how many of the inputs are tensors.
_OPERATIONS = {
    name: (getattr(torch.ops.gdfast, name).default, getattr(conv2d_dispatch, name), tensors)
    for name, tensors in (("conv2d", 3), ("conv2d_grad_input", 2), ("conv2d_grad_weight", 2))
}


def _differentiable(function: type[torch.autograd.Function], name: str) -> Callable[..., Any]:
    op, kernel, tensors = _OPERATIONS[name]
    apply = apply_to_ordinary(function)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        if batched_gradients():
            # vmap knows native's operators, not ours.
            return kernel(*inputs[:-1], "reference")
        if torch.is_grad_enabled():
            if name == "conv2d" and (output := _conv2d_native(inputs)) is not None:
                return output
            if are_ordinary(*inputs[:tensors]):
                return apply(*inputs)
            return function.apply(*inputs)
        return run_operation(op, kernel, inputs, *inputs[:tensors])

    return call


conv = _differentiable(Conv2dFunction, "conv2d")
conv_grad_input = _differentiable(_GradInputFunction, "conv2d_grad_input")
conv_grad_weight = _differentiable(_GradWeightFunction, "conv2d_grad_weight")

for _name, _save, _backward in (
    ("conv2d", _save_conv2d, _backward_conv2d),
    ("conv2d_grad_input", _save_grad_input, _backward_grad_input),
    ("conv2d_grad_weight", _save_grad_weight, _backward_grad_weight),
):
    torch.library.register_autograd(f"gdfast::{_name}", _backward, setup_context=_save, lib=library)
