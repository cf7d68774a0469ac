"""A convolution with bias, ReLU and max pooling in one kernel, and its gradient in the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import max_pool2d, memory, plans
from gdfast.backends.max_pool2d import DTYPES, MaxPool2dQuery
from gdfast.backends.registry import Query
from gdfast.geometry import Conv2dGeometry, MaxPool2dGeometry, dense_strides

# With more channels or taps, reading the convolution's output again costs little beside making it.
_MOST_CHANNELS = 4
_MOST_TAPS = 64


@dataclass(frozen=True, kw_only=True)
class FusedPoolQuery(Query):
    """The query of conv2d + bias + ReLU + max_pool2d, or of its gradient in the weight.

    `strides` are the element strides of input, weight and pooled output, or of the gradients that
    take their places; argmax is contiguous.
    """

    conv: Conv2dGeometry
    pool: MaxPool2dGeometry
    strides: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def fits(conv: Conv2dGeometry, pool: MaxPool2dGeometry) -> bool:
    """Whether the kernels are made for a geometry: few input channels, no overlapping windows."""
    return (
        conv.groups == 1
        and 1 <= conv.C <= _MOST_CHANNELS
        and conv.C * conv.R * conv.S <= _MOST_TAPS
        and pool.padding == (0, 0)
        and pool.stride[0] >= pool.R
        and pool.stride[1] >= pool.S
        and pool.R * pool.S <= 255
    )


def _problems(query: FusedPoolQuery) -> tuple[Any, Any]:
    assert native.cpu is not None
    c, (input, weight, output) = query.conv, query.strides
    argmax = dense_strides(query.pool.output_size, False)
    between = dense_strides(c.output_size, False)  # a tensor that nobody makes
    conv = native.cpu.Conv2dProblem(
        (c.N, c.C, c.H, c.W, c.K, c.R, c.S, c.P, c.Q), c.stride, c.padding[:2], c.dilation,
        c.groups, DTYPES[query.dtype], input, weight, between,
    )  # fmt: skip
    pooling = MaxPool2dQuery(
        query.device, query.dtype, geometry=query.pool, strides=(between, output, argmax), relu=True
    )
    return conv, max_pool2d.problem(pooling, native.cpu)


def cpu(
    query: FusedPoolQuery,
) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    assert native.cpu is not None
    (conv, pool), run = _problems(query), native.cpu.conv2d_relu_max_pool2d
    size = query.pool.output_size
    new_output = memory.allocator(size, query.strides[2], query.dtype)
    new_argmax = memory.allocator(size, dense_strides(size, False), torch.uint8)

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        output, argmax = new_output(), new_argmax()
        if bias is not None:
            bias = bias.contiguous()
        run(
            conv, pool, input.data_ptr(), weight.data_ptr(),
            0 if bias is None else bias.data_ptr(), output.data_ptr(), argmax.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return output, argmax

    def draft(plan: plans.Draft, input: int, weight: int, bias: int) -> tuple[int, int]:
        results = plan.fresh(new_output), plan.fresh(new_argmax)
        plan.launch(launch, input, weight, bias, *results)
        return results

    launch = native.cpu.conv2d_relu_max_pool2d_launch(conv, pool)
    return plans.drafted(kernel, draft)


def cpu_grad_weight(
    query: FusedPoolQuery,
) -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    assert native.cpu is not None
    (conv, pool), run = _problems(query), native.cpu.conv2d_relu_max_pool2d_grad_weight
    size, dtype = query.conv.weight_size, query.dtype
    new_grad_weight = memory.allocator(size, query.strides[1], dtype)
    new_grad_bias = memory.allocator(size[:1], (1,), dtype)

    def kernel(
        grad_output: Tensor, argmax: Tensor, input: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_weight = new_grad_weight()
        grad_bias = new_grad_bias() if bias else None
        run(
            conv, pool, grad_output.data_ptr(), argmax.data_ptr(), input.data_ptr(),
            grad_weight.data_ptr(), 0 if grad_bias is None else grad_bias.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_weight, grad_bias

    def draft(
        plan: plans.Draft, grad_output: int, argmax: int, input: int, bias: bool
    ) -> tuple[int, int]:
        results = plan.fresh(new_grad_weight), plan.fresh(new_grad_bias) if bias else plans.NONE
        plan.launch(launch, grad_output, argmax, input, *results)
        return results

    launch = native.cpu.conv2d_relu_max_pool2d_grad_weight_launch(conv, pool)
    return plans.drafted(kernel, draft)
