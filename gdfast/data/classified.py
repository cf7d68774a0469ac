"""Labelled images as a network wants them: of one size, augmented, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gdfast.data import augment
from gdfast.data.augment import Augmentation
from gdfast.data.images import Labelled
from gdfast.data.loader import Batch

# Of ImageNet's photographs, as public weights expect them (He et al., 2015, and all since).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MIXUP = 0.2  # Beta(a, a): most images keep nearly all of themselves (Zhang et al., 2017)
_MARGIN = 0.875  # of a photograph's shorter side, the middle that is looked at
_SMALL = 64  # below, images are brought to size whole


@dataclass(frozen=True)
class Shape:
    """What a model takes: `channels` 1 or 3, `size` (H, W), and whether values are normalised.

    Unnormalised values run from 0 to 1; normalised ones have ImageNet's mean 0 and deviation 1.
    """

    channels: int
    size: tuple[int, int]
    normalised: bool = False

    def fit(self, image: np.ndarray) -> np.ndarray:
        """The middle of an image, bytes [H, W, C], in this shape."""
        image = to_channels(image, self.channels)
        height, width = image.shape[:2]
        if (height, width) == self.size:
            return image
        if max(self.size) <= _SMALL:
            return augment.resize(image, self.size)
        scale = max(self.size[0] / height, self.size[1] / width) / _MARGIN
        high, wide = self.size[0] / scale, self.size[1] / scale
        top, left = (height - high) / 2, (width - wide) / 2
        return augment.resize(image, self.size, (left, top, left + wide, top + high))

    def to_tensor(self, images: Sequence[np.ndarray]) -> Tensor:
        """A batch [N, C, H, W] of images in this shape."""
        # channels_last already, as our kernels like it, but for grey images, where it is the same.
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        if not self.normalised:
            return batch
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
        if self.channels == 1:
            mean, std = mean.mean(1, keepdim=True), std.mean(1, keepdim=True)
        return batch.sub_(mean).div_(std)


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """An image, bytes [H, W, 1 or 3], with so many channels."""
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return (image @ augment.GREY).round().astype(np.uint8)[:, :, None]


class Classified:
    """Labelled images in one shape; for training, with random changes.

    With `mixup`, half of the images have a share of another one in them, and targets are shares of
    each class [N, classes]; else targets are labels [N].
    """

    def __init__(
        self,
        data: Labelled,
        shape: Shape,
        changes: Sequence[Augmentation] = (),
        *,
        mixup: bool = False,
        classes: int = 0,
    ) -> None:
        self.data = data
        self.shape = shape
        self.changes = list(changes)
        self.mixup = mixup
        self.classes = classes

    def __len__(self) -> int:
        return len(self.data)

    def item(
        self, index: int, epoch: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, tuple[int, int, float]]:
        """The image, and its label, another's, and the share of the first."""
        image, label = self._changed(index, rng), int(self.data.labels[index])
        if not self.mixup or rng.random() < 0.5:
            return image, (label, label, 1.0)
        other = int(rng.integers(len(self.data)))
        share = rng.beta(_MIXUP, _MIXUP)
        second = self._changed(other, rng)
        mixed = image.astype(np.float32) * share + second.astype(np.float32) * (1 - share)
        return mixed.round().astype(np.uint8), (label, int(self.data.labels[other]), share)

    def collate(self, items: Sequence[tuple[np.ndarray, tuple[int, int, float]]]) -> Batch:
        """Images [N, C, H, W] and their targets."""
        images = self.shape.to_tensor([image for image, _ in items])
        first, second, shares = zip(*(target for _, target in items), strict=True)
        labels = torch.tensor(first)
        if not self.mixup:
            return Batch(images, labels)
        share = torch.tensor(shares, dtype=torch.float32)[:, None]
        mixed = F.one_hot(labels, self.classes) * share
        mixed += F.one_hot(torch.tensor(second), self.classes) * (1 - share)
        return Batch(images, mixed)

    def _changed(self, index: int, rng: np.random.Generator) -> np.ndarray:
        image = self.data.image(index)
        if self.changes and isinstance(self.changes[0], augment.RandomResizedCrop):
            image = to_channels(image, self.shape.channels)
        else:
            image = self.shape.fit(image)
        return augment.apply(image, self.changes, rng)
