"""The reference: native PyTorch's own operators, for whatever no other backend takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gdfast.backends import batch_norm, max_pool2d, sgd
from gdfast.backends.activation import activate
from gdfast.backends.registry import REFERENCE, Backend, Conv2dActQuery, Conv2dQuery
from gdfast.geometry import Padding, dense_strides, is_channels_last

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default


def _symmetric(padding: Padding) -> tuple[list[int], list[int]]:
    """The padding that native's operators take, and what is left for `constant_pad_nd`."""
    top, left, below, right = padding
    rows, columns = min(top, below), min(left, right)
    return [rows, columns], [left - columns, right - columns, top - rows, below - rows]


def _pad(input: Tensor, rest: list[int]) -> Tensor:
    return torch.ops.aten.constant_pad_nd.default(input, rest) if any(rest) else input


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    # Fake kernels promise a layout; native's own choice depends on the algorithm that it takes.
    if is_channels_last(tensor.shape, strides):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def conv2d(query: Conv2dQuery) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    geometry = query.geometry
    padding, rest = _symmetric(geometry.padding)

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._DisableAutocast():  # the caller has cast what is to be cast
            output = _convolution(
                _pad(input, rest), weight, bias, geometry.stride, padding, geometry.dilation,
                False, [0, 0], geometry.groups,
            )  # fmt: skip
        return _laid_out(output, query.strides[2])

    return kernel


def conv2d_act(query: Conv2dActQuery) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    convolve = conv2d(query)
    activation, negative_slope = query.activation, query.negative_slope

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = convolve(input, weight, bias)
        return activate(output, activation, negative_slope, inplace=True)

    return kernel


def conv2d_grad_input(query: Conv2dQuery) -> Callable[[Tensor, Tensor], Tensor]:
    geometry = query.geometry
    N, C, H, W = geometry.input_size
    padding, rest = _symmetric(geometry.padding)
    left, right, top, below = rest
    padded_size = (N, C, H + top + below, W + left + right)
    channels_last = is_channels_last(geometry.input_size, query.strides[0])

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        # Only its size and layout matter here: nobody reads it, so no page of it is touched.
        input = grad_output.new_empty_strided(
            padded_size, dense_strides(padded_size, channels_last)
        )
        grad_input = _convolution_backward(
            grad_output, input, weight, None, geometry.stride, padding, geometry.dilation,
            False, [0, 0], geometry.groups, [True, False, False],
        )[0]  # fmt: skip
        if any(rest):
            grad_input = grad_input[:, :, top : top + H, left : left + W]
        return _laid_out(grad_input, query.strides[0])

    return kernel


def conv2d_grad_weight(
    query: Conv2dQuery,
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    geometry = query.geometry
    padding, rest = _symmetric(geometry.padding)

    def kernel(grad_output: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        weight = input.new_empty_strided(geometry.weight_size, query.strides[1])
        _, grad_weight, grad_bias = _convolution_backward(
            grad_output, _pad(input, rest), weight, [geometry.output_size[1]], geometry.stride,
            padding, geometry.dilation, False, [0, 0], geometry.groups, [False, True, bias],
        )  # fmt: skip
        return _laid_out(grad_weight, query.strides[1]), grad_bias

    return kernel


BACKEND = Backend(
    name=REFERENCE,
    operations={
        "batch_norm_act": batch_norm.reference,
        "batch_norm_act_backward": batch_norm.reference_backward,
        "conv2d": conv2d,
        "conv2d_act": conv2d_act,
        "conv2d_grad_input": conv2d_grad_input,
        "conv2d_grad_weight": conv2d_grad_weight,
        "max_pool2d": max_pool2d.reference,
        "max_pool2d_grad": max_pool2d.reference_grad,
        "sgd_": sgd.reference,
    },
)
