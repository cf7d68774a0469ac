"""Depthwise convolution on CUDA kernels of its own, which read any layout in place."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_stream
from gdfast.backends.registry import Conv2dQuery
from gdfast.geometry import Conv2dGeometry

NAME = "depthwise"
TENSOR = "depthwise-tensor"  # on the tensor cores
NARROW = "depthwise-tensor-narrow"  # there too, in slabs of fewer channels
ROWS = "depthwise-rows"  # 3x3 by whole rows, on GPUs of compute capability 9.0
BOXES = "depthwise-boxes"  # there too, in boxes for the tensor cores
TOEPLITZ = "depthwise-toeplitz"  # there, 5x5 and 7x7 by bands for the tensor cores
HOPPER = ROWS, BOXES, TOEPLITZ
WAYS = ROWS, BOXES, TOEPLITZ, TENSOR, NARROW, NAME  # the one expected to be fastest first
# Elements of an image tensor, from where on two copies cost less than reading NCHW in place.
_LARGE = 2**20
_MOST = 2**31 - 2**16  # what kernels count in 32 bits, with room for a step beyond the end
_MOST_BLOCKS = 65535  # a grid's second and third axis


def depthwise_fits(query: Conv2dQuery) -> bool:
    """Whether the kernels take a convolution: each filter reads one of several channels."""
    g = query.geometry
    if g.groups != g.C or g.C == 1:
        return False
    top, left, below, right = g.padding
    padded = g.C, g.H + top + below, g.W + left + right
    for size, strides in zip(
        (padded, g.output_size[1:], g.weight_size), _image_strides(query), strict=True
    ):
        reach = sum(n * abs(step) for n, step in zip(size, strides, strict=True))
        if max(prod(size), reach) > _MOST:
            return False
    blocks = max(g.K, g.H, g.P, g.R * g.S)
    return g.N * g.P * g.Q <= _MOST // 2 and blocks <= _MOST_BLOCKS


def has_vectors(geometry: Conv2dGeometry) -> bool:
    """Whether the kernels for channels_last read several channels at a time."""
    return geometry.K == geometry.C and geometry.C % 4 == 0


def is_large(query: Conv2dQuery) -> bool:
    """Whether the kernels for channels_last are expected to make up for copies there and back."""
    return prod(query.geometry.input_size) >= _LARGE


def _image_strides(query: Conv2dQuery) -> tuple[tuple[int, ...], ...]:
    input, weight, output = query.strides
    return input[1:], output[1:], weight


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def tensor_why_not(problem: Any) -> str:
    """Why a depthwise problem does not run on the tensor cores, or ""."""
    assert native.cuda is not None
    return str(native.cuda.depthwise_tensor_why_not(problem))


def hopper_why_not(problem: Any, by: str) -> str:
    """Why a depthwise problem does not run by one of the ways for Hopper, or ""."""
    assert native.cuda is not None
    names = {
        ROWS: native.cuda.depthwise_rows_why_not, BOXES: native.cuda.depthwise_boxes_why_not,
        TOEPLITZ: native.cuda.depthwise_toeplitz_why_not,
    }  # fmt: skip
    return str(names[by](problem))


def conv2d(
    query: Conv2dQuery, problem: Any, by: str
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A forward kernel; the problem has the query's strides, and its activation."""
    assert native.cuda is not None
    run = native.cuda.depthwise_conv2d
    size, strides = query.geometry.output_size, query.strides[2]

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        if bias is not None:
            bias = bias.contiguous()
        run(
            problem, by, input.data_ptr(), weight.data_ptr(), _address(bias),
            output.data_ptr(), *cuda_stream.current(input.device),
        )  # fmt: skip
        return output

    return kernel


def conv2d_grad_input(
    query: Conv2dQuery, problem: Any, by: str
) -> Callable[[Tensor, Tensor], Tensor]:
    assert native.cuda is not None
    run = native.cuda.depthwise_conv2d_grad_input
    size, strides = query.geometry.input_size, query.strides[0]

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_input = torch.empty_strided(size, strides, dtype=weight.dtype, device=weight.device)
        run(
            problem, by, grad_output.data_ptr(), weight.data_ptr(),
            grad_input.data_ptr(), *cuda_stream.current(weight.device),
        )  # fmt: skip
        return grad_input

    return kernel


def conv2d_grad_weight(
    query: Conv2dQuery, problem: Any, by: str
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    assert native.cuda is not None
    run = native.cuda.depthwise_conv2d_grad_weight
    size, strides = query.geometry.weight_size, query.strides[1]
    workspace_bytes = native.cuda.depthwise_conv2d_grad_weight_workspace(problem, by)

    def kernel(grad_output: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        grad_weight = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        grad_bias = input.new_empty(size[0]) if bias else None
        workspace = input.new_empty(workspace_bytes, dtype=torch.uint8)
        run(
            problem, by, grad_output.data_ptr(), input.data_ptr(),
            grad_weight.data_ptr(), _address(grad_bias), workspace.data_ptr(),
            *cuda_stream.current(input.device),
        )  # fmt: skip
        return grad_weight, grad_bias

    return kernel
