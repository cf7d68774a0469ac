"""Convolution of images with few channels on CUDA kernels of its own, in any layout.

There is no kernel for the gradient of the input, which a model's first layer is seldom asked for.

Why it is expected to be the fastest, counted for 7x7x3 with stride 2 in half types, 64 filters: a
position is multiplied with 7 x 24 numbers for the 147 that there are, in the padded form with 7 x 7
x 8. And its block reads 21 x 37 pixels of 6 bytes for 128 positions, 36 bytes for each; a tile of
the padded form reads 49 taps of 16 bytes for each, 784, most of them from L2, and before that the
input is copied, 22 bytes for each pixel. What it writes, 128 bytes for each position, is then what
bounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_stream, cuda_tiles, plans
from gdfast.backends.registry import Conv2dQuery
from gdfast.backends.sgd import address

NAME = "stem"
_MOST_CHANNELS = 4
# What a block may have on every GPU from compute capability 8.0 on; 8.6 has no more.
_SHARED_BYTES = 99 * 1024
_TILE = 8, 16  # positions of a block at a time
_FILTERS = 64
# A block that makes several tiles brings its filters to shared memory once, which takes about as
# many instructions as a tile. Six blocks are two or three rounds of those that fit one
# multiprocessor.
_MOST_TILES = 32
_BLOCKS = 6
_SPLITS = 2  # blocks of grad_weight for each, which its registers allow
_MOST_SPLITS = 512
_LEAST_TILES = 4  # of one split
_COLUMNS = 24 * 8  # of a filter's numbers, row by row, for a block of grad_weight


def fits(op: str, query: Conv2dQuery) -> bool:
    """Whether the kernels take a pass of a convolution."""
    g = query.geometry
    if op not in ("conv2d", "conv2d_act", "conv2d_grad_weight"):
        return False
    if g.C > _MOST_CHANNELS or g.groups != 1 or g.dilation != (1, 1):
        return False
    half = query.dtype.itemsize == 2
    if not half and (query.dtype != torch.float32 or cuda_tiles.precision_of(query) == "ieee"):
        return False
    if g.C * query.dtype.itemsize % 16 == 0:  # what tiles read whole
        return False
    if ceil(g.K / _FILTERS) > 65535 or _tiles(query) >= 2**31:  # blocks of a grid
        return False
    return shared_bytes(query) <= _SHARED_BYTES


def shared_bytes(query: Conv2dQuery) -> int:
    """Shared memory of a block, whichever pass takes more."""
    g, bytes = query.geometry, query.dtype.itemsize
    lanes = 16 // bytes
    rows, columns = (n - 1 for n in _TILE)
    row = ceil(((columns * g.stride[1] + g.S) * g.C + 8) * bytes / 4) * 4
    patch = ceil((rows * g.stride[0] + g.R) * row / 128) * 128 + 64
    # Sums of the tile, in the patch's place, then filters.
    results = _TILE[0] * _TILE[1] * (_FILTERS * 4 + 32)
    depth = 2 * ceil(g.R * ceil(g.S * g.C / lanes) / 2) + 1
    forward = max(results, patch * (2 if bytes == 2 else 1)) + 16 + _FILTERS * depth * 16
    return max(forward, _TILE[0] * _TILE[1] * _FILTERS * bytes + patch)


def _tiles(query: Conv2dQuery) -> int:
    g = query.geometry
    return g.N * ceil(g.P / _TILE[0]) * ceil(g.Q / _TILE[1])


def tiles_of_block(query: Conv2dQuery) -> int:
    """How many tiles a block of the forward pass makes, one after another."""
    blocks = ceil(query.geometry.K / _FILTERS) * _tiles(query)
    return max(1, min(_MOST_TILES, blocks // (_BLOCKS * cuda_tiles.multiprocessors(query.device))))


def splits(query: Conv2dQuery) -> int:
    """In how many parts grad_weight sums tiles: enough for every multiprocessor."""
    g = query.geometry
    columns = g.R * ceil(g.S * g.C / 8) * 8
    blocks = ceil(g.K / _FILTERS) * ceil(columns / _COLUMNS)
    wanted = _SPLITS * cuda_tiles.multiprocessors(query.device) // blocks
    return max(1, min(wanted, _tiles(query) // _LEAST_TILES, _MOST_SPLITS))


def conv2d_grad_weight(
    query: Conv2dQuery, problem: Any, way: Callable[[], Any]
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    """A kernel for the gradients in weight and bias; the problem has the query's strides."""
    assert native.cuda is not None
    run, parts = native.cuda.conv2d_stem_grad_weight, splits(query)
    size, strides = query.geometry.weight_size, query.strides[1]
    bytes_of = {
        bias: native.cuda.conv2d_stem_grad_weight_workspace(problem, parts, bias)
        for bias in (False, True)
    }

    def kernel(grad_output: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        grad_weight = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        grad_bias = input.new_empty(size[0]) if bias else None
        workspace = input.new_empty(bytes_of[bias], dtype=torch.uint8)
        run(
            problem, way(), grad_output.data_ptr(), input.data_ptr(), grad_weight.data_ptr(),
            address(grad_bias), workspace.data_ptr(), parts, *cuda_stream.current(input.device),
        )  # fmt: skip
        return grad_weight, grad_bias

    def draft(plan: plans.Draft, grad_output: int, input: int, bias: bool) -> tuple[int, int]:
        assert native.cuda is not None
        make = partial(torch.empty_strided, dtype=query.dtype, device=query.device)
        grad_weight = plan.fresh(partial(make, size, strides))
        grad_bias = plan.fresh(partial(make, size[:1], (1,))) if bias else plans.NONE
        launch = native.cuda.conv2d_stem_grad_weight_launch(problem, way(), parts)
        workspace = plan.scratch(bytes_of[bias])
        plan.launch(launch, grad_output, input, grad_weight, grad_bias, workspace)
        return grad_weight, grad_bias

    return plans.drafted(kernel, draft, on_gpu=True)
