"""linear, on our kernels where they are faster: for few outputs, and on GPUs for small layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gdfast import native
from gdfast.backends import chosen, cuda_linear
from gdfast.backends import linear as kernels
from gdfast.ops.conv2d import are_tensors, why_native
from gdfast.ops.ordinary import (
    apply_to_ordinary,
    are_ordinary,
    batched_gradients,
    unwatched_facts,
)

_CUDA, _CUDA_BACKENDS = ("cpu", ("cuda",)) if native.cuda_is_simulated else (
    "cuda", ("auto", "cuda")
)  # fmt: skip
# What runs a layer on a GPU, or False, by the facts of its tensors and what else decides.
_layers: dict[Any, Any] = {}
_MOST_LAYERS = 1024


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies features by a matrix, as `torch.nn.functional.linear` does, and differentiably.

    input [..., C], weight [K, C], bias [K]; returns [..., K]. Ours is a batch [N, C] of 64 columns
    or more. On the CPU it is of float32 or float64, with at most 16 outputs, or with at most 16
    rows and a weight of 2^18 elements or more, and no autocast; on a GPU of at most 32 outputs, or
    of bfloat16 or float16 (by autocast too) with C and K that 8 divides, where the GPU's time is
    short. All else, and what a transform or torch.compile calls, runs on native PyTorch, without a
    warning: it is the same product. Raises what native raises.
    """
    if native.cuda is not None and not torch.compiler.is_compiling():
        layer = _cuda_layer(input, weight, bias)
        if layer:
            if torch.is_grad_enabled():
                output: Tensor = _apply_cuda(input, weight, bias, layer)
                return output
            return _run_cuda(layer, input, weight, bias)
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias)
    if not is_ours(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled():
        output = _apply(input, weight, bias)  # all are ordinary
        return output
    return kernels.linear(input, weight, bias)


def _cuda_layer(input: Any, weight: Any, bias: Any) -> Any:
    """What runs a call on the CUDA kernels, if they do."""
    facts = unwatched_facts(input, weight, bias)
    if not isinstance(facts, bytes) or input is None or weight is None:
        return None
    cast = None
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(_CUDA):
        cast = torch.get_autocast_dtype(_CUDA)
    backend = chosen()
    key = facts, cast, backend
    layer = _layers.get(key)
    if layer is None:
        layer = backend in _CUDA_BACKENDS and cuda_linear.find(input, weight, bias, cast)
        if len(_layers) >= _MOST_LAYERS:
            _layers.clear()
        _layers[key] = layer or False
    return layer


def _run_cuda(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor | None = layer.forward(input, weight, bias)
    return F.linear(input, weight, bias) if output is None else output


def is_ours(input: Any, weight: Any, bias: Any) -> bool:
    """Whether the kernels for the CPU run a call."""
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
    """Those of input, weight and bias on the CPU that are asked for, None for others."""
    input, weight = saved
    if torch.is_grad_enabled() or batched_gradients() or not are_ordinary(grad_output):
        return _gradients(grad_output, input, weight, needs)
    return kernels.linear_backward(grad_output, input, weight, columns, needs)


def _gradients(
    grad_output: Tensor, input: Any, weight: Any, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients by native's operators: differentiable again, and known to vmap."""
    return (
        grad_output @ weight if needed[0] else None,
        grad_output.mT @ input if needed[1] else None,
        grad_output.sum(0) if needed[2] else None,
    )


class CudaLinearFunction(torch.autograd.Function):
    """The CUDA kernels of a layer that was found for these tensors."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.save_for_backward(*saved(ctx.needs_input_grad, input, weight))
        ctx.layer = layer
        return _run_cuda(layer, input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needed, layer = ctx.needs_input_grad, ctx.layer
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            if not grad_output.is_contiguous():
                grad_output = grad_output.contiguous()
            facts = unwatched_facts(grad_output, input, weight)
            if facts is not None:
                grads = layer.gradients(facts, (grad_output, input, weight), needed)
                if grads is not None:
                    return *grads, None
        dtype, (of_input, of_weight) = grad_output.dtype, layer.dtypes
        input, weight = (None if each is None else each.to(dtype) for each in (input, weight))
        grads = _gradients(grad_output, input, weight, needed)
        types = of_input, of_weight, of_weight
        return *(g if g is None else g.to(t) for g, t in zip(grads, types, strict=True)), None


_apply = apply_to_ordinary(LinearFunction)
_apply_cuda = apply_to_ordinary(CudaLinearFunction)
