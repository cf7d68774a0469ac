"""conv2d, and moments of its output for the batch normalisation that follows.

Of the backends only cuda takes them, in the kernel that writes the output: batch normalisation then
reads that once less. Whatever runs a convolution otherwise gives None in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic
from torch.utils.flop_counter import register_flop_formula

from gdfast import native
from gdfast.backends import chosen, tuning
from gdfast.backends.cuda_conv2d import Kernel
from gdfast.ops.casts import autocast
from gdfast.ops.conv2d import are_tensors, conv2d, settings, why_native
from gdfast.ops.conv2d_autograd import _backward_conv2d, _save_conv2d
from gdfast.ops.conv2d_dispatch import bind, conv2d_key, conv2d_query, known_kernel, library
from gdfast.ops.ordinary import (
    apply_to_ordinary,
    are_ordinary,
    batched_gradients,
    run_operation,
)

OP = tuning.MOMENTS

# The second result is None where the kernel takes no moments.
library.define(
    f"{OP}(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "int groups, str backend) -> (Tensor, Tensor)"
)


def conv2d_moments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`gdfast.ops.conv2d`, and moments of its output for `gdfast.ops.batch_norm_act`, or None.

    Arguments and errors are those of `gdfast.ops.conv2d`. The moments, [splits, 3, K] in the type
    that sums are taken in, are counts, means and squared deviations of the channels over some
    pixels each; autograd sees constants in them, as batch_norm_act's gradient has them as functions
    of its input. They are None where no tile of the cuda backend runs the convolution, and in
    compiled code.
    """
    if not may_have_moments(input, weight, bias, backend):
        output = conv2d(input, weight, bias, stride, padding, dilation, groups, backend=backend)
        return output, None
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = autocast(input, weight, bias)
    arguments = settings("conv2d", weight, stride, padding, dilation, groups)
    inputs = input, weight, bias, *arguments, chosen(backend)
    results: tuple[Tensor, Tensor | None]
    if not torch.is_grad_enabled():
        results = _run(inputs)
    elif are_ordinary(input, weight, bias):
        results = _apply_to_ordinary(*inputs)
    else:
        results = Conv2dMomentsFunction.apply(*inputs)
    return results


def may_have_moments(input: Any, weight: Any, bias: Any, backend: str) -> bool:
    """Whether `conv2d_moments` runs a convolution in a kernel that may take moments."""
    return (
        native.cuda is not None
        and not torch.compiler.is_compiling()
        and are_tensors(input, weight, bias)
        and input.device.type == ("cpu" if native.cuda_is_simulated else "cuda")
        and input.dim() == 4
        and not has_torch_function_variadic(input, weight, bias)
        and not why_native(input, weight)
        and not batched_gradients()
        and chosen(backend) in ("auto", "cuda")
    )


def _run(inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    results: tuple[Tensor, Tensor | None]
    results = run_operation(torch.ops.gdfast.conv2d_moments.default, _kernel, inputs, *inputs[:3])
    return results


class Conv2dMomentsFunction(torch.autograd.Function):
    """conv2d_moments on checked arguments, those of `Conv2dFunction`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        output, moments = _run(inputs)
        _save(ctx, inputs, (output, moments))
        return output, moments

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 8
        return _backward_conv2d(ctx, grad_output)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    _save_conv2d(ctx, inputs, None)
    if output[1] is not None:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _kernel(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    backend: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Runs a kernel of conv2d, chosen with the batch normalisation behind it."""
    backend = chosen(backend)
    arguments = stride, padding, dilation, groups
    key = OP, *conv2d_key(input, weight, bias, *arguments, backend)
    kernel = known_kernel(key)
    if kernel is None:
        query = conv2d_query("conv2d", input, weight, bias, *arguments)
        kernel = bind(key, OP, query, backend, input, weight, bias)
    if isinstance(kernel, Kernel):
        return kernel.with_moments(input, weight, bias)
    return kernel(input, weight, bias), None


def _fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor | None]:
    return torch.ops.gdfast.conv2d.default(input, weight, bias, *arguments), None


_apply_to_ordinary = apply_to_ordinary(Conv2dMomentsFunction)

library.impl(OP, _kernel, "CompositeExplicitAutograd")
torch.library.register_fake(f"gdfast::{OP}", _fake, lib=library)
torch.library.register_autograd(
    f"gdfast::{OP}", Conv2dMomentsFunction.backward, setup_context=_save, lib=library
)


@register_flop_formula(torch.ops.gdfast.conv2d_moments)
def _flops(input: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape[0]) * prod(weight[1:])
