"""Convolution by Hopper's tensor cores whose taps share boxes: the tiles to choose from."""

from __future__ import annotations

from typing import Any

from gdfast import native

HALO = {"hopper-halo-64": 64, "hopper-halo-128": 128}  # channels of a tile
FEW = 128  # channels that are made: with more, other tiles are expected to be faster


def why_not(op: str, problem: Any, name: str) -> str:
    """Why the kernel does not run one pass, or ""."""
    assert native.cuda is not None
    gradient = op == "conv2d_grad_input"
    return str(native.cuda.conv2d_halo_why_not(problem, HALO[name], gradient))


def candidates(channels: int) -> tuple[str, ...]:
    """The tiles that are worth timing where so many channels are made."""
    wide = HALO["hopper-halo-128"]
    rest = channels % wide
    # Wide ones multiply fewer pixels in the padding, unless half of the last has no channels.
    return tuple(
        name for name, tile in HALO.items() if (tile == wide) == (rest > wide // 2 or rest == 0)
    )
