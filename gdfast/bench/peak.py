"""What this machine can do at best, measured: the yardstick for every other figure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

_GEMM_SIZES = (256, 512, 1024, 2048)  # in this order: some dtypes are slow beyond all use
# Channels, pixels, kernel. Native's convolutions beat its matrix product on some processors.
_CONVOLUTIONS = ((256, 28, 1), (128, 28, 3), (256, 14, 3))
_MEMORY_BYTES = 256 << 20  # beyond the caches of common machines


@dataclass(frozen=True)
class Peak:
    """Operations per second of the best arithmetic, bytes per second of the best stream."""

    flops: float
    bandwidth: float

    def better(self, other: Peak) -> Peak:
        """The better of two measurements in each respect: a busy machine only ever shows less."""
        return Peak(max(self.flops, other.flops), max(self.bandwidth, other.bandwidth))

    def floor(self, flops: int, bytes: int) -> float:
        """Seconds that so much arithmetic and traffic takes at least, at these peaks."""
        return max(flops / self.flops, bytes / self.bandwidth)

    def bound(self, flops: int, bytes: int) -> str:
        """Which of the two peaks sets the floor: "compute" or "memory"."""
        return "compute" if flops / self.flops >= bytes / self.bandwidth else "memory"


def measure(dtype: torch.dtype = torch.float32, seconds: float = 0.25) -> Peak:
    """Measure both peaks with torch's current number of threads.

    About `seconds` are spent on each of ten probes; the best call of each counts. Arithmetic is
    that of native's matrix products and convolutions. Bandwidth counts bytes read and bytes
    written, of a copy, a negation in place and an addition in place (the last two write only lines
    that they have read, as an optimizer does).
    """
    flops = 0.0
    for n in _GEMM_SIZES:
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        product = partial(torch.mm, a, b, out=torch.empty(n, n, dtype=dtype))
        taken = _best(product, seconds)
        flops = max(flops, 2 * n**3 / taken)
        if 8 * taken > seconds:
            break
    for channels, size, kernel in _CONVOLUTIONS:
        input = torch.randn(8, channels, size, size).to(dtype)
        weight = torch.randn(channels, channels, kernel, kernel).to(dtype)
        convolution = partial(
            F.conv2d,
            input.to(memory_format=torch.channels_last),
            weight.to(memory_format=torch.channels_last),
            padding=kernel // 2,
        )
        work = 2 * 8 * size**2 * channels**2 * kernel**2
        flops = max(flops, work / _best(convolution, seconds))

    x = torch.randn(_MEMORY_BYTES // 4)
    y = torch.randn(_MEMORY_BYTES // 4)
    bandwidth = max(
        2 * _MEMORY_BYTES / _best(lambda: y.copy_(x), seconds),
        2 * _MEMORY_BYTES / _best(lambda: x.neg_(), seconds),
        3 * _MEMORY_BYTES / _best(lambda: y.add_(x, alpha=1e-6), seconds),
    )
    return Peak(flops, bandwidth)


def _best(call: Callable[[], Any], seconds: float) -> float:
    """Shortest time of one call, in seconds, trying for so long and at least once."""
    end = time.perf_counter() + seconds
    call()
    best = float("inf")
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
