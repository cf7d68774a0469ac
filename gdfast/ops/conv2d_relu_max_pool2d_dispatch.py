"""The dispatcher's side of conv2d + bias + ReLU + max_pool2d in one kernel, and of its grad_weight.

padding is (rows above, columns left, rows below, columns right); pool_size and pool_stride are
pairs. Windows are not padded: other geometries than `fused_pool.fits` takes are composed of conv2d
and max_pool2d by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gdfast.backends import chosen
from gdfast.backends.fused_pool import FusedPoolQuery, fits
from gdfast.errors import mismatch
from gdfast.geometry import (
    Conv2dGeometry,
    MaxPool2dGeometry,
    conv2d_is_channels_last,
    dense_strides,
)
from gdfast.ops.conv2d_dispatch import check_alike, check_bias, library
from gdfast.ops.max_pool2d_dispatch import bind, known_kernel
from gdfast.ops.ordinary import tensor_facts

_OP = "conv2d_relu_max_pool2d"
_ARGUMENTS = (
    "int[] stride, int[] padding, int[] dilation, int groups, int[] pool_size, int[] pool_stride, "
    "str backend"
)

library.define(
    f"{_OP}(Tensor input, Tensor weight, Tensor? bias, {_ARGUMENTS}) -> (Tensor, Tensor)"
)
# Without `bias` the second result is None.
library.define(
    f"{_OP}_grad_weight(Tensor grad_output, Tensor argmax, Tensor input, SymInt[] weight_size, "
    f"bool channels_last, bool bias, {_ARGUMENTS}) -> (Tensor, Tensor)"
)


def forward_key(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    pool_size: Sequence[int], pool_stride: Sequence[int], backend: str,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernel of a forward pass is kept by."""
    return (
        _OP, tensor_facts(input, weight, bias),
        *stride, *padding, *dilation, groups, *pool_size, *pool_stride, backend,
    )  # fmt: skip


def grad_weight_key(
    grad_output: Tensor, argmax: Tensor, input: Tensor, weight_size: Sequence[int],
    channels_last: bool,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    pool_size: Sequence[int], pool_stride: Sequence[int], backend: str,
) -> tuple[Any, ...]:  # fmt: skip
    """What the kernel of the gradients in weight and bias is kept by."""
    return (
        f"{_OP}_grad_weight", tensor_facts(grad_output, argmax, input),
        *weight_size, channels_last, *stride, *padding, *dilation, groups, *pool_size,
        *pool_stride, backend,
    )  # fmt: skip


