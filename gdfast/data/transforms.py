"""Image transforms under the names that torchvision users know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ToTensor:
    """Image to float32 tensor [C, H, W] with values from 0 to 1.

    Takes a Pillow image or a numpy array [H, W] or [H, W, C]. Bytes are divided by 255; other
    types keep their values.

    Raises:
        TypeError: neither an image nor an array. ValueError: an array with other than 2 or 3
            dimensions.
    """

    # Data sets hand their arrays over without making a Pillow image of each first.
    takes_arrays = True

    def __call__(self, image: Any) -> Tensor:
        if not isinstance(image, np.ndarray):
            if not hasattr(image, "__array_interface__"):
                kind = type(image).__name__
                raise TypeError(f"ToTensor: image: expected a Pillow image or an array, got {kind}")
            image = np.array(image)
        if image.ndim not in (2, 3):
            raise ValueError(f"ToTensor: image: expected 2 or 3 dimensions, got {image.ndim}")
        values = torch.from_numpy(np.ascontiguousarray(image))
        values = values[None] if image.ndim == 2 else values.permute(2, 0, 1).contiguous()
        return values.to(torch.float32).div_(255) if values.dtype == torch.uint8 else values

    def __repr__(self) -> str:
        return "ToTensor()"


class Normalize:
    """Subtract a mean from, and divide by a standard deviation, each channel of [..., C, H, W].

    Raises:
        ValueError: a standard deviation of zero.
    """

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
        self.std = torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
        if (self.std == 0).any():
            raise ValueError("Normalize: std: expected values other than zero, got zero")

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean.to(image)) / self.std.to(image)

    def __repr__(self) -> str:
        return f"Normalize(mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()})"


class Compose:
    """Several transforms, one after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    @property
    def takes_arrays(self) -> bool:
        """Whether the first transform is content with an array."""
        return bool(self.transforms) and getattr(self.transforms[0], "takes_arrays", False)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image

    def __repr__(self) -> str:
        return f"Compose({self.transforms})"
