"""Convolution of float32 without TF32 by Hopper's tensor cores, which multiply bfloat16.

A number is the sum of three bfloat16 parts, and a product that of six products of parts: as exact
as float32's, and 2.5 times as fast as its own units are at their peak. Sums are taken in float32.
For a sum of n products the error is at most 2^-20 + n 2^-30 of the sum of their magnitudes, 5.3e-6
for n = 4608; below 2^-110 numbers count to 2^-134. What is not finite comes out as float32 has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_hopper, cuda_stream, cuda_tiles
from gdfast.backends.cuda_grad_weight import BegunGradWeight, Copy, GradWeight, Parts
from gdfast.backends.registry import Conv2dQuery
from gdfast.backends.sgd import address

# Pixels and channels of a tile; filters x columns of the weight that a block makes, where
# 64 columns are so many channels of a tap.
TILES = {
    "hopper-64-bf16x6": (128, 64), "hopper-128-bf16x6": (128, 128),
    "hopper-64-tall-bf16x6": (256, 64),
}  # fmt: skip
BLOCKS = {
    "hopper-64x192-bf16x6": (64, 192), "hopper-64x256-bf16x6": (64, 256),
    "hopper-128x128-bf16x6": (128, 128),
}  # fmt: skip
_BOX = 64  # filters or channels


def allows_tf32(query: Conv2dQuery) -> bool:
    """Whether tiles may multiply in TF32 now, which is faster."""
    return cuda_tiles.precision_of(query) == "tf32"


def why_not(op: str, query: Conv2dQuery, problem: Any) -> str:
    """Why the kernels do not run one pass of a convolution, whose problem this is, or ""."""
    assert native.cuda is not None
    if query.dtype != torch.float32:  # most layers
        return "it takes float32"
    if reason := cuda_hopper.missing(query.device):
        return reason
    if op == "conv2d_grad_weight":
        return str(native.cuda.conv2d_grad_weight_hopper_float32_why_not(problem))
    return str(native.cuda.conv2d_hopper_float32_why_not(problem, op == "conv2d_grad_input"))


def candidates(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    """The tiles or blocks that are worth timing, the one expected to be fastest first."""
    g = query.geometry
    if op == "conv2d_grad_weight":
        columns = ceil(g.C / _BOX) * _BOX * g.R * g.S
        # 192 with nothing left over are the better choice, but read more than 128 filters do.
        blocks = ["hopper-64x256-bf16x6"]
        blocks.insert(0 if columns % 192 == 0 else 1, "hopper-64x192-bf16x6")
        if g.K > _BOX:
            blocks.insert(0, "hopper-128x128-bf16x6")
        return tuple(blocks)
    made = g.C if op == "conv2d_grad_input" else g.K
    narrow = "hopper-64-tall-bf16x6", "hopper-64-bf16x6"
    return narrow if made <= _BOX else ("hopper-128-bf16x6", *narrow)


def conv2d(
    query: Conv2dQuery, problem: Any, copy_input: Copy, name: str
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A forward kernel; the problem has the query's activation, and strides of what is copied."""
    assert native.cuda is not None
    run, tile = native.cuda.conv2d_hopper_float32, TILES[name]
    bytes = native.cuda.conv2d_hopper_float32_workspace(problem, False)
    size, strides = query.geometry.output_size, query.strides[2]

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        input = copy_input(input)
        if bias is not None:
            bias = bias.contiguous()
        workspace = torch.empty(bytes, dtype=torch.uint8, device=input.device)
        run(
            problem, *tile, input.data_ptr(), weight.data_ptr(), address(bias), output.data_ptr(),
            workspace.data_ptr(), *cuda_stream.current(input.device),
        )  # fmt: skip
        return output

    return kernel


def conv2d_grad_input(
    query: Conv2dQuery, problem: Any, copy_grad: Copy, name: str
) -> Callable[[Tensor, Tensor], Tensor]:
    assert native.cuda is not None
    run, tile = native.cuda.conv2d_grad_input_hopper_float32, TILES[name]
    bytes = native.cuda.conv2d_hopper_float32_workspace(problem, True)
    size, strides = query.geometry.input_size, query.strides[0]

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_input = torch.empty_strided(size, strides, dtype=weight.dtype, device=weight.device)
        grad_output = copy_grad(grad_output)
        workspace = torch.empty(bytes, dtype=torch.uint8, device=weight.device)
        run(
            problem, *tile, grad_output.data_ptr(), weight.data_ptr(), grad_input.data_ptr(),
            workspace.data_ptr(), *cuda_stream.current(weight.device),
        )  # fmt: skip
        return grad_input

    return kernel


class HopperFloat32GradWeight(GradWeight):
    """A kernel for one query, in a block of `BLOCKS`; where TF32 is allowed, `tiled` runs."""

    draft: Any = None

    def __init__(
        self, query: Conv2dQuery, problem: Any, copies: Sequence[Copy], tiled: GradWeight,
        name: str,
    ) -> None:  # fmt: skip
        assert native.cuda is not None
        self._query, self._tiled, self._block = query, tiled, BLOCKS[name]
        multiprocessors = cuda_tiles.multiprocessors(query.device)
        parts = native.cuda.conv2d_grad_weight_hopper_float32_splits(
            problem, *self._block, multiprocessors
        )
        self._part_bytes = native.cuda.conv2d_grad_weight_hopper_float32_parts(problem)
        super().__init__(query, problem, copies, tiled.way, parts)

    def __call__(
        self, grad_output: Tensor, input: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        if allows_tf32(self._query):
            return self._tiled(grad_output, input, bias)
        begun, grad_bias = self.begin(grad_output, input, bias)
        return begun.gradient(), grad_bias

    def begin(
        self, grad_output: Tensor, input: Tensor, bias: bool
    ) -> tuple[BegunGradWeight, Tensor | None]:
        assert native.cuda is not None
        if allows_tf32(self._query):
            return self._tiled.begin(grad_output, input, bias)
        # The bias's gradient is torch's: one more pass over grad_output.
        grad_bias = grad_output.sum((0, 2, 3)) if bias else None
        dtype, device = input.dtype, input.device
        grad_output, input = self.copy_grad(grad_output), self.copy_input(input)
        parts = torch.empty(self._part_bytes, dtype=torch.uint8, device=device)
        workspace = torch.empty(self._bytes[False], dtype=torch.uint8, device=device)
        native.cuda.conv2d_grad_weight_hopper_float32(
            self.problem, *self._block, grad_output.data_ptr(), input.data_ptr(),
            parts.data_ptr(), workspace.data_ptr(), self.parts, *cuda_stream.current(device),
        )  # fmt: skip
        return Parts(self, workspace, dtype), grad_bias
