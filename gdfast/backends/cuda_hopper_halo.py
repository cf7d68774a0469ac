"""Convolution by Hopper's tensor cores whose taps share boxes: the tiles to choose from."""

from __future__ import annotations

from typing import Any

from gdfast import native

# Channels of a tile, and whether one box of pixels serves all taps, or one those of a column.
HALO = {
    "hopper-halo-64": (64, True), "hopper-halo-128": (128, True),
    "hopper-halo-rows-64": (64, False), "hopper-halo-rows-128": (128, False),
}  # fmt: skip
_WIDE = 128  # channels: with fewer, half of such a tile would be empty


def why_not(op: str, problem: Any, name: str) -> str:
    """Why the kernel does not run one pass, or ""."""
    assert native.cuda is not None
    gradient = op == "conv2d_grad_input"
    return str(native.cuda.conv2d_halo_why_not(problem, *HALO[name], gradient))


def candidates(channels: int) -> tuple[str, ...]:
    """The tiles that are worth timing where so many channels are made."""
    return tuple(name for name, tile in HALO.items() if tile[0] < _WIDE or channels >= _WIDE)
