"""Convolutions of stride 1 by the TMA kernel: which it takes, and how it is launched for them.

Its descriptors take sizes and strides, so that no offset is too large for it. Their strides and the
addresses of tensors are multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdfast.backends.triton import boxes
from gdfast.backends.triton.conv2d_tma import conv2d_tma_kernel
from gdfast.backends.triton.launch import Box, Gpu, Launch
from gdfast.backends.triton.tiles import Tile

if TYPE_CHECKING:
    from gdfast.backends.triton.bind_conv2d import Problem

FORWARD, GRAD_INPUT = "conv2d", "conv2d_grad_input"
_LEAST_DEPTH = 16  # channels of a step
_ALIGNED = 16  # bytes
# The names that a pass copies to channels_last if need be, in the order of its arguments.
_COPIED = {FORWARD: ("input", "weight"), GRAD_INPUT: ("weight", "output")}


def candidates(problem: Problem, op: str, gpu: Gpu) -> list[Tile]:
    """A few tiles for one pass, none where the kernel does not take it."""
    if not gpu.tma or not takes(problem, op):
        return []
    g = problem.geometry
    depth, filters = (g.C, g.K) if op == FORWARD else (g.K, g.C)
    images, itemsize = _images(problem, op), problem.dtype.itemsize
    return boxes.candidates(images, filters, g.R * g.S, depth, itemsize, gpu)


def takes(problem: Problem, op: str) -> bool:
    """Whether the kernel runs one pass."""
    g = problem.geometry
    if op not in _COPIED or g.groups > 1 or problem.windows.stride != (1, 1) or g.N == 0:
        return False
    # In TF32, matrix instructions read only what lies along the products.
    if problem.dtype == torch.float32 and (problem.precision != "tf32" or op != FORWARD):
        return False
    problem, _ = problem.packed(*_COPIED[op])
    if (g.C if op == FORWARD else g.K) < _LEAST_DEPTH:
        return False
    aligned = _ALIGNED // problem.dtype.itemsize
    return all(
        box.strides[-1] == 1
        and all(n > 0 and n % aligned == 0 for n in (box.size[-1], *box.strides[:-1]))
        for box in _boxes(problem, op, Tile(0, 0, 0, 0, 0, (0, 0, 0)))
    )


def bind_forward(
    problem: Problem, tile: Tile, activation: str, negative_slope: float
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """act(conv2d(input, weight, bias)), as `bind_conv2d.bind_forward`."""
    size, strides = problem.geometry.output_size, problem.strides[2]
    problem, (copy_input, copy_weight) = problem.packed(*_COPIED[FORWARD])
    launches = {
        with_bias: _launch(problem, tile, FORWARD, with_bias, activation, negative_slope)
        for with_bias in (False, True)
    }

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        input, weight = _aligned(copy_input(input)), _aligned(copy_weight(weight))
        # The kernel reads no bias where there is none: any tensor takes its place.
        some = weight if bias is None else bias.contiguous()
        launches[bias is not None](input, weight, output, some)
        return output

    return kernel


def bind_grad_input(problem: Problem, tile: Tile) -> Callable[[Tensor, Tensor], Tensor]:
    """The gradient in the input, as `bind_conv2d.bind_grad_input`."""
    size, strides = problem.geometry.input_size, problem.strides[0]
    problem, (copy_weight, copy_grad) = problem.packed(*_COPIED[GRAD_INPUT])
    launch = _launch(problem, tile, GRAD_INPUT, False, "none", 0.0)

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_input = torch.empty_strided(size, strides, dtype=weight.dtype, device=weight.device)
        grad_output, weight = _aligned(copy_grad(grad_output)), _aligned(copy_weight(weight))
        launch(grad_output, weight, grad_input, weight)
        return grad_input

    return kernel


def _launch(
    problem: Problem, tile: Tile, op: str, with_bias: bool, activation: str, slope: float
) -> Launch:
    g, windows = problem.geometry, problem.windows
    C, K = (g.C, g.K) if op == FORWARD else (g.K, g.C)
    sign = 1 if op == FORWARD else -1
    starts = [-sign * padding for padding in g.padding[:2]]
    steps = [sign * dilation for dilation in windows.dilation]
    images = _images(problem, op)
    counts = images.counts(tile.box)
    block_i, block_p, block_q = tile.box
    settings = {
        "SWAPPED": op == GRAD_INPUT, "BIAS": with_bias, "ACTIVATION": activation,
        "PRECISION": problem.precision, "UPCAST": problem.upcast, "BLOCK_I": block_i,
        "BLOCK_P": block_p, "BLOCK_Q": block_q, **tile.settings(),
    }  # fmt: skip
    del settings["BLOCK_M"]  # the three before
    return Launch(
        conv2d_tma_kernel, (images.count(tile.box) * ceil(K / tile.n),), problem.device,
        (C, K, g.R, g.S, *counts, *starts, *steps, slope), settings, tile.warps, tile.stages,
        _boxes(problem, op, tile),
    )  # fmt: skip


def _images(problem: Problem, op: str) -> boxes.Images:
    g, dilation = problem.geometry, problem.windows.dilation
    rows, columns = (g.P, g.Q) if op == FORWARD else (g.H, g.W)
    return boxes.Images(g.N, rows, columns, (g.R - 1) * dilation[0], (g.S - 1) * dilation[1])


def _boxes(problem: Problem, op: str, tile: Tile) -> list[Box]:
    """How the kernel sees what it reads, the weight, and what it makes."""
    g, (x, w, y) = problem.geometry, problem.strides
    box, n, k = tile.box, tile.n, tile.k
    if op == FORWARD:
        return [
            _box(g.input_size, x, (0, 2, 3, 1), (*box, k)),
            _box(g.weight_size, w, (2, 3, 0, 1), (1, 1, n, k)),
            _box(g.output_size, y, (0, 2, 3, 1), (*box, n)),
        ]
    return [
        _box(g.output_size, y, (0, 2, 3, 1), (*box, k)),
        _box(g.weight_size, w, (2, 3, 0, 1), (1, 1, k, n)),
        _box(g.input_size, x, (0, 2, 3, 1), (*box, n)),
    ]


def _box(
    size: tuple[int, ...], strides: tuple[int, ...], order: tuple[int, ...], block: tuple[int, ...]
) -> Box:
    *outer, last = order
    # A step over nothing may be any number; descriptors take few.
    steps = [strides[i] if size[i] > 1 else size[last] for i in outer]
    return Box([size[i] for i in order], [*steps, strides[last]], list(block))


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it does not begin at 16 bytes."""
    if tensor.data_ptr() % _ALIGNED == 0:
        return tensor
    copied = torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copied.copy_(tensor)
