"""batch_norm_act: batch normalisation, residual and activation in one, differentiable.

Forward and backward are dispatcher operations with a gradient formula, which is what torch.compile
and export see, and an autograd Function with the same formula, which costs less per call and is
what eager code runs. A gradient to be differentiated again is a formula of native operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gdfast import native
from gdfast.backends import chosen, fall_back, resolve
from gdfast.backends.activation import ACTIVATIONS, activate
from gdfast.backends.batch_norm import gradients
from gdfast.backends.registry import AUTO
from gdfast.errors import mismatch
from gdfast.geometry import is_channels_last
from gdfast.ops import batch_norm_dispatch
from gdfast.ops.batch_norm_dispatch import OP, pre_activation
from gdfast.ops.conv2d import _DTYPES
from gdfast.ops.conv2d_dispatch import library
from gdfast.ops.ordinary import (
    apply_to_ordinary,
    are_ordinary,
    batched_gradients,
    is_watched,
)


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    backend: str = "auto",
    moments: Tensor | None = None,
) -> Tensor:
    """Normalises each channel, adds a residual and applies an activation: `activation(
    torch.nn.functional.batch_norm(input, ...) + residual)`.

    input and residual [N, C, H, W] of one dtype: float32, float64, bfloat16 or float16; weight,
    bias, running_mean and running_var [C] or None, of that dtype or, beside half types, float32.
    activation: "none", "relu", "relu6", "leaky_relu" (with negative_slope) or "silu". In training
    the statistics are those of the batch, and the running ones move towards them by momentum, the
    variance unbiased; in evaluation they are the running ones. Returns [N, C, H, W], channels_last
    where the input is. Other shapes, dtypes and devices run on native PyTorch, and so does an input
    without elements, which leaves the running statistics as they are.

    moments: what `conv2d_moments` gave with this very input, unchanged since, spares a pass over it
    in training.

    Raises RuntimeError for sizes and dtypes that do not fit together and for evaluation without
    running statistics, ValueError for one value per channel in training, one running statistic
    without the other, an unknown activation or backend and an eps out of range, BackendError when
    the backend asked for by name cannot run this.

    Source: Ioffe and Szegedy, 2015, "Batch Normalization".
    """
    if has_torch_function_variadic(input, weight, bias, running_mean, running_var, residual):
        return handle_torch_function(
            batch_norm_act, (input, weight, bias, running_mean, running_var, residual),
            input, weight, bias, running_mean, running_var, residual, training=training,
            momentum=momentum, eps=eps, activation=activation, negative_slope=negative_slope,
            backend=backend, moments=moments,
        )  # fmt: skip
    backend = chosen(backend)
    tensors = input, weight, bias, running_mean, running_var, residual
    if backend == "reference":
        return _native(tensors, training, momentum, eps, activation, negative_slope)
    if reason := _why_native(input, weight, residual):
        fall_back(OP, backend, reason)
        return _native(tensors, training, momentum, eps, activation, negative_slope)
    if 0 in input.shape:
        # There is nothing to launch, but who was asked for by name may refuse.
        if backend != AUTO:
            settings = training, eps, activation, negative_slope
            resolve(OP, batch_norm_dispatch.forward_query(*tensors, *settings), backend)
        return _native(tensors, training, momentum, eps, activation, negative_slope)
    return _batch_norm_act(
        _dense(input), weight, bias, running_mean, running_var, residual, training, momentum, eps,
        activation, negative_slope, backend, moments if training else None,
    )  # fmt: skip


def count_batch(batches: Tensor) -> None:
    """Adds one to the number of batches that a norm has seen."""
    if is_watched() or native.cpu is None or not native.cpu.add_one(batches):
        batches.add_(1)
    else:
        increment_version(batches)


def _native(
    tensors: tuple[Any, ...], training: bool, momentum: float, eps: float, activation: str,
    negative_slope: float,
) -> Tensor:  # fmt: skip
    if activation not in ACTIVATIONS:
        expected = f"one of {', '.join(ACTIVATIONS)}"
        raise ValueError(mismatch(OP, "activation", expected, repr(activation)))
    input, weight, bias, running_mean, running_var, residual = tensors
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        output = output + residual
    return activate(output, activation, negative_slope)


def _why_native(input: Any, weight: Any, residual: Any) -> str:
    if not isinstance(input, Tensor):
        return f"no other backend takes a {type(input).__name__}"
    if torch._C._get_tracing_state() is not None:
        return "a traced model should run without gdfast"
    if input.dtype not in _DTYPES:
        return f"no other backend takes {input.dtype}"
    if input.layout is not torch.strided:
        return f"no other backend takes {input.layout} input"
    if input.dim() != 4:
        return f"other backends take 4-D input, not {input.dim()}-D"
    if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
        return "other backends take a residual of the input's size and dtype"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms need operators that they know"
    if forward_ad._current_level >= 0:
        return "forward-mode AD needs operators that it knows"
    return ""


def _dense(input: Tensor) -> Tensor:
    """The tensor itself, or a copy in the layout that it is nearest to."""
    if is_channels_last(input.shape, input.stride()):
        return input.contiguous(memory_format=torch.channels_last)
    return input.contiguous()


def _save(
    ctx: Any, inputs: tuple[Any, ...], output: Tensor, mean: Tensor, invstd: Tensor,
    mask: Tensor | None = None,
) -> None:  # fmt: skip
    """`inputs` are six tensors or None, training, eps, activation, negative_slope, backend and
    moments.
    """
    input, weight, bias, _, _, residual, training, eps, activation, slope, backend, _ = inputs
    source = "mask" if mask is not None else pre_activation(activation, slope, residual)
    other = {"input": None, "residual": residual, "output": output, "mask": mask}[source]
    ctx.save_for_backward(input, weight, bias, other, mean, invstd)
    ctx.settings = training, eps, activation, slope, source, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """The gradients of the six tensors."""
    if grad_output is None:
        return (None,) * 6
    wanted = needs[0], needs[1], needs[2], needs[5]
    results = norm_gradients(grad_output, *ctx.saved_tensors, wanted, settings=ctx.settings)
    grad_input, grad_weight, grad_bias, grad_residual = results
    return grad_input, grad_weight, grad_bias, None, None, grad_residual


def norm_gradients(*arguments: Any, settings: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight, bias and residual.

    `arguments` are those of `batch_norm_dispatch.backward` up to `wanted`, `settings` the others.
    """
    results: tuple[Tensor | None, ...]
    if torch.compiler.is_compiling():
        results = _backward_op(*arguments, *settings)
    elif torch.is_grad_enabled() or batched_gradients():
        # Differentiable again, and made of operators that vmap knows.
        query = batch_norm_dispatch.backward_query(*arguments[1:4], *settings[:-1])
        results = gradients(query, *arguments)
    elif are_ordinary(*arguments[:-1]):
        results = batch_norm_dispatch.backward(*arguments, *settings)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            results = _backward_op(*arguments, *settings)
    return results


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, *output[:3])
    ctx.mark_non_differentiable(*output[1:])


