"""conv2d, differentiable any number of times.

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
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gdfast.backends import chosen, fall_back, tuning
from gdfast.backends.registry import AUTO
from gdfast.geometry import (
    conv2d_is_channels_last,
    integer,
    is_channels_last,
    named_padding,
    pair,
)
from gdfast.ops import conv2d_dispatch, in_backward
from gdfast.ops.conv2d_dispatch import library
from gdfast.ops.ordinary import (
    apply_to_ordinary,
    are_ordinary,
    batched_gradients,
    run_operation,
    tensor_facts,
)

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


def autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
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
            key_of_layer = partial(_layer_key, input, weight, ctx.has_bias, ctx.arguments)
            key_of_forward = partial(_forward_key, input, weight, ctx.has_bias, ctx.arguments)
            learn_whether_native(ctx, grad_output, input, weight, key_of_layer, key_of_forward)
        return *gradients, *[None] * 5


def _forward_key(
    input: Tensor, weight: Tensor, has_bias: bool, arguments: Sequence[Any]
) -> tuple[Any, ...]:
    bias = weight.new_empty(weight.shape[0]) if has_bias else None  # as the layer's own was
    return conv2d_dispatch.conv2d_key(input, weight, bias, *arguments)


def _layer_key(
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
    if not conv2d_dispatch.all_native.get(_layer_key(input, weight, bias is not None, arguments)):
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
