"""Which of the CPU's algorithms runs a convolution: a cost model, from the geometry alone."""

from __future__ import annotations

from math import ceil

from gdfast.geometry import Conv2dGeometry

DIRECT, WINOGRAD = "direct", "winograd"

# Root mean square error over root mean square result, against float64, that an algorithm may have
# beyond native's. Winograd's is at most 9e-7 at 512 channels.
STATED_ERROR = {DIRECT: 0.0, WINOGRAD: 1.5e-6}

# Elements of float32 in a vector.
_LANES = {"baseline": 4, "avx2": 8, "avx512": 16}

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
    dense = (g.R, g.S) == (3, 3) and g.stride == (1, 1) and g.dilation == (1, 1)
    reduced, produced = g.C // g.groups, g.K // g.groups
    if not dense or max(g.padding) > 2 or reduced < 8 or produced < 8 or g.N == 0:
        return DIRECT
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
        36 * products * outputs / _PRODUCT_EFFICIENCY
        + 36 * calls * ceil(outputs / 4) * _CALL
        + tiles * (inputs * _IMAGE_TILE + outputs * _OUTPUT_TILE)
        + reduced * outputs * _WEIGHT
    )
    return WINOGRAD if winograd < _MARGIN * direct else DIRECT
