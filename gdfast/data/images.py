"""Labelled images held in memory, and data sets split for training and testing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gdfast.data.loader import Batch


class Labelled(Protocol):
    """Images with a label each: `labels` [N] as int64."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """Image `index` as bytes [H, W, C]."""

    def digest(self) -> bytes:
        """SHA-256 over the images, or the names and sizes of their files, and the labels."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: `images` [N, C, H, W] as bytes 0 to 255, `labels` [N] as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        """Image `index` as bytes [H, W, C]."""
        return self.images[index].permute(1, 2, 0).numpy()

    def take(self, indices: Tensor) -> Batch:
        """The images of these indices [n] as float32 in 0 to 1, and their labels [n]."""
        images = self.images.index_select(0, indices).to(torch.float32).div_(255)
        return Batch(images, self.labels.index_select(0, indices))

    def digest(self) -> bytes:
        """SHA-256 over all images and labels."""
        digest = hashlib.sha256()
        for tensor in (self.images, self.labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.digest()


@dataclass(frozen=True)
class ImageData:
    """A data set split for training and testing.

    `epochs` is how many passes a short training on it usually needs.
    """

    name: str
    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    epochs: int

    def fingerprint(self) -> str:
        """SHA-256 over both parts; two runs with different ones saw different data."""
        return hashlib.sha256(self.train.digest() + self.test.digest()).hexdigest()
