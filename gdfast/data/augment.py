"""Random changes of training images that leave what they show as it is.

Each takes an image, bytes [H, W, C], and a random generator, and gives a new one of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdfast.data.errors import DataError
from gdfast.extras import require

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]

GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class RandomFlip:
    """Mirror the image, left to right, with probability `p`."""

    p: float = 0.5

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.ascontiguousarray(image[:, ::-1]) if rng.random() < self.p else image


@dataclass(frozen=True)
class RandomAffine:
    """Turn by up to `degrees`, shift by up to a share `translate` of the size, scale by up to a
    share `scale`, and shear by up to `shear` degrees; what comes in from outside has the colour
    of the border."""

    degrees: float = 10.0
    translate: float = 0.08
    scale: float = 0.1
    shear: float = 5.0

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        angle, shear = np.radians(
            [rng.uniform(-self.degrees, self.degrees), rng.uniform(-self.shear, self.shear)]
        )
        scale = 1 + rng.uniform(-self.scale, self.scale)
        shift = rng.uniform(-self.translate, self.translate, 2) * (width, height)
        # Pillow wants where each pixel comes from: the inverse, about the centre.
        forward = scale * np.array(
            [
                [math.cos(angle), -math.sin(angle + shear)],
                [math.sin(angle), math.cos(angle + shear)],
            ]
        )
        back = np.linalg.inv(forward)
        centre = np.array([width, height]) / 2
        offset = centre - back @ (centre + shift)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        pillow = require("PIL.Image", "train", "RandomAffine")
        changed = to_pillow(image).transform(
            (width, height),
            pillow.Transform.AFFINE,
            (*back[0], offset[0], *back[1], offset[1]),
            pillow.Resampling.BILINEAR,
            fillcolor=_colour(np.median(border, axis=0)),
        )
        return to_array(changed)


@dataclass(frozen=True)
class RandomCrop:
    """Fill up by `pad` pixels of the border's kind on each side, then cut the old size out."""

    pad: int = 4

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        padded = np.pad(image, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)), mode="reflect")
        top, left = rng.integers(0, 2 * self.pad + 1, 2)
        return np.ascontiguousarray(padded[top:, left:][: image.shape[0], : image.shape[1]])


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut out a share `scale` of the area, with sides as 3 to 4 up to 4 to 3, and bring it to
    `size` [H, W]. After Szegedy et al. (2014)."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.25, 1.0)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        area = height * width * rng.uniform(*self.scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide = min(width, max(1, round(math.sqrt(area * ratio))))
        high = min(height, max(1, round(math.sqrt(area / ratio))))
        top = int(rng.integers(0, height - high + 1))
        left = int(rng.integers(0, width - wide + 1))
        return resize(image[top : top + high, left : left + wide], self.size)


@dataclass(frozen=True)
class ColourJitter:
    """Change brightness, contrast and (of coloured images) saturation by up to these shares."""

    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        bright, contrast, saturation = (
            1 + rng.uniform(-share, share)
            for share in (self.brightness, self.contrast, self.saturation)
        )
        values = image.astype(np.float32) * np.float32(bright)
        mean = values.mean()
        values = mean + (values - mean) * np.float32(contrast)
        if image.shape[2] == 3:
            grey = (values @ GREY)[..., None]
            values = grey + (values - grey) * np.float32(saturation)
        return values.round().clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class RandomErase:
    """With probability `p`, paint a rectangle of up to a share `area` of the image in its mean
    colour. After Zhong et al. (2017)."""

    p: float = 0.5
    area: float = 0.2

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() >= self.p:
            return image
        height, width = image.shape[:2]
        share = rng.uniform(0.02, self.area)
        ratio = math.exp(rng.uniform(math.log(1 / 3), math.log(3)))
        high = min(height, max(1, round(height * math.sqrt(share * ratio))))
        wide = min(width, max(1, round(width * math.sqrt(share / ratio))))
        top = int(rng.integers(0, height - high + 1))
        left = int(rng.integers(0, width - wide + 1))
        changed = image.copy()
        changed[top : top + high, left : left + wide] = image.mean((0, 1)).round()
        return changed


BY_NAME: dict[str, Augmentation] = {
    "affine": RandomAffine(),
    "flip": RandomFlip(),
    "crop": RandomCrop(),
    "jitter": ColourJitter(),
    "erase": RandomErase(),
}
MIXUP = "mixup"


def parse(names: str) -> tuple[list[Augmentation], bool]:
    """The augmentations of a list like "crop,flip", in its order, and whether "mixup" is in it.

    "none", or nothing, is an empty list.

    Raises:
        DataError: an unknown name.
    """
    wanted = [] if names in ("", "none") else names.split(",")
    for name in wanted:
        if name not in BY_NAME and name != MIXUP:
            known = ", ".join([*BY_NAME, MIXUP])
            raise DataError(f"data: augment: expected names of {known}, or none, got {name!r}")
    return [BY_NAME[name] for name in wanted if name != MIXUP], MIXUP in wanted


def apply(
    image: np.ndarray, changes: Sequence[Augmentation], rng: np.random.Generator
) -> np.ndarray:
    """The image after all changes, one after the other."""
    for change in changes:
        image = change(image, rng)
    return image


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """An image, bytes [H, W, C], brought to `size` [H, W] without regard to its proportions.

    With `box` (left, top, right, bottom, in pixels), what lies within it.
    """
    if image.shape[:2] == size and box is None:
        return image
    pillow = require("PIL.Image", "train", "resizing images")
    return to_array(to_pillow(image).resize(size[::-1], pillow.Resampling.BILINEAR, box))


def to_pillow(image: np.ndarray) -> Any:
    """Bytes [H, W, C] as a Pillow image."""
    pillow = require("PIL.Image", "train", "augmentation")
    return pillow.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def to_array(image: Any) -> np.ndarray:
    """A Pillow image, grey or in colour, as bytes [H, W, C]."""
    pixels = np.array(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _colour(values: np.ndarray) -> int | tuple[int, ...]:
    colour = tuple(int(value) for value in values)
    return colour[0] if len(colour) == 1 else colour
