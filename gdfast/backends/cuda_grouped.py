"""Convolution in groups of few channels on CUDA kernels of its own: half types in channels_last.

Tiles of a dense product have 64 filters and more, of which a group of 4 fills one sixteenth. These
kernels take groups side by side, 64 channels in all, read each pixel from global memory about once
and multiply little more than there is: a layer of 128 channels in groups of 4 is bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_stream
from gdfast.backends.cuda_grad_weight import GradWeight
from gdfast.backends.registry import Conv2dQuery
from gdfast.backends.sgd import address

NAME = "grouped"
Copy = Callable[[Tensor], Tensor]


def why_not(op: str, query: Conv2dQuery, problem: Any) -> str:
    """Why the kernels do not take a pass of a convolution, whose problem this is, or ""."""
    assert native.cuda is not None
    if query.geometry.groups == 1 or query.dtype.itemsize != 2:  # most layers
        return "it takes groups, of half types"
    return str(native.cuda.conv2d_grouped_why_not(problem, op))


def conv2d(
    query: Conv2dQuery, problem: Any, copy_input: Copy
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A forward kernel; the problem has the query's activation, and strides of what is copied."""
    assert native.cuda is not None
    run = native.cuda.conv2d_grouped
    size, strides = query.geometry.output_size, query.strides[2]

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        input = copy_input(input)
        if bias is not None:
            bias = bias.contiguous()
        run(
            problem, input.data_ptr(), weight.data_ptr(), address(bias), output.data_ptr(),
            *cuda_stream.current(input.device),
        )  # fmt: skip
        return output

    return kernel


def conv2d_grad_input(
    query: Conv2dQuery, problem: Any, copy_grad: Copy
) -> Callable[[Tensor, Tensor], Tensor]:
    assert native.cuda is not None
    run = native.cuda.conv2d_grad_input_grouped
    size, strides = query.geometry.input_size, query.strides[0]

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_input = torch.empty_strided(size, strides, dtype=weight.dtype, device=weight.device)
        grad_output = copy_grad(grad_output)
        run(
            problem, grad_output.data_ptr(), weight.data_ptr(), grad_input.data_ptr(),
            *cuda_stream.current(weight.device),
        )  # fmt: skip
        return grad_input

    return kernel


class GroupedGradWeight(GradWeight):
    """Its parts, of one too, lie in the workspace before they are a gradient or an update."""

    ends_in_registers = False

    def _sum(
        self, grad_output: Tensor, input: Tensor, grad_weight: Tensor | None,
        grad_bias: Tensor | None, workspace: Tensor,
    ) -> None:  # fmt: skip
        assert native.cuda is not None
        native.cuda.conv2d_grad_weight_grouped(
            self.problem, grad_output.data_ptr(), input.data_ptr(), address(grad_weight),
            address(grad_bias), workspace.data_ptr(), self.parts,
            *cuda_stream.current(input.device),
        )  # fmt: skip
