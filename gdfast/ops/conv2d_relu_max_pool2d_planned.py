"""`conv2d_relu_max_pool2d` as a plan each way: of one kernel where there is one for all, else of
those of the convolution and of the pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gdfast.backends import chosen
from gdfast.backends.plans import NONE, Draft, Plan, draft_of, is_on_gpu
from gdfast.backends.registry import AUTO, REFERENCE
from gdfast.geometry import conv2d_is_channels_last, dense_strides, is_channels_last, pair
from gdfast.ops import conv2d_dispatch
from gdfast.ops import conv2d_relu_max_pool2d_dispatch as fused_dispatch
from gdfast.ops import max_pool2d_dispatch as pool_dispatch
from gdfast.ops.casts import autocast
from gdfast.ops.conv2d import settings
from gdfast.ops.conv2d_autograd import conv_gradients, layer_key
from gdfast.ops.conv2d_relu_max_pool2d import gradients, note, runs_fused, saved
from gdfast.ops.max_pool2d import pool_grad
from gdfast.ops.ordinary import unwatched_facts
from gdfast.ops.planned import Gradients, Planned, keep, lookup

_OP = "conv2d_relu_max_pool2d"
Tensors = tuple[Any, ...]


class _Fused(Planned):
    """By the fused kernels; arguments are those of the operation, without the backend."""

    def __init__(
        self, forward: Plan, kernel: Callable[..., Any], tensors: Tensors,
        arguments: tuple[Any, ...],
    ) -> None:  # fmt: skip
        super().__init__(forward, tensors[0].device, is_on_gpu(kernel))
        self._kernel, self._noted = kernel, SimpleNamespace()
        note(self._noted, (*tensors, *arguments, self.backend))

    def kernels(self, *tensors: Any) -> tuple[Any, ...]:
        results: tuple[Any, ...] = self._kernel(*tensors)
        return results

    def saved(self, needs: Any, tensors: Any, made: Any) -> tuple[Tensor | None, ...]:
        (argmax,) = made
        return saved(needs, tensors, argmax)

    def operations(self, ctx: Any, grad_output: Tensor, saved: Tensors) -> Gradients:
        return gradients(ctx.needs_input_grad, self._noted, grad_output, saved)

    def backward_plan(self, needs: Any, grad_output: Tensor, saved: Any) -> Plan | None:
        need_input, need_weight, need_bias = needs[:3]
        if need_input or not need_weight:
            return None
        (input, _, argmax), how = saved, self._noted
        settings = how.weight_size, how.weight_channels_last, *how.arguments, self.backend
        key = fused_dispatch.grad_weight_key(grad_output, argmax, input, *settings)
        make = draft_of(pool_dispatch.known_kernel(key))
        if make is None:
            return None
        draft = Draft(4)
        grads = make(draft, 0, 3, 1, need_bias)
        return draft.plan((NONE, *grads, NONE), device=grad_output.device)


class _Composed(Planned):
    """By the kernels of a convolution and of a pooling with ReLU, whose arguments those are."""

    def __init__(
        self, forward: Plan, kernels: tuple[Callable[..., Any], ...], tensors: Tensors,
        between: Tensor, of_conv: tuple[Any, ...], of_pool: tuple[Any, ...],
    ) -> None:  # fmt: skip
        super().__init__(forward, tensors[0].device, is_on_gpu(kernels[0]))
        input, weight, _ = tensors
        self._conv, self._pool = kernels
        self._of_conv, self._of_pool = (*of_conv, self.backend), (*of_pool, self.backend)
        self._input_size, self._weight_size = input.shape, weight.shape
        self._between_size = between.shape
        # Whether the gradients of input, weight and the convolution's output are.
        self._channels_last = (
            conv2d_is_channels_last(input.shape, input.stride(), weight.shape, weight.stride()),
            is_channels_last(weight.shape, weight.stride()),
            is_channels_last(between.shape, between.stride()),
        )

    def kernels(self, *tensors: Any) -> tuple[Any, ...]:
        results: tuple[Any, ...] = self._pool(self._conv(*tensors))
        return results

    def saved(self, needs: Any, tensors: Any, made: Any) -> tuple[Tensor | None, ...]:
        (argmax,) = made
        return saved(needs, tensors, argmax)

    def operations(self, ctx: Any, grad_output: Tensor, saved: Tensors) -> Gradients:
        input, weight, argmax = saved
        ctx.arguments = list(self._of_conv)
        ctx.input_size, ctx.weight_size = self._input_size, self._weight_size
        ctx.input_channels_last, ctx.weight_channels_last, between = self._channels_last
        grad = pool_grad(grad_output, argmax, self._between_size, between, *self._of_pool)
        return conv_gradients(ctx, grad, input, weight)

    def backward_plan(self, needs: Any, grad_output: Tensor, saved: Any) -> Plan | None:
        input, weight, argmax = saved
        of_input_last, of_weight_last, channels_last = self._channels_last
        size, known = self._between_size, conv2d_dispatch.known_kernel
        of_pool = pool_dispatch.known_kernel(
            pool_dispatch.max_pool2d_grad_key(
                grad_output, argmax, size, channels_last, *self._of_pool
            )
        )
        grad = _empty(size, dense_strides(size, channels_last), grad_output)
        of_input = of_weight = None
        if needs[0]:
            of_input = known(
                conv2d_dispatch.conv2d_grad_input_key(
                    grad, weight, self._input_size, of_input_last, *self._of_conv
                )
            )
        if needs[1]:
            of_weight = known(
                conv2d_dispatch.conv2d_grad_weight_key(
                    grad, input, self._weight_size, of_weight_last, needs[2], *self._of_conv
                )
            )
        return _backward_plan(needs, of_pool, of_input, of_weight, grad.device)


def _backward_plan(
    needs: Any, of_pool: Any, of_input: Any, of_weight: Any, device: torch.device
) -> Plan | None:
    """A plan on grad_output, input, weight and argmax, of kernels if all of them have drafts."""
    make_pool, make_input, make_weight = map(draft_of, (of_pool, of_input, of_weight))
    if make_pool is None or make_weight is None or (needs[0] and make_input is None):
        return None
    draft, grad_input = Draft(4), NONE
    (grad,) = make_pool(draft, 0, 3)
    if make_input is not None:
        grad_input = make_input(draft, grad, 2)
    gradients = make_weight(draft, grad, 1, needs[2])
    if grad_input is None or gradients is None:
        return None
    return draft.plan((grad_input, *gradients, NONE), device=device)


def planned_conv_pool(
    tensors: Tensors, geometry: tuple[Any, ...], pool_size: Any
) -> tuple[Planned, Tensors] | None:
    """What runs `conv2d_relu_max_pool2d` on input, weight and bias, and the tensors to call it
    with; or None, where the function does. `geometry` is stride, padding, dilation and groups.
    """
    if torch._C._is_any_autocast_enabled():
        if unwatched_facts(*tensors) is None:
            return None
        tensors = autocast(*tensors)
    key, found = lookup(_OP, tensors, *geometry, pool_size)
    if found is None and key is not None:
        found = _find(key, tensors, geometry, pool_size)
    return (found, tensors) if found else None


def _find(key: Any, tensors: Tensors, geometry: tuple[Any, ...], pool_size: Any) -> Planned | None:
    input, weight, bias = tensors
    backend = chosen()
    if input.dim() != 4 or 0 in input.shape or backend == REFERENCE:
        return keep(key, None)
    if bias is not None and not bias.is_contiguous():
        return keep(key, None)
    of_conv = settings(_OP, weight, *geometry)
    windows = (pair("pool_size", pool_size, _OP),) * 2
    if not runs_fused(input, weight, (*of_conv, *windows), (0, 0), backend):
        return _find_composed(key, tensors, of_conv, (*windows, (0, 0), (1, 1), False))
    arguments = *of_conv, *windows
    key_of_kernel = fused_dispatch.forward_key(input, weight, bias, *(*arguments, backend))
    kernel = pool_dispatch.known_kernel(key_of_kernel)
    if kernel is None:
        return None  # not run yet
    make = draft_of(kernel)
    if make is None:
        return keep(key, None)
    draft = Draft(3)
    forward = draft.plan(make(draft, *_numbers(tensors)), device=input.device)
    return keep(key, _Fused(forward, kernel, tensors, arguments))


def _find_composed(
    key: Any, tensors: Tensors, of_conv: tuple[Any, ...], of_pool: tuple[Any, ...]
) -> Planned | None:
    (input, weight, bias), backend = tensors, chosen()
    if torch.is_grad_enabled() and input.requires_grad and backend == AUTO:
        layer = layer_key(input, weight, bias is not None, (*of_conv, backend))
        # Before its first backward pass nobody knows whether native's own operator is better.
        if conv2d_dispatch.all_native.get(layer) is not False:
            return None
    key_of_conv = conv2d_dispatch.conv2d_key(input, weight, bias, *(*of_conv, backend))
    conv = conv2d_dispatch.known_kernel(key_of_conv)
    if conv is None:
        return None
    query = conv2d_dispatch.conv2d_query("conv2d", input, weight, bias, *of_conv)
    between = _empty(query.geometry.output_size, query.strides[2], input)
    key_of_pool = pool_dispatch.max_pool2d_key(between, *(*of_pool, True, backend))
    pool = pool_dispatch.known_kernel(key_of_pool)
    if pool is None:
        return None
    make_conv, make_pool = draft_of(conv), draft_of(pool)
    if make_conv is None or make_pool is None or is_on_gpu(conv) != is_on_gpu(pool):
        return keep(key, None)
    draft = Draft(3)
    made = make_conv(draft, *_numbers(tensors), *([False] if is_on_gpu(conv) else []))
    if made is None:
        return keep(key, None)
    image = made[0] if is_on_gpu(conv) else made
    forward = draft.plan(make_pool(draft, image), device=input.device)
    return keep(key, _Composed(forward, (conv, pool), tensors, between, of_conv, of_pool))


def _empty(size: Any, strides: Any, like: Tensor) -> Tensor:
    return torch.empty_strided(size, strides, dtype=like.dtype, device=like.device)


def _numbers(tensors: Tensors) -> list[int]:
    return [NONE if tensor is None else number for number, tensor in enumerate(tensors)]
