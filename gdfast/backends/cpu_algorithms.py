"""The CPU's algorithms for convolutions: where each applies, and a cost model to choose by.

The cost model knows the geometry alone; `tuning` times those that apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

import torch

from gdfast import native
from gdfast.backends.registry import Conv2dQuery
from gdfast.geometry import Conv2dGeometry

DIRECT, WINOGRAD, STRASSEN, BF16 = "direct", "winograd", "strassen", "bf16"


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
    g = query.geometry
    if not _fits_winograd(g):
        return False
    if query.dtype == torch.float32:
        return True
    # Others are widened as they lie in memory. With a stride of 2 copies cost what it saves.
    sizes = g.input_size, g.weight_size, g.output_size
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and g.stride == (1, 1)
        and all(map(_is_dense, sizes, query.strides))
    )


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements fill the memory from the first to the last, in any order of the axes."""
    return prod(size) == 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _fits_winograd(g: Conv2dGeometry) -> bool:
    dense = (g.R, g.S) == (3, 3) and g.stride in ((1, 1), (2, 2)) and g.dilation == (1, 1)
    return dense and max(g.padding) <= 2 and min(g.C, g.K) // g.groups >= 8 and g.N > 0


def _strassen_applies(op: str, query: Conv2dQuery) -> bool:
    g = query.geometry
    product = (g.R, g.S, g.groups) == (1, 1, 1) and not any(g.padding)
    channels_last = query.strides[0][1] == query.strides[2][1] == 1
    # With fewer pixels the sums of weights take longer than what they save.
    large = g.C % 128 == 0 and g.K % 128 == 0 and g.N * g.P * g.Q >= 1024
    implemented = op != "conv2d_grad_weight" and query.dtype == torch.float32
    return implemented and product and channels_last and large


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
    # Measured up to 6.1e-7 likewise.
    STRASSEN: Algorithm(_strassen_applies, stated_error=1e-6, strict=False),
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


class _Costs(NamedTuple):
    """What Winograd costs in units of one vector multiply-add at the machine's peak."""

    product: float  # each of its vector multiply-adds
    call: float  # a vector of sums in a call of the micro-kernel, which has six rows of them
    tile: float  # a vector of channels of a tile, transformed: image, gradients or outputs
    weight: float  # a vector of weights, transformed
    planes: float  # what the direct kernels take longer where channels do not lie side by side


# By stride and operation, fitted to times of AVX2 kernels, and taken for the others too, which were
# not timed: see `benchmarks/cost_model.py`.
_COSTS = {
    (1, "conv2d"): _Costs(1.4, 12, 340, 390, 1.1),
    (1, "conv2d_grad_input"): _Costs(1.5, 56, 210, 340, 1.2),
    (1, "conv2d_grad_weight"): _Costs(1.4, 41, 320, 340, 1.0),
    (2, "conv2d"): _Costs(1.3, 65, 30, 490, 1.0),
    (2, "conv2d_grad_input"): _Costs(1.4, 10, 60, 100, 1.9),
    (2, "conv2d_grad_weight"): _Costs(1.1, 17, 240, 70, 1.0),
}
_DIRECT_PRODUCT = 1.14
# An element of a 16-bit type, widened or rounded; measured on AVX-512.
_WIDENED = 1.5
_BF16_DIRECT = 0.5  # of what float32's direct kernels take
# Sums of a tile; its outputs along an axis, and its products there beyond 5.
_SUMS = {(2, "conv2d"): 25, (2, "conv2d_grad_input"): 49, (2, "conv2d_grad_weight"): 25}
_TILE = {1: (4, 1), 2: (3, 2)}
# What Winograd must be better by before it is preferred: it costs accuracy, within a stated bound.
_MARGIN = 0.95


def predicted(op: str, query: Conv2dQuery, isa: str) -> str:
    """The fastest algorithm for one pass: op is "conv2d" or the name of one of its gradients.

    With an activation a forward pass costs what it does without.
    """
    if bf16_applies(op, query):
        direct, share = BF16, _BF16_DIRECT
    else:
        direct, share = DIRECT, 1.0
    if not _winograd_applies(op, query):
        return direct
    channels_last = query.strides[0][1] == 1
    widened = query.dtype != torch.float32
    chosen = choose(op, query.geometry, isa, channels_last, widened=widened, direct_share=share)
    return WINOGRAD if chosen == WINOGRAD else direct


def choose(
    op: str,
    geometry: Conv2dGeometry,
    isa: str,
    channels_last: bool = True,
    *,
    widened: bool = False,
    direct_share: float = 1.0,
) -> str:
    """WINOGRAD or DIRECT, whichever is faster.

    `channels_last` tells whether the channels of a pixel of the images lie side by side, `widened`
    whether Winograd's elements are of 16 bits; `direct_share` is what the direct way takes of
    the time that it takes in float32.
    """
    if not _fits_winograd(geometry):
        return DIRECT
    op = op if (1, op) in _COSTS else "conv2d"
    winograd_cost, direct_cost = _costs(op, geometry, _LANES[isa], channels_last)
    if widened:
        winograd_cost += _WIDENED * (prod(geometry.input_size) + prod(geometry.output_size))
    return WINOGRAD if winograd_cost < _MARGIN * direct_share * direct_cost else DIRECT


def _costs(op: str, g: Conv2dGeometry, lanes: int, channels_last: bool) -> tuple[float, float]:
    """Costs of Winograd and of the direct kernels for a pass that Winograd fits."""
    stride = g.stride[0]
    costs = _COSTS[stride, op]
    reduced, produced, height, width = g.C // g.groups, g.K // g.groups, g.P, g.Q
    if op == "conv2d_grad_input":
        reduced, produced = produced, reduced
        height, width = ceil(g.H / stride), ceil(g.W / stride)
    # Channels in vectors; the reduced ones are whole vectors too.
    inputs, outputs = ceil(reduced / lanes), ceil(produced / lanes)
    (rows, row_products), (columns, column_products) = (
        _tiles(pixels, *_TILE[stride]) for pixels in (height, width)
    )
    tiles = g.N * rows * columns
    products = g.N * row_products * column_products
    # The micro-kernel takes six rows at a time: tiles, or channels where tiles are reduced over.
    if op == "conv2d_grad_weight":
        calls = ceil(reduced / 6)
    else:
        calls = ceil(tiles / 6)
        products = ceil(products * 6 * calls / tiles)
    winograd = (
        costs.product * products * inputs * lanes * outputs
        + costs.call * _SUMS.get((stride, op), 36) * calls * outputs
        + costs.tile * tiles * (inputs + outputs)
        + costs.weight * reduced * outputs
    )
    pixels = g.N * (height * width if stride == 1 else g.P * g.Q)
    direct = _DIRECT_PRODUCT * 9 * pixels * reduced * outputs
    return winograd, direct if channels_last else costs.planes * direct


def _tiles(pixels: int, size: int, beyond: int) -> tuple[int, int]:
    """Tiles of `size` or one less along an axis, and their products: 5, the larger ones `beyond`
    that.
    """
    tiles = ceil(pixels / size)
    return tiles, 5 * tiles + beyond * max(0, pixels - (size - 1) * tiles)
