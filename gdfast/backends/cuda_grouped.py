"""Convolution in groups of few channels on CUDA kernels of its own: half types in channels_last.

Tiles of a dense product have 64 filters and more, of which a group of 4 fills one sixteenth. These
kernels take groups side by side, 64 channels in all, read each pixel from global memory about once
and multiply little more than there is: a layer of 128 channels in groups of 4 is bound by memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_hopper, cuda_stream
from gdfast.backends.cuda_grad_weight import GradWeight
from gdfast.backends.registry import Conv2dQuery
from gdfast.backends.sgd import address

NAME = "grouped"
HOPPER = "grouped-hopper"  # 3x3 filters of stride 1, by TMA, on GPUs of compute capability 9.0
WHOLE = "grouped-whole"  # of these, small images, which a block has whole, in bfloat16
# The one expected to be faster first.
BINDINGS = {WHOLE: "grouped_whole", HOPPER: "grouped_hopper", NAME: "grouped"}
Copy = Callable[[Tensor], Tensor]


def candidates() -> tuple[str, ...]:
    return (NAME,) if os.environ.get("GDFAST_HOPPER") == "0" else tuple(BINDINGS)


def why_not(op: str, query: Conv2dQuery, problem: Any, by: str = NAME) -> str:
    """Why the kernels do not take a pass of a convolution, whose problem this is, or ""."""
    assert native.cuda is not None
    if query.geometry.groups == 1 or query.dtype.itemsize != 2:  # most layers
        return "it takes groups, of half types"
    if by != NAME and (reason := cuda_hopper.missing(query.device)):
        return reason
    return str(_binding("conv2d", by, "_why_not")(problem, op))


def _binding(op: str, by: str, ending: str = "") -> Callable[..., Any]:
    binding: Callable[..., Any] = getattr(native.cuda, f"{op}_{BINDINGS[by]}{ending}")
    return binding


def conv2d(
    query: Conv2dQuery, problem: Any, copy_input: Copy, by: str
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    run = _binding("conv2d", by)
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
    query: Conv2dQuery, problem: Any, copy_grad: Copy, by: str
) -> Callable[[Tensor, Tensor], Tensor]:
    run = _binding("conv2d_grad_input", by)
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

    draft: Any = None

    def __init__(
        self, query: Conv2dQuery, problem: Any, copies: Sequence[Copy], way: Callable[[], Any],
        by: str,
    ) -> None:  # fmt: skip
        self._run_kernel = _binding("conv2d_grad_weight", by)
        super().__init__(query, problem, copies, way, _binding("conv2d", by, "_splits")(problem))

    def _sum(
        self, grad_output: Tensor, input: Tensor, grad_weight: Tensor | None,
        grad_bias: Tensor | None, workspace: Tensor,
    ) -> None:  # fmt: skip
        self._run_kernel(
            self.problem, grad_output.data_ptr(), input.data_ptr(), address(grad_weight),
            address(grad_bias), workspace.data_ptr(), self.parts,
            *cuda_stream.current(input.device),
        )  # fmt: skip