def conv2d_relu_max_pool2d(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    pool_size: Sequence[int], pool_stride: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs a forward pass; returns the pooled output and its argmax."""
    backend = chosen(backend)
    key = forward_key(
        input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride, backend
    )
    run = known_kernel(key)
    if run is None:
        query = _query(
            input, weight, bias, stride, padding, dilation, groups, pool_size, pool_stride
        )
        run = bind(key, _OP, query, backend)
    output: tuple[Tensor, Tensor] = run(input, weight, bias)
    return output


def conv2d_relu_max_pool2d_grad_weight(
    grad_output: Tensor, argmax: Tensor, input: Tensor, weight_size: Sequence[int],
    channels_last: bool, bias: bool,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    pool_size: Sequence[int], pool_stride: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Runs the gradients in the weight and, with `bias`, the bias."""
    backend = chosen(backend)
    op = f"{_OP}_grad_weight"
    key = grad_weight_key(
        grad_output, argmax, input, weight_size, channels_last, stride, padding, dilation, groups,
        pool_size, pool_stride, backend,
    )  # fmt: skip
    run = known_kernel(key)
    if run is None:
        query = _grad_query(
            grad_output, argmax, input, weight_size, channels_last, stride, padding, dilation,
            groups, pool_size, pool_stride,
        )  # fmt: skip
        run = bind(key, op, query, backend)
    output: tuple[Tensor, Tensor | None] = run(grad_output, argmax, input, bias)
    return output


def geometries(
    input_size: Sequence[int], weight_size: Sequence[int], stride: Any, padding: Any,
    dilation: Any, groups: int, pool_size: Any, pool_stride: Any, pool_padding: Any = (0, 0),
) -> tuple[Conv2dGeometry, MaxPool2dGeometry]:  # fmt: skip
    """Those of the convolution and of the pooling behind it. Raises RuntimeError and ValueError."""
    conv = Conv2dGeometry.of(_OP, input_size, weight_size, stride, padding, dilation, groups)
    pool = MaxPool2dGeometry.of(
        _OP, conv.output_size, pool_size, pool_stride, pool_padding, (1, 1), False
    )
    return conv, pool


def _checked(*arguments: Any) -> tuple[Conv2dGeometry, MaxPool2dGeometry]:
    conv, pool = geometries(*arguments)
    if not fits(conv, pool):
        expected = "few input channels, and windows that do not overlap"
        fix = "Compose torch.ops.gdfast.conv2d and max_pool2d"
        raise RuntimeError(mismatch(_OP, "input, pool_size", expected, (conv, pool), fix))
    return conv, pool


def _query(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> FusedPoolQuery:
    conv, pool = _checked(input.shape, weight.shape, *arguments)
    check_alike(_OP, "input", input, weight=weight, bias=bias)
    check_bias(_OP, bias, conv)
    channels_last = conv2d_is_channels_last(
        input.shape, input.stride(), weight.shape, weight.stride()
    )
    strides = input.stride(), weight.stride(), dense_strides(pool.output_size, channels_last)
    return FusedPoolQuery(
        input.device, input.dtype, input.layout, conv=conv, pool=pool, strides=strides
    )


def _grad_query(
    grad_output: Tensor, argmax: Tensor, input: Tensor, weight_size: Sequence[int],
    channels_last: bool, *arguments: Any,
) -> FusedPoolQuery:  # fmt: skip
    op = f"{_OP}_grad_weight"
    conv, pool = _checked(input.shape, weight_size, *arguments)
    for name, tensor in (("grad_output", grad_output), ("argmax", argmax)):
        if tuple(tensor.shape) != pool.output_size:
            expected, got = (f"size {list(s)}" for s in (pool.output_size, tensor.shape))
            raise RuntimeError(mismatch(op, name, expected, got))
    if argmax.dtype != torch.uint8 or not argmax.is_contiguous():
        got = f"{argmax.dtype} with strides {argmax.stride()}"
        raise RuntimeError(mismatch(op, "argmax", "contiguous torch.uint8", got))
    check_alike(op, "grad_output", grad_output, input=input)
    weight_strides = dense_strides(conv.weight_size, channels_last)
    return FusedPoolQuery(
        grad_output.device, grad_output.dtype, grad_output.layout, conv=conv, pool=pool,
        strides=(input.stride(), weight_strides, grad_output.stride()),
    )  # fmt: skip


def _fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *arguments_, _ = arguments
    query = _query(input, weight, bias, *arguments_)
    size = query.pool.output_size
    return (
        input.new_empty_strided(size, query.strides[2]),
        input.new_empty(size, dtype=torch.uint8),
    )


def _fake_grad_weight(
    grad_output: Tensor, argmax: Tensor, input: Tensor, weight_size: Any, channels_last: bool,
    bias: bool, *arguments: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    *arguments_, _ = arguments
    query = _grad_query(grad_output, argmax, input, weight_size, channels_last, *arguments_)
    grad_weight = input.new_empty_strided(query.conv.weight_size, query.strides[1])
    return grad_weight, grad_output.new_empty(query.conv.K) if bias else None


for _name, _kernel, _fake_kernel in (
    (_OP, conv2d_relu_max_pool2d, _fake),
    (f"{_OP}_grad_weight", conv2d_relu_max_pool2d_grad_weight, _fake_grad_weight),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gdfast::{_name}", _fake_kernel, lib=library)


def _flops(input_size: Any, weight_size: Any, *arguments: Any) -> int:
    # As natively: the convolution at all of its positions, which the fused kernels may skip.
    *arguments_, _ = arguments
    conv, _ = geometries(input_size, weight_size, *arguments_)
    return 2 * prod(conv.output_size) * prod(conv.weight_size[1:])


@register_flop_formula(torch.ops.gdfast.conv2d_relu_max_pool2d)
def _forward_flops(input: Any, weight: Any, bias: Any, *arguments: Any, **_: Any) -> int:
    return _flops(input, weight, *arguments)


@register_flop_formula(torch.ops.gdfast.conv2d_relu_max_pool2d_grad_weight)
def _grad_weight_flops(
    grad_output: Any, argmax: Any, input: Any, weight_size: Any, channels_last: bool, bias: bool,
    *arguments: Any, **_: Any,
) -> int:  # fmt: skip
    return _flops(input, weight_size, *arguments)
