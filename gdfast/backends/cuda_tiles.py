"""The tiles of the CUDA convolution kernels, and a cost model to choose among them.

The model knows sizes alone. It orders what is worth timing; its best is what runs untimed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil, prod

import torch

from gdfast.backends.precision import is_strict
from gdfast.backends.registry import Conv2dQuery
from gdfast.geometry import dense_strides
from gdfast.tensor_cores import input_precision
from gdfast.windows import Windows

# Rows x columns of the sums that one block makes.
TILES = {"128x128": (128, 128), "128x64": (128, 64), "64x64": (64, 64)}
SMALLEST, LARGEST = "64x64", "128x128"
PADDED = "-padded"  # after a tile's name: with zeros as further input channels
_MOST_PADDING = 3  # times the channels that there are
_EFFICIENCY = {"128x128": 1.0, "128x64": 0.85, "64x64": 0.7}  # of a multiprocessor, guessed
_STEP = 32  # products of one step in half types
_LEAST_STEPS = 8  # of one split
_MOST_SPLITS = 256
_WAVES = 2  # blocks for each multiprocessor
_MOST_POSITIONS = 2**29  # of one split


def candidates(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    """The ways of running one pass that are worth timing, the one expected to be fastest first."""
    g, lanes = query.geometry, _lanes(query)
    on_tensor_cores = query.dtype.itemsize == 2 or (
        query.dtype == torch.float32 and precision_of(query) != "ieee"
    )
    # The simulator's times tell nothing.
    if query.device.type != "cuda" or not on_tensor_cores:
        return (SMALLEST,)
    # What is read number by number has one tile.
    inputs_are_whole = g.C // g.groups % lanes == 0
    if op != "conv2d" and g.K // g.groups % lanes != 0:
        return (SMALLEST,)
    if inputs_are_whole:
        return _tiles(op, query)
    padded = padded_query(query)
    if op == "conv2d_grad_input" or g.groups > 1 or padded.geometry.C > _MOST_PADDING * g.C:
        return (SMALLEST,)
    return (*(tile + PADDED for tile in _tiles(op, padded)), SMALLEST)


def _tiles(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    columns = _product(op, query)[1]
    tiles = [name for name in TILES if TILES[name][1] < 2 * columns or name == SMALLEST]
    if query.dtype == torch.float32 and precision_of(query) == "tf32x3":
        tiles = [name for name in tiles if name != LARGEST]
    return tuple(sorted(tiles, key=lambda name: _time(op, query, name)))


def _time(op: str, query: Conv2dQuery, tile: str) -> float:
    """What a pass takes, in units that are the same for all tiles."""
    g = query.geometry
    copies = g.groups
    if op == "conv2d_grad_input":
        copies *= prod(Windows(g).phases)
    if op == "conv2d_grad_weight":
        copies *= splits(query, tile)
    waves = ceil(copies * blocks_of(op, query, tile) / multiprocessors(query.device))
    each = prod(TILES[tile]) / _EFFICIENCY[tile]
    return waves * each / (splits(query, tile) if op == "conv2d_grad_weight" else 1)


def machine(query: Conv2dQuery) -> str:
    """What times of the query hold for, beside the query itself."""
    name = torch.cuda.get_device_name(query.device) if query.device.type == "cuda" else "no GPU"
    return f"{name} {precision_of(query)}"


def _product(op: str, query: Conv2dQuery) -> tuple[int, int]:
    """Rows and columns of the product that a pass is, for each group and phase of the stride."""
    g = query.geometry
    C, K = g.C // g.groups, g.K // g.groups
    if op == "conv2d":
        return g.N * g.P * g.Q, K
    if op == "conv2d_grad_input":
        return g.N * Windows(g).pixels, C
    return K, C * g.R * g.S


def blocks_of(op: str, query: Conv2dQuery, tile: str) -> int:
    """Blocks of each group, phase and split."""
    sizes = zip(_product(op, query), TILES[tile], strict=True)
    return prod(ceil(size / block) for size, block in sizes)


def splits(query: Conv2dQuery, tile: str) -> int:
    """In how many parts grad_weight sums positions: enough for every multiprocessor."""
    g = query.geometry
    blocks = g.groups * blocks_of("conv2d_grad_weight", query, tile)
    positions = g.N * g.P * g.Q
    wanted = _WAVES * multiprocessors(query.device) // blocks
    most = min(positions // (_STEP * _LEAST_STEPS), _MOST_SPLITS)
    return max(1, min(wanted, most), ceil(positions / _MOST_POSITIONS))


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision_of(query: Conv2dQuery) -> str:
    return input_precision(query.dtype, is_strict())


def padded_query(query: Conv2dQuery) -> Conv2dQuery:
    """The query of tensors in channels_last with as many input channels as make up 16 bytes."""
    lanes = _lanes(query)
    geometry = replace(query.geometry, C=ceil(query.geometry.C / lanes) * lanes)
    sizes = geometry.input_size, geometry.weight_size
    input, weight = (dense_strides(size, True) for size in sizes)
    return replace(query, geometry=geometry, strides=(input, weight, query.strides[2]))


def _lanes(query: Conv2dQuery) -> int:
    """How many numbers are 16 bytes."""
    return 16 // query.dtype.itemsize
