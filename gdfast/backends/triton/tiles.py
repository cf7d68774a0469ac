"""The tiles that programs of the matrix kernels make, and a cost model to choose among them.

The model knows sizes alone. It leaves a few tiles worth timing; its best is what runs untimed.
"""

from __future__ import annotations

import re
from math import ceil
from typing import NamedTuple

from gdfast.backends.triton.launch import Gpu

_BAND = 8  # rows of tiles that share their columns of the right operand in L2


class Tile(NamedTuple):
    """A program makes m rows by n columns, k products at a time, with so many warps and stages.

    With a `box` (images, rows and columns of pixels, m in all) it is one of the TMA kernel.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    box: tuple[int, ...] = ()

    def __str__(self) -> str:
        box = "tma-" + "x".join(map(str, self.box)) + "-" if self.box else ""
        return f"{box}{self.m}x{self.n}x{self.k}-w{self.warps}-s{self.stages}"

    @classmethod
    def named(cls, name: str) -> Tile:
        """The tile that `str` gave this name."""
        *box, m, n, k, warps, stages = map(int, re.findall(r"\d+", name))
        return cls(m, n, k, warps, stages, tuple(box))

    def settings(self) -> dict[str, int]:
        """The compile-time constants of a kernel."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "BAND": _BAND}


class Product(NamedTuple):
    """A matrix product [rows, depth] x [depth, columns], `groups` times.

    depth consists of `runs` stretches (the taps), each padded to whole steps by itself; a `split`
    product may be summed in parts by several programs. Of a `folded` one numbers are loaded one by
    one: "rows" those of both operands, "columns" those of the right one.
    """

    groups: int
    rows: int
    columns: int
    runs: float
    depth: int
    split: bool = False
    folded: str = ""


# m, n, warps, stages. On Hopper a matrix instruction makes 64 rows for four warps.
_SHAPES = (
    (128, 128, 8, 3), (128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 4, 4), (128, 64, 4, 4),
    (128, 64, 8, 3), (64, 128, 4, 4), (64, 256, 4, 3), (256, 64, 8, 3), (64, 64, 4, 4),
    (128, 32, 4, 4), (64, 32, 4, 4), (128, 16, 4, 4), (32, 128, 4, 4), (32, 32, 4, 4),
    (16, 128, 4, 4), (16, 16, 4, 4),
)  # fmt: skip
_STEP_BYTES = 128  # of one row of a step: 64 products in half types, 32 in float32
_LEAST_K = 16
_LEAST_SIDE = 16
_LEAST_SUMS = 32
_MOST_WASTE = 1.15
# One by one, of a thread in a step, by bytes of a number: each takes registers for an address, a
# mask and itself.
_MOST_LOADS = {2: 32, 4: 24}
_MOST_CANDIDATES = 4

_WAVES = 2  # programs for each multiprocessor
_LEAST_STEPS = 8  # of one program
_MOST_SPLITS = 256
_TILE_CLOCKS = 1500  # to fill the pipeline and to empty it
_STEP_CLOCKS = 100  # that a step takes however small it is


def candidates(product: Product, itemsize: int, gpu: Gpu, passes: int = 1) -> list[Tile]:
    """A few tiles that fit the GPU, the one expected to be fastest first.

    `passes` counts the tensor core's passes for one product of float32 numbers.
    """
    step = step_of(product.depth, itemsize)
    fitting = []
    for m, n, warps, stages in _SHAPES:
        bytes_of_stage = (m + n) * step * itemsize
        # Short sums have no use for stages that they never fill.
        steps = max(2, ceil(product.runs * ceil(product.depth / step)))
        stages = min(stages, steps, gpu.shared_bytes // bytes_of_stage)
        loads = {"": 0, "rows": m + n, "columns": n}[product.folded] * step / (32 * warps)
        if (
            stages >= 2
            and m < 2 * max(product.rows, _LEAST_SIDE)
            and n < 2 * max(product.columns, _LEAST_SIDE)
            and loads <= _MOST_LOADS[itemsize]
            and m * n / (32 * warps) <= _most_sums(product, itemsize, passes, gpu)
        ):
            fitting.append(Tile(m, n, step, warps, stages))
    fitting.sort(key=lambda tile: clocks(product, tile, itemsize, gpu, passes))
    return fitting[:_MOST_CANDIDATES]


def _most_sums(product: Product, itemsize: int, passes: int, gpu: Gpu) -> int:
    """Sums of one thread that leave registers for its addresses and operands."""
    if product.folded or passes > 1:
        return _LEAST_SUMS
    return gpu.sums if itemsize == 2 else gpu.sums // 2


def step_of(depth: int, itemsize: int) -> int:
    """Products of one step: the most that leave little of a run's last step empty."""
    step = _STEP_BYTES // itemsize
    while step > _LEAST_K and ceil(depth / step) * step > _MOST_WASTE * depth:
        step //= 2
    return step


def clocks(product: Product, tile: Tile, itemsize: int, gpu: Gpu, passes: int = 1) -> float:
    """Clock cycles that a product takes by the model."""
    tiles = product.groups * ceil(product.rows / tile.m) * ceil(product.columns / tile.n)
    steps = product.runs * ceil(product.depth / tile.k)
    if product.split:
        parts = splits(product, tile, gpu)
        tiles, steps = tiles * parts, steps / parts
    # A program of one warp group keeps half of the tensor cores' throughput in small tiles.
    efficiency = min(1.0, tile.m / 64) * min(1.0, (tile.n + 32) / 160)
    slowdown = passes * itemsize / 2
    multiply = 2 * tile.m * tile.n * tile.k * slowdown / (gpu.flops_per_clock * efficiency)
    load = (tile.m + tile.n) * tile.k * itemsize / gpu.bytes_per_clock
    one = steps * max(multiply, load, _STEP_CLOCKS) + _TILE_CLOCKS
    return ceil(tiles / gpu.multiprocessors) * one


def splits(product: Product, tile: Tile, gpu: Gpu) -> int:
    """In how many parts the depth is summed: enough for every multiprocessor, none too short."""
    tiles = product.groups * ceil(product.rows / tile.m) * ceil(product.columns / tile.n)
    steps = ceil(product.depth / tile.k)
    return max(1, min(_WAVES * gpu.multiprocessors // tiles, steps // _LEAST_STEPS, _MOST_SPLITS))
