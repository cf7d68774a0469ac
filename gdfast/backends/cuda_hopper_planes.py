"""1x1 convolution in NCHW by Hopper's tensor cores, without copies: the tiles to choose from."""

from __future__ import annotations

from typing import Any

from gdfast import native

# Channels and pixels of a tile.
PLANES = {
    "hopper-planes-64": (64, 256), "hopper-planes-128": (128, 128), "hopper-planes-256": (256, 128),
}  # fmt: skip
_NARROWEST = 64


def why_not(op: str, problem: Any) -> str:
    """Why the kernel does not run one pass, or ""."""
    assert native.cuda is not None
    if op == "conv2d_grad_weight":
        return str(native.cuda.conv2d_grad_weight_planes_why_not(problem))
    return str(native.cuda.conv2d_planes_why_not(problem, op == "conv2d_grad_input"))


def candidates(channels: int) -> tuple[str, ...]:
    """The tiles that are worth timing where so many channels are made."""
    most = max(channels, _NARROWEST)
    return tuple(name for name, tile in PLANES.items() if tile[0] < 2 * most)
