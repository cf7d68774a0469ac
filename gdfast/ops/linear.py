"""linear, on our kernels where they are faster: on the CPU, for few outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gdfast.backends import chosen
from gdfast.backends import linear as kernels
from gdfast.ops.conv2d import are_tensors, why_native
from gdfast.ops.ordinary import apply_to_ordinary, are_ordinary, batched_gradients


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies features by a matrix, as `torch.nn.functional.linear` does, and differentiably.

    input [..., C], weight [K, C], bias [K]; returns [..., K]. Ours is a batch [N, C] of float32 or
    float64 on the CPU, of 64 columns or more and at most 16 outputs; all else, and what a
    transform, autocast or torch.compile calls, runs on native PyTorch, without a warning: it is the
    same product. Raises what native raises.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias)
    if not is_ours(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled():
        output: Tensor = _apply(input, weight, bias)  # all are ordinary
        return output
    return kernels.linear(input, weight, bias)


def is_ours(input: Any, weight: Any, bias: Any) -> bool:
    """Whether the kernels run a call."""
    return (
        not torch.compiler.is_compiling()
        and chosen() in ("auto", "cpu")
        and are_tensors(input, weight, bias)
        and are_ordinary(input, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        and not why_native(input, weight)  # sparse tensors have no strides to ask for
        and kernels.fits(input, weight, bias)
    )


class LinearFunction(torch.autograd.Function):
    """The kernels on checked tensors: `apply(input, weight, bias)`, for what they take.

    input [N, C], weight [K, C], bias [K] or None; returns [N, K].
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(*saved(ctx.needs_input_grad, input, weight))
        ctx.columns = input.shape[1]
        return kernels.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(ctx.needs_input_grad, ctx.columns, grad_output, ctx.saved_tensors)


def saved(needs: Sequence[bool], input: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """What backward reads. As natively, what is not needed may be written to before that."""
    return input if needs[1] else None, weight if needs[0] else None


def gradients(
    needs: Sequence[bool], columns: int, grad_output: Tensor, saved: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """Those of input, weight and bias that are asked for, None for others."""
    input, weight = saved
    if torch.is_grad_enabled() or batched_gradients() or not are_ordinary(grad_output):
        return differentiable_gradients(needs, grad_output, saved)
    return kernels.linear_backward(grad_output, input, weight, columns, needs)


def differentiable_gradients(
    needs: Sequence[bool], grad_output: Tensor, saved: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """The same by operators that autograd and vmap know."""
    input, weight = saved
    return (
        grad_output @ weight if needs[0] else None,
        grad_output.mT @ input if needs[1] else None,
        grad_output.sum(0) if needs[2] else None,
    )


_apply = apply_to_ordinary(LinearFunction)
