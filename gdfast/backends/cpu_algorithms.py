"""The CPU's algorithms for convolutions: where each applies, and a cost model to choose by.

The cost model knows the geometry alone; `tuning` times those that apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch

from gdfast import native
from gdfast.backends.registry import Conv2dQuery
from gdfast.geometry import Conv2dGeometry

DIRECT, WINOGRAD, BF16 = "direct", "winograd", "bf16"


@dataclass(frozen=True)
class Algorithm:
    """`applies(op, query)` tells whether it would run one pass, or leave it to DIRECT.

    `stated_error` is the root mean square error over the root mean square result, against float64,
    that it may have beyond native's. Where `strict` is false, it does not multiply and add as the
    definition says.
    """

    applies: Callable[[str, Conv2dQuery], bool]
    stated_error: float = 0.0
    strict: bool = True


def _winograd_applies(op: str, query: Conv2dQuery) -> bool:
    return query.dtype == torch.float32 and _fits_winograd(query.geometry)


def _fits_winograd(g: Conv2dGeometry) -> bool:
    dense = (g.R, g.S) == (3, 3) and g.stride in ((1, 1), (2, 2)) and g.dilation == (1, 1)
    return dense and max(g.padding) <= 2 and min(g.C, g.K) // g.groups >= 8 and g.N > 0


def bf16_applies(op: str, query: Conv2dQuery) -> bool:
    """Whether one pass can multiply bfloat16 as it is, here and now."""
    g = query.geometry
    # Groups of few channels would leave most lanes empty.
    fits = g.N > 0 and (g.groups == 1 or min(g.C, g.K) // g.groups >= 16)
    return query.dtype == torch.bfloat16 and fits and not why_no_bf16()


def why_no_bf16() -> str:
    """Why no convolution multiplies bfloat16 as it is, but widens it to float32 first, or ""."""
    if native.cpu is None:
        return native.failure("cpu")
    if native.cpu.isa() in ("avx512_bf16", "emulated_bf16"):
        return ""
    if "avx512_bf16" in native.cpu.supported_isas():
        return f"the kernels in force are those for {native.cpu.isa()}"
    return "the processor, or the compiler of the kernels, has no AVX512_BF16"


# All that there are, in order of preference where they are equally fast.
ALGORITHMS = {
    DIRECT: Algorithm(lambda op, query: True),
    # Measured up to 1.1e-6 for sums that do not cancel, 6e-7 with stride 2: docs/cpu.md.
    WINOGRAD: Algorithm(_winograd_applies, stated_error=1.5e-6, strict=False),
    # The instruction takes subnormal numbers for 0.
    BF16: Algorithm(bf16_applies, strict=False),
}
# Of Winograd's way through a stride of 2, whose points are fewer and smaller.
STRIDE2_STATED_ERROR = 6e-7
STATED_ERROR = {name: algorithm.stated_error for name, algorithm in ALGORITHMS.items()}


def candidates(op: str, query: Conv2dQuery, strict: bool) -> tuple[str, ...]:
    """The algorithms that may run one pass; with `strict` only those that are."""
    return tuple(
        name
        for name, algorithm in ALGORITHMS.items()
        if algorithm.applies(op, query) and (algorithm.strict or not strict)
    )


# Elements of float32 in a vector.
_LANES = {"baseline": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16, "emulated_bf16": 4}

# Costs in units of one vector multiply-add, fitted to measured times on AVX-512 and AVX2.
_DIRECT_EFFICIENCY = 0.88
_PRODUCT_EFFICIENCY = 0.72
_IMAGE_TILE = 260.0  # 6x6 vectors read, transformed and written
_OUTPUT_TILE = 200.0  # 6x6 vectors read, transformed to 4x4 and written
_WEIGHT = 130.0  # 3x3 vectors read, transformed to 6x6 and written
_CALL = 150.0  # one call of the micro-kernel: 6 x 4 vectors of sums read and written
# What Winograd must be better by before it is preferred: it costs accuracy.
_MARGIN = 0.85


def choose(op: str, geometry: Conv2dGeometry, isa: str) -> str:
    """The faster algorithm for one pass: op is "conv2d" or the name of one of its gradients."""
    g = geometry
    if not _fits_winograd(g):
        return DIRECT
    if g.stride == (2, 2):
        return WINOGRAD if _stride2_cost(op, g, _LANES[isa]) < 1 else DIRECT
    reduced, produced = g.C // g.groups, g.K // g.groups
    lanes = _LANES[isa]
    if op == "conv2d_grad_input":
        reduced, produced, height, width = produced, reduced, g.H, g.W
    else:
        height, width = g.P, g.Q
    # Channels in vectors; the reduced ones are whole vectors too.
    inputs, outputs = ceil(reduced / lanes), ceil(produced / lanes)
    tiles = g.N * ceil(height / 4) * ceil(width / 4)
    direct = g.N * height * width * 9 * reduced * outputs / _DIRECT_EFFICIENCY
    # The micro-kernel takes six rows at a time: tiles, or channels where tiles are reduced over.
    if op == "conv2d_grad_weight":
        products, calls = tiles * inputs * lanes, ceil(reduced / 6)
    else:
        calls = ceil(tiles / 6)
        products = 6 * calls * inputs * lanes
    winograd = (
        36 * products * _needed(height) * _needed(width) * outputs / _PRODUCT_EFFICIENCY
        + 36 * calls * ceil(outputs / 4) * _CALL
        + tiles * (inputs * _IMAGE_TILE + outputs * _OUTPUT_TILE)
        + reduced * outputs * _WEIGHT
    )
    return WINOGRAD if winograd < _MARGIN * direct else DIRECT


def _needed(pixels: int) -> float:
    """Share of the products along one axis that its tiles need: 6 with 4 outputs, else 5."""
    tiles = ceil(pixels / 4)
    whole = max(0, pixels - 3 * tiles)
    return (6 * whole + 5 * (tiles - whole)) / (6 * tiles)


# The same for stride 2, fitted on AVX2. By operation: how well the direct kernels do, the sums of a
# tile of 3x3 outputs, and what a tile costs for each vector of channels reduced and produced.
_STRIDE2 = {
    "conv2d": (0.88, 25, 200.0, 100.0),
    "conv2d_grad_input": (0.88, 49, 150.0, 170.0),
    "conv2d_grad_weight": (0.55, 25, 350.0, 150.0),
}
_STRIDE2_PRODUCT_EFFICIENCY = 0.77
_STRIDE2_CALL = 30.0  # for each vector of channels produced
_STRIDE2_WEIGHT = 60.0
_STRIDE2_MARGIN = 0.95  # it is about as exact as the direct kernels


def _stride2_cost(op: str, g: Conv2dGeometry, lanes: int) -> float:
    """Winograd's cost for 3x3 kernels with stride 2; below 1 where it is to be preferred."""
    # With an activation it costs what the convolution by itself does.
    efficiency, sums, image_tile, output_tile = _STRIDE2.get(op, _STRIDE2["conv2d"])
    reduced, produced = g.C // g.groups, g.K // g.groups
    if op == "conv2d_grad_input":
        reduced, produced = produced, reduced
        height, width = ceil(g.H / 2), ceil(g.W / 2)
    else:
        height, width = g.P, g.Q
    inputs, outputs = ceil(reduced / lanes), ceil(produced / lanes)
    tiles = g.N * ceil(height / 3) * ceil(width / 3)
    direct = g.N * g.P * g.Q * 9 * reduced * outputs / efficiency
    calls = ceil(tiles / 6)
    products = tiles if op == "conv2d_grad_weight" else 6 * calls
    needed = _stride2_products(height) * _stride2_products(width) / tiles * g.N
    winograd = (
        needed * products * inputs * lanes * outputs / _STRIDE2_PRODUCT_EFFICIENCY
        + sums * calls * outputs * _STRIDE2_CALL
        + tiles * (inputs * image_tile + outputs * output_tile)
        + reduced * outputs * _STRIDE2_WEIGHT
    )
    return winograd / (_STRIDE2_MARGIN * direct)


def _stride2_products(pixels: int) -> int:
    """Products along one axis of outputs: 7 for a tile of 3, 5 for one of 2."""
    tiles = ceil(pixels / 3)
    return 5 * tiles + 2 * max(0, pixels - 2 * tiles)
