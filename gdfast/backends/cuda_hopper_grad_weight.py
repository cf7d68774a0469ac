"""The gradient in the weight by Hopper's tensor cores (TMA and wgmma), in half types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_stream, cuda_tiles, plans
from gdfast.backends.cuda_grad_weight import BegunGradWeight, GradWeight, Parts
from gdfast.backends.cuda_operands import Copy, may_plan
from gdfast.backends.registry import Conv2dQuery

# Filters x columns that a block makes; 64 columns are so many channels of a tap.
BLOCKS = {
    "hopper-64x576": (64, 576), "hopper-128x192": (128, 192), "hopper-128x128": (128, 128),
    "hopper-128x256": (128, 256), "hopper-256x128": (256, 128),
}  # fmt: skip
# Those that read images in NCHW, for 1x1 convolutions.
PLANES_BLOCKS = {
    name.replace("hopper", "hopper-planes"): block
    for name, block in BLOCKS.items()
    if block != (64, 576)
}
_BOX = 64  # filters or channels


def candidates(query: Conv2dQuery) -> tuple[str, ...]:
    """The blocks that are worth timing, the one expected to be fastest first."""
    g = query.geometry
    filters, columns = ceil(g.K / _BOX) * _BOX, ceil(g.C / _BOX) * _BOX * g.R * g.S
    worth = []
    for name, (height, width) in BLOCKS.items():
        # At least half of a block has something to do; one wide in 3 of 64 does without a rest.
        fits = height <= 2 * filters and width <= 2 * columns
        if width % 3 == 0:
            fits = fits and columns % width == 0
        if name == "hopper-64x576":
            fits = fits and filters == height
        if name == "hopper-128x128":
            fits = fits and min(filters, columns) <= width
        if fits:
            worth.append(name)
    return tuple(worth)


def planes_candidates(query: Conv2dQuery) -> tuple[str, ...]:
    """Likewise of the blocks that read images in NCHW."""
    blocks = {BLOCKS[name] for name in candidates(query)}
    return tuple(name for name, block in PLANES_BLOCKS.items() if block in blocks)


class HopperGradWeight(GradWeight):
    """A kernel for one query, in a block of `BLOCKS` or `PLANES_BLOCKS`."""

    def __init__(
        self, query: Conv2dQuery, problem: Any, copies: Sequence[Copy], way: Callable[[], Any],
        name: str,
    ) -> None:  # fmt: skip
        assert native.cuda is not None
        self._block = BLOCKS.get(name) or PLANES_BLOCKS[name]
        multiprocessors = cuda_tiles.multiprocessors(query.device)
        parts = native.cuda.conv2d_grad_weight_hopper_splits(problem, *self._block, multiprocessors)
        super().__init__(query, problem, copies, way, parts)

    def __call__(
        self, grad_output: Tensor, input: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        begun, grad_bias = self.begin(grad_output, input, bias)
        return begun.gradient(), grad_bias

    def draft(
        self, plan: plans.Draft, grad_output: int, input: int, bias: bool, wide: bool = False
    ) -> tuple[int, int] | None:
        assert native.cuda is not None
        if bias or not may_plan(plan, (self.copy_grad, self.copy_input), (grad_output, input)):
            return None
        grad_weight, none = self._draft_results(plan, False, wide)
        workspace = plan.scratch(self._bytes[False])
        parts = native.cuda.conv2d_grad_weight_hopper_launch(self.problem, *self._block, self.parts)
        plan.launch(parts, grad_output, input, workspace)
        sum_up = native.cuda.conv2d_grad_weight_launch(self.problem, self.way(), self.parts, wide)
        plan.launch(sum_up, none, none, grad_weight, none, workspace)
        return grad_weight, none

    def begin(
        self, grad_output: Tensor, input: Tensor, bias: bool
    ) -> tuple[BegunGradWeight, Tensor | None]:
        assert native.cuda is not None
        # The bias's gradient is torch's: one more pass over grad_output, summed in float32.
        grad_bias = grad_output.sum((0, 2, 3)) if bias else None
        dtype, device = input.dtype, input.device
        grad_output, input = self.copy_grad(grad_output), self.copy_input(input)
        workspace = torch.empty(self._bytes[False], dtype=torch.uint8, device=device)
        native.cuda.conv2d_grad_weight_hopper(
            self.problem, *self._block, grad_output.data_ptr(), input.data_ptr(),
            workspace.data_ptr(), self.parts, *cuda_stream.current(device),
        )  # fmt: skip
        return Parts(self, workspace, dtype), grad_bias
