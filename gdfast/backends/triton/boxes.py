"""The boxes of pixels that programs of the TMA kernel make, and a few tiles of them.

A box is so many images x rows x columns, each a power of 2. What of it lies past the last row,
column or image is computed and not stored: of boxes of 8 x 16 on images of 14 x 14 that is nearly a
quarter, and of smaller squares of more images less.
"""

from __future__ import annotations

from itertools import product as pairs
from math import ceil, prod
from typing import NamedTuple

from gdfast.backends.triton import tiles
from gdfast.backends.triton.launch import Gpu
from gdfast.backends.triton.tiles import Product, Tile

# Pixels, filters, warps, stages. A matrix instruction makes 64 filters for four warps.
_SHAPES = (
    (256, 128, 8, 4), (128, 256, 8, 4), (128, 128, 8, 3), (128, 128, 4, 3), (256, 64, 4, 4),
    (128, 64, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4),
)  # fmt: skip
_LEAST_FILTERS = 64
_MOST_CANDIDATES = 2
# The cost of a pixel that a box reads, in pixels that it makes. Each tap reads from L2, whatever
# the box; this is for what neighbouring boxes read from memory twice, where L2 does not hold it.
_READ = 1 / 16


class Images(NamedTuple):
    """Images to be covered with boxes, and by how many pixels the taps reach past one."""

    images: int
    rows: int
    columns: int
    reach_rows: int
    reach_columns: int

    def counts(self, box: tuple[int, ...]) -> tuple[int, ...]:
        """How many boxes cover all, along images, rows and columns."""
        return tuple(ceil(size / side) for size, side in zip(self[:3], box, strict=True))

    def count(self, box: tuple[int, ...]) -> int:
        """How many boxes cover all."""
        return prod(self.counts(box))

    def cost(self, box: tuple[int, ...]) -> float:
        """Pixels that are computed, those past the borders too, and a little for those read."""
        images, rows, columns = box
        read = images * (rows + self.reach_rows) * (columns + self.reach_columns)
        return self.count(box) * (prod(box) + _READ * read)

    def box(self, pixels: int) -> tuple[int, ...]:
        """The cheapest box of so many pixels, a power of 2; of equals, that with fewest images."""
        sides = [1 << i for i in range(pixels.bit_length())]
        boxes = [(pixels // (p * q), p, q) for p, q in pairs(sides, sides) if p * q <= pixels]
        return min(boxes, key=lambda box: (self.cost(box), box[0]))


def candidates(
    images: Images, filters: int, taps: int, depth: int, itemsize: int, gpu: Gpu
) -> list[Tile]:
    """A few tiles that fit the GPU, the one expected to be fastest first.

    `taps` and `depth` are what one sum runs through; `filters` counts the sums of a pixel.
    """
    step = tiles.step_of(depth, itemsize)
    steps = max(2, taps * ceil(depth / step))
    expected: list[tuple[float, Tile]] = []
    for pixels, n, warps, stages in _SHAPES:
        stages = min(stages, steps, gpu.shared_bytes // ((pixels + n) * step * itemsize))
        box = images.box(pixels)
        made = images.count(box) * pixels
        if stages >= 2 and pixels < 2 * max(made, 1) and n < 2 * max(filters, _LEAST_FILTERS):
            # To the kernel, filters are rows and pixels are columns.
            product = Product(1, filters, made, taps, depth)
            clocks = tiles.clocks(product, Tile(n, pixels, step, warps, stages), itemsize, gpu)
            expected.append((clocks, Tile(pixels, n, step, warps, stages, box)))
    return [tile for _, tile in sorted(expected)[:_MOST_CANDIDATES]]
