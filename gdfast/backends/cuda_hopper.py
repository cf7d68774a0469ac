"""Convolution and its gradient in the input by Hopper's tensor cores: the tiles to choose from."""

from __future__ import annotations

from functools import lru_cache

import torch

from gdfast import native

# By TMA and wgmma, on GPUs of compute capability 9.0: pixels and channels of a tile, 0 for a guess.
HOPPER = {
    "hopper": (0, 0), "hopper-64": (128, 64), "hopper-128": (128, 128), "hopper-256": (128, 256),
    "hopper-128-tall": (256, 128),
}  # fmt: skip
CHUNK = 8  # channels in a half type that make up 16 bytes
_NARROWEST = 64


def candidates(channels: int) -> tuple[str, ...]:
    """The tiles that are worth timing where so many channels are made, the best guess first."""
    tiles = {
        name: size for name, size in HOPPER.items() if 0 < size[1] < 2 * max(channels, _NARROWEST)
    }
    # Of those that many channels fill, 128 leave a multiprocessor most to do side by side.
    return tuple(
        sorted(tiles, key=lambda name: (tiles[name][1] > channels, tiles[name] != (128, 128)))
    )


@lru_cache(maxsize=64)
def missing(device: torch.device) -> str:
    """Why the kernels do not run on a device, or ""."""
    assert native.cuda is not None
    return str(native.cuda.hopper_missing(device.index or 0))
