"""Labelled images held in memory, and the shuffled batches that training draws from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: `images` [N, C, H, W] as bytes 0 to 255, `labels` [N] as int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A data set split for training and testing.

    `epochs` is how many passes a short training on it usually needs.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    epochs: int

    def fingerprint(self) -> str:
        """SHA-256 over all images and labels: two runs with the same one saw the same data."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            for tensor in (part.images, part.labels):
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


class Batch(NamedTuple):
    """`images` [n, C, H, W] as float32 in 0 to 1, their `labels` [n]."""

    images: Tensor
    labels: Tensor


class Batches:
    """Batches of an ImageSet, shuffled anew for every epoch.

    The images stay on `device` as bytes and become float32 batch by batch. The order of an epoch
    depends on `seed` and the epoch's number alone, so any batch of any epoch can be had again:
    that is how an interrupted run goes on exactly where it stopped. The last batch may be smaller.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`seed` None keeps the images in their order."""
        self._images = data.images.to(device)
        self._labels = data.labels.to(device)
        self.batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    @property
    def images(self) -> int:
        """How many images one epoch shows."""
        return len(self._labels)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` (from 0), from batch `start` on."""
        for chosen in self._order(number).split(self.batch_size)[start:]:
            images = self._images.index_select(0, chosen).to(torch.float32).div_(255)
            yield Batch(images, self._labels.index_select(0, chosen))

    def _order(self, epoch: int) -> Tensor:
        if self._seed is None:
            return torch.arange(self.images, device=self._labels.device)
        # An own generator: the order does not depend on what else draws random numbers.
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % (1 << 63))
        return torch.randperm(self.images, generator=generator).to(self._labels.device)