def _backward_of_op(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *_backward(ctx, grad_output, ctx.needs_input_grad), *[None] * 6


class _BatchNormActFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *_, residual, _, _, _, activation, slope, _, _ = inputs
        wants_mask = (
            any(ctx.needs_input_grad) and pre_activation(activation, slope, residual) == "output"
        )
        output, mean, invstd, mask = _run(*inputs, wants_mask)
        _save(ctx, (*inputs[:7], *inputs[8:]), output, mean, invstd, mask)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
        return *_backward(ctx, grad_output, ctx.needs_input_grad), *[None] * 7


_apply_to_ordinary = apply_to_ordinary(_BatchNormActFunction)
_forward_op = torch.ops.gdfast.batch_norm_act.default
_backward_op = torch.ops.gdfast.batch_norm_act_backward.default


def _run(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Runs forward without recording a gradient formula."""
    if are_ordinary(*inputs[:6]):
        return batch_norm_dispatch.forward(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return *_run_op(*inputs[:13]), None


def _run_op(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the dispatcher's operation, and moves the running statistics by native operators."""
    input, weight, bias, running_mean, running_var, residual, training, momentum, *settings = inputs
    running = (None, None) if training else (running_mean, running_var)
    output, mean, invstd, var = _forward_op(
        input, weight, bias, *running, residual, training, *settings
    )
    if training and running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(var.to(running_var.dtype), momentum)
    return output, mean, invstd


def _batch_norm_act(*inputs: Any) -> Tensor:
    if torch.compiler.is_compiling():
        return _run_op(*inputs)[0]
    if not torch.is_grad_enabled():
        return _run(*inputs)[0]
    if are_ordinary(*inputs[:6]):
        output: Tensor = _apply_to_ordinary(*inputs)
        return output
    return _BatchNormActFunction.apply(*inputs)


torch.library.register_autograd(
    f"gdfast::{OP}", _backward_of_op, setup_context=_save_for_op, lib=library
)
