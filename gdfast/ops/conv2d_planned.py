"""`conv2d` as a plan each way, of the kernels that it ran before.

What stands before the kernels, in Python, takes as long as a small layer does, more after a large
kernel, with cold caches: here it is gone through once. A kernel that carries no draft, as native's
does not, is called by itself in the place of a plan.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast.backends.plans import NONE, Draft, Plan, draft_of, is_on_gpu
from gdfast.backends.registry import AUTO
from gdfast.geometry import conv2d_is_channels_last, is_channels_last
from gdfast.ops import conv2d_dispatch as dispatch
from gdfast.ops.conv2d_autograd import (
    conv_gradients,
    forward_key,
    layer_key,
    learn_whether_native,
)
from gdfast.ops.planned import Gradients, Planned, keep, lookup

Tensors = tuple[Any, ...]


class _Conv(Planned):
    """`arguments` are stride, padding on all sides, dilation, groups and backend."""

    def __init__(self, kernel: Any, tensors: Tensors, arguments: Tensors) -> None:
        input, weight, bias = tensors
        on_gpu = is_on_gpu(kernel) or input.device.type == "cuda"
        forward = _forward_plan(kernel, tensors, on_gpu)
        super().__init__(forward, input.device, on_gpu, arguments[-1])
        self._kernel, self._on_gpu, self._has_bias = kernel, on_gpu, bias is not None
        # Whether native was chosen for all three passes; None where not all have been chosen yet.
        self._is_native: bool | None = None
        self.arguments = arguments
        self.input_size, self.weight_size = input.shape, weight.shape
        self.input_channels_last = conv2d_is_channels_last(
            input.shape, input.stride(), weight.shape, weight.stride()
        )
        self.weight_channels_last = is_channels_last(weight.shape, weight.stride())

    def run(self, tensors: Tensors, momentum: float = 0.0) -> Tensor:
        input, weight, bias = tensors
        if self.arguments[-1] == AUTO and torch.is_grad_enabled():
            if self._is_native is None:
                of_layer = layer_key(input, weight, self._has_bias, self.arguments)
                self._is_native = dispatch.all_native.get(of_layer)
            if self._is_native and input.requires_grad and weight.requires_grad:
                stride, padding, dilation, groups, _ = self.arguments
                return F.conv2d(input, weight, bias, stride, padding[:2], dilation, groups)
        return super().run(tensors)

    def kernels(self, *tensors: Any) -> Tensors:
        return (self._kernel(*tensors),)

    def saved(self, needs: Any, tensors: Any, made: Any) -> Tensors:
        input, weight, *_ = tensors
        return input if needs[1] else None, weight if needs[0] else None

    def operations(self, ctx: Any, grad_output: Tensor, saved: Tensors) -> Gradients:
        ctx.arguments = self.arguments
        ctx.input_size, ctx.input_channels_last = self.input_size, self.input_channels_last
        ctx.weight_size, ctx.weight_channels_last = self.weight_size, self.weight_channels_last
        return conv_gradients(ctx, grad_output, *saved)

    def backward_plan(self, needs: Any, grad_output: Tensor, saved: Any) -> Plan | None:
        (input, weight), arguments = saved, self.arguments
        chosen = *arguments[:-1], self.backend
        need_input, need_weight, need_bias, *_ = needs
        of_input = of_weight = None
        if need_input:
            of_input = dispatch.known_kernel(
                dispatch.conv2d_grad_input_key(
                    grad_output, weight, self.input_size, self.input_channels_last, *chosen
                )
            )
        if need_weight:
            of_weight = dispatch.known_kernel(
                dispatch.conv2d_grad_weight_key(
                    grad_output, input, self.weight_size, self.weight_channels_last, need_bias,
                    *chosen,
                )
            )  # fmt: skip
        if need_input and need_weight and arguments[-1] == AUTO:
            of_layer = partial(layer_key, input, weight, self._has_bias, arguments)
            of_forward = partial(forward_key, input, weight, self._has_bias, arguments)
            learn_whether_native(self, grad_output, input, weight, of_layer, of_forward)
        if (of_input is None) == need_input or (of_weight is None) == need_weight:
            return None  # a graph that is recorded leaves them unknown
        if need_bias and not need_weight:
            return None  # a sum, by no kernel of ours
        plan = _backward_plan(of_input, of_weight, need_bias, grad_output.device, self._on_gpu)
        return plan or partial(_call_backward, of_input, of_weight, need_bias)


def _forward_plan(kernel: Any, tensors: Tensors, on_gpu: bool) -> Plan:
    """A plan on input, weight and bias, or a call of the kernel."""
    make, bias = draft_of(kernel), tensors[2]
    if make is not None and on_gpu == is_on_gpu(kernel) and (bias is None or bias.is_contiguous()):
        draft = Draft(3)
        numbers = [0, 1, NONE if bias is None else 2]
        made = make(draft, *numbers, *([False] if on_gpu else []))
        if made is not None:
            return draft.plan((made[0] if on_gpu else made,), device=tensors[0].device)
    return partial(_call_forward, kernel)


def _call_forward(kernel: Any, tensors: Tensors, *_: Any) -> Tensors:
    return (kernel(*tensors),)


def _backward_plan(
    of_input: Any, of_weight: Any, bias: bool, device: torch.device, on_gpu: bool
) -> Plan | None:
    """A plan on grad_output, input and weight of the kernels that there are, if it can be."""
    kernels = [kernel for kernel in (of_input, of_weight) if kernel is not None]
    if any(draft_of(each) is None or is_on_gpu(each) != on_gpu for each in kernels):
        return None
    draft, grad_input, gradients = Draft(3), NONE, (NONE, NONE)
    if of_input is not None:
        grad_input = of_input.draft(draft, 0, 2)
    if of_weight is not None:
        gradients = of_weight.draft(draft, 0, 1, bias)
    if grad_input is None or gradients is None:
        return None
    return draft.plan((grad_input, *gradients, NONE), device=device)


def _call_backward(
    of_input: Any, of_weight: Any, bias: bool, tensors: Tensors, *_: Any
) -> tuple[Any, ...]:
    grad_output, input, weight = tensors
    grad_input = None if of_input is None else of_input(grad_output, weight)
    gradients = (None, None) if of_weight is None else of_weight(grad_output, input, bias)
    return grad_input, *gradients, None


def layer_of(
    tensors: Tensors, stride: Any, padding: Any, dilation: Any, groups: Any, backend: str = AUTO
) -> tuple[Any, Planned | None]:
    """A key for what runs `conv2d` on input, weight and bias as all is now, and what ran there
    before; both may be None."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None, None
    return lookup("conv2d", tensors, stride, padding, dilation, groups, backend)


def learn(key: Tensors, tensors: Tensors, arguments: Tensors) -> None:
    """Keeps, by a key of `layer_of`, what has just run on input, weight and bias."""
    kernel = dispatch.known_kernel(dispatch.conv2d_key(*tensors, *arguments))
    if kernel is not None:
        keep(key, _Conv(kernel, tensors, arguments))
