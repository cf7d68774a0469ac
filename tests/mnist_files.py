"""Small folders in MNIST's format for tests of data and training."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from gdfast import data

IMAGES, LABELS = 2051, 2049


def idx(magic: int, values: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """An idx file's bytes; `shape` writes dimensions that the values do not have."""
    shape = values.shape if shape is None else shape
    return struct.pack(f">I{len(shape)}I", magic, *shape) + values.astype(np.uint8).tobytes()


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, 28, 28] and labels [count]."""
    split = data.load("digits").train
    return split.images[:count, 0].numpy(), split.labels[:count].numpy()


def write_pair(
    folder: Path, split: str, images: np.ndarray, labels: np.ndarray, zipped: bool = False
) -> None:
    """Write the two files of a split, "train" or "t10k"."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (f"{split}-images-idx3-ubyte", idx(IMAGES, images)),
        (f"{split}-labels-idx1-ubyte", idx(LABELS, labels)),
    ):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)
