"""Augmentation of images with boxes: each a callable `(sample, rng) -> sample`, usable alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gdfast.data.boxes.records import Sample
from gdfast.extras import require

GREY = 114
"""What shows where an image does not reach, of every channel."""

_SEEN = 0.4  # of a box's area must stay in sight, or the object is not recognised and is left out
_LEAST = 2.0  # pixels a side of a box, likewise


@dataclass(frozen=True)
class Flip:
    """Mirror left and right, with probability one half."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() < 0.5:
            return sample
        width = sample.size[1]
        boxes = sample.boxes.copy()
        boxes[:, [0, 2]] = width - sample.boxes[:, [2, 0]]
        return Sample(sample.image[:, ::-1], boxes, sample.classes)


@dataclass(frozen=True)
class Turn:
    """Turn by 0, 90, 180 or 270 degrees, each as often."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        turns = int(rng.integers(4))
        boxes, (height, width) = sample.boxes, sample.size
        for _ in range(turns):  # counter-clockwise: (x, y) goes to (y, width - x)
            left, top, right, bottom = boxes.T
            boxes = np.stack((top, width - right, bottom, width - left), axis=1)
            height, width = width, height
        return Sample(np.rot90(sample.image, turns), boxes, sample.classes)


@dataclass(frozen=True)
class Colour:
    """Change brightness, contrast, and how strong red, green and blue are: by up to these shares,
    each evenly drawn."""

    brightness: float = 0.25
    contrast: float = 0.25
    tint: float = 0.1

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        brightness, contrast, *tints = 1 + rng.uniform(-1, 1, 5) * (
            self.brightness, self.contrast, *[self.tint] * 3,
        )  # fmt: skip
        image = np.empty_like(sample.image)
        levels = (np.arange(256) - 128) * contrast + 128
        for channel, tint in enumerate(tints):
            table = (levels * (brightness * tint) + 0.5).clip(0, 255).astype(np.uint8)
            image[..., channel] = table[sample.image[..., channel]]
        return Sample(image, sample.boxes, sample.classes)


@dataclass(frozen=True)
class Affine:
    """Put the image, fitted to a canvas (height, width), there larger or smaller and elsewhere.

    The scale is drawn evenly from `scale` as a logarithm, each side stretched by up to
    `stretch` of itself, and the middle moved by up to `shift` of the canvas.
    """

    canvas: tuple[int, int]
    scale: tuple[float, float] = (0.67, 1.5)
    stretch: float = 0.1
    shift: float = 0.15

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = self.canvas
        fit = min(height / sample.size[0], width / sample.size[1])
        scale = fit * np.exp(rng.uniform(*np.log(self.scale)))
        across, down = scale * (1 + rng.uniform(-self.stretch, self.stretch, 2))
        x, y = (0.5 + rng.uniform(-self.shift, self.shift, 2)) * (width, height)
        x -= across * sample.size[1] / 2
        y -= down * sample.size[0] / 2
        return place(sample, self.canvas, (across, down), (x, y))


@dataclass(frozen=True)
class Mosaic:
    """Four images on one canvas (height, width), which meet at a point near its middle.

    The point is drawn from the middle `1 - 2 * border` of either side; each image is scaled as
    in `Affine` and shows a part of itself, drawn evenly.
    """

    canvas: tuple[int, int]
    scale: tuple[float, float] = (0.67, 1.22)
    border: float = 0.3

    def __call__(self, samples: Sequence[Sample], rng: np.random.Generator) -> Sample:
        height, width = self.canvas
        x, y = (
            round(each) for each in rng.uniform(self.border, 1 - self.border, 2) * (width, height)
        )
        image = np.full((height, width, 3), GREY, dtype=np.uint8)
        boxes, classes = [], []
        corners = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
        for sample, (left, top, right, bottom) in zip(samples, corners, strict=True):
            window = (bottom - top, right - left)
            fit = min(height / sample.size[0], width / sample.size[1])
            scale = fit * np.exp(rng.uniform(*np.log(self.scale)))
            room = [
                side - scale * own
                for side, own in ((window[1], sample.size[1]), (window[0], sample.size[0]))
            ]
            at = rng.uniform(np.minimum(room, 0), np.maximum(room, 0))
            part = place(sample, window, (scale, scale), (at[0], at[1]))
            image[top:bottom, left:right] = part.image
            boxes.append(part.boxes + edges(left, top))
            classes.append(part.classes)
        return Sample(image, np.concatenate(boxes), np.concatenate(classes))


@dataclass(frozen=True)
class Mixup:
    """Two images of one size, blended, with the boxes of both: "mixup" (Zhang et al., 2018).

    The share of each is drawn from Beta(8, 8), so that neither vanishes.
    """

    concentration: float = 8.0

    def __call__(self, samples: Sequence[Sample], rng: np.random.Generator) -> Sample:
        one, other = samples
        share = np.float32(rng.beta(self.concentration, self.concentration))
        blend = one.image * share + other.image * (1 - share)
        return Sample(
            (blend + 0.5).astype(np.uint8),
            np.concatenate((one.boxes, other.boxes)),
            np.concatenate((one.classes, other.classes)),
        )


def edges(x: float, y: float) -> np.ndarray:
    """What to multiply boxes [M, 4] by, or to add to them, to scale or move them by x and y."""
    return np.array((x, y, x, y), dtype=np.float32)


def place(
    sample: Sample,
    canvas: tuple[int, int],
    scale: tuple[float, float],
    at: tuple[float, float],
) -> Sample:
    """The sample scaled by `scale` (across, down), its corner `at` (x, y) of a grey canvas.

    Boxes are clipped to the canvas; those of which less than 40 % stays, or next to nothing, go.
    """
    pillow = require("PIL.Image", "train", "augmentation")
    height, width = canvas
    across, down = scale
    x, y = at
    image = pillow.fromarray(np.ascontiguousarray(sample.image)).transform(
        (width, height),
        pillow.Transform.AFFINE,
        (1 / across, 0, -x / across, 0, 1 / down, -y / down),
        resample=pillow.Resampling.BILINEAR,
        fillcolor=(GREY,) * 3,
    )
    moved = sample.boxes * edges(across, down) + edges(x, y)
    boxes = moved.clip(0, edges(width, height))
    sides = boxes[:, 2:] - boxes[:, :2]
    whole = (moved[:, 2:] - moved[:, :2]).prod(1)
    kept = (sides.min(1, initial=np.inf) >= _LEAST) & (sides.prod(1) >= _SEEN * whole)
    return Sample(np.asarray(image), boxes[kept], sample.classes[kept])
