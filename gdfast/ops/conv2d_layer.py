"""What `conv2d` knows of a layer that has run before: which kernels run it.

What stands before the kernels, in Python, takes as long as a small layer does, more after a large
kernel, with cold caches: here it is gone through once. Only what the operations have run before is
known, so that checks, errors and choices are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast.backends import chosen, tuning
from gdfast.backends.registry import AUTO
from gdfast.geometry import conv2d_is_channels_last, is_channels_last
from gdfast.ops import conv2d_dispatch as dispatch
from gdfast.ops import in_backward
from gdfast.ops.conv2d_autograd import (
    conv_gradients,
    forward_key,
    layer_key,
    learn_whether_native,
)
from gdfast.ops.ordinary import apply_to_ordinary, is_watched, ordinary_facts

_MOST_BACKWARD = 64  # layouts and subsets of gradients that one layer meets


class Layer:
    """A layer on tensors of certain sizes that has run before, and the kernels that it ran."""

    def __init__(
        self, kernel: Callable[..., Any], input: Tensor, weight: Tensor, has_bias: bool,
        arguments: tuple[Any, ...],
    ) -> None:  # fmt: skip
        self.kernel, self.arguments = kernel, arguments
        self._has_bias = has_bias
        # Whether native was chosen for all three passes; None where not all have been chosen yet.
        self._is_native: bool | None = None
        self._input_size, self._weight_size = input.shape, weight.shape
        self._channels_last = (
            conv2d_is_channels_last(input.shape, input.stride(), weight.shape, weight.stride()),
            is_channels_last(weight.shape, weight.stride()),
        )
        # By which gradients are asked for, the facts of the tensors, which hooks may have laid out
        # anew, and what decides beside them.
        self._backward: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    @staticmethod
    def learn(
        key: Any, input: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]
    ) -> None:
        """Notes by `key` a layer that has just run, as it is on these tensors."""
        kernel = dispatch.known_kernel(dispatch.conv2d_key(input, weight, bias, *arguments))
        if kernel is not None:
            if len(dispatch.layers) >= dispatch.KERNELS_LIMIT:
                dispatch.layers.clear()
            dispatch.layers[key] = Layer(kernel, input, weight, bias is not None, arguments)

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            output: Tensor = self.kernel(input, weight, bias)
            return output
        if self._is_native is None and self.arguments[-1] == AUTO:
            of_layer = layer_key(input, weight, self._has_bias, self.arguments)
            self._is_native = dispatch.all_native.get(of_layer)
        if self._is_native and input.requires_grad and weight.requires_grad:  # without autocast
            stride, padding, dilation, groups, _ = self.arguments
            return F.conv2d(input, weight, bias, stride, padding[:2], dilation, groups)
        return _apply_layer(input, weight, bias, self)

    def gradients(
        self, ctx: Any, grad_output: Tensor, input: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradients of input, weight and bias that a context asks for, None for others."""
        needs = need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        facts = None
        if not (in_backward.targets or torch.is_grad_enabled() or is_watched()):
            facts = ordinary_facts(grad_output, input, weight)
        key = needs, facts, chosen(self.arguments[-1]), tuning.situation()
        kernels = self._backward.get(key)
        if kernels is not None:
            for_input, for_weight = kernels
            grad_input = for_input(grad_output, weight) if need_input else None
            if not need_weight:
                return grad_input, None, None
            return grad_input, *for_weight(grad_output, input, need_bias)
        ctx.arguments = self.arguments
        ctx.input_size, ctx.weight_size = self._input_size, self._weight_size
        ctx.input_channels_last, ctx.weight_channels_last = self._channels_last
        gradients = conv_gradients(ctx, grad_output, input, weight)
        if facts is not None and (need_weight or not need_bias):
            self._learn_gradients(ctx, key, grad_output, input, weight)
        return gradients

    def _learn_gradients(
        self, ctx: Any, key: tuple[Any, ...], grad_output: Tensor, input: Any, weight: Any
    ) -> None:
        """Notes by `key` the kernels that the operations of the gradients have just run."""
        (need_input, need_weight, need_bias), _, backend, _ = key
        arguments = *self.arguments[:-1], backend
        for_input = for_weight = None
        if need_input:
            for_input = dispatch.known_kernel(
                dispatch.conv2d_grad_input_key(
                    grad_output, weight, self._input_size, self._channels_last[0], *arguments
                )
            )
        if need_weight:
            for_weight = dispatch.known_kernel(
                dispatch.conv2d_grad_weight_key(
                    grad_output, input, self._weight_size, self._channels_last[1], need_bias,
                    *arguments,
                )
            )  # fmt: skip
        if need_input and need_weight and self.arguments[-1] == AUTO:
            of_layer = partial(layer_key, input, weight, self._has_bias, self.arguments)
            of_forward = partial(forward_key, input, weight, self._has_bias, self.arguments)
            learn_whether_native(ctx, grad_output, input, weight, of_layer, of_forward)
        if (for_input is None) == need_input or (for_weight is None) == need_weight:
            return  # a graph that is recorded leaves them unknown
        if len(self._backward) >= _MOST_BACKWARD:
            self._backward.clear()
        self._backward[key] = for_input, for_weight


class Conv2dLayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, weight, bias, layer = inputs
        need_input, need_weight = ctx.needs_input_grad[:2]
        ctx.layer = layer
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
        output: Tensor = layer.kernel(input, weight, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.layer.gradients(ctx, grad_output, *ctx.saved_tensors), None


_apply_layer = apply_to_ordinary(Conv2dLayerFunction)
