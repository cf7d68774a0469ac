"""Training photographs of faces, each time seen a little differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from gdfast.data.augment import RandomErase, to_array, to_pillow
from gdfast.data.faces import FaceSet
from gdfast.data.loader import Batch
from gdfast.extras import require


@dataclass(frozen=True)
class Changes:
    """How far a view may stray from its photograph; 0 each leaves it as it is.

    `flip` is the chance of a mirror image. `degrees` turns it, either way; `shift` moves it, as a
    share of its size; `scale` enlarges or shrinks it by up to that factor less 1; `corners` moves
    each corner by itself, as a share of the size (perspective, as when a head turns). `contrast`
    and `brightness` scale and move the grey levels, as shares of their range; `shade` lights one
    side more than the other; `noise` is the deviation of each pixel, `blur` the largest radius in
    pixels. `erase` is the chance that a rectangle is covered.
    """

    flip: float = 0.5
    degrees: float = 10.0
    shift: float = 0.08
    scale: float = 0.15
    corners: float = 0.04
    contrast: float = 0.3
    brightness: float = 0.15
    shade: float = 0.3
    noise: float = 0.02
    blur: float = 0.0
    erase: float = 0.5

    def scaled(self, factor: float) -> Changes:
        """All of them so much stronger; chances stay at most 1."""
        values = {field.name: factor * getattr(self, field.name) for field in fields(self)}
        values["flip"] = self.flip if factor else 0.0
        return Changes(**values | {"erase": min(1.0, values["erase"])})


class FaceViews:
    """A source of views: an epoch shows every photograph `views` times, changed anew each time.

    It goes on with the first photographs until the last batch is whole: batch norm needs two images
    or more. Targets are the people, int64.
    """

    def __init__(
        self, photos: FaceSet, changes: Changes, *, views: int = 1, batch_size: int = 1
    ) -> None:
        self._photos = photos
        self._changes = changes
        self._length = -(-len(photos) * views // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def item(self, index: int, epoch: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """A view [H, W, C] of a photograph, and who it shows."""
        index %= len(self._photos)
        image = change(self._photos.images[index], self._changes, rng)
        return image, int(self._photos.people[index])

    def collate(self, items: Sequence[tuple[np.ndarray, int]]) -> Batch:
        """Views and people as one batch."""
        images, people = zip(*items, strict=True)
        return Batch(to_tensor(np.stack(images)), torch.tensor(people))


def with_mirrors(photos: FaceSet) -> FaceSet:
    """The photographs and their mirror images, which count as those of as many other people.

    No face is quite symmetric, so an embedding can tell a person from their mirror image, and with
    few people to learn from, twice as many teach it to look more closely.
    """
    others = photos.people + 1 + photos.people.max()
    return FaceSet(
        np.concatenate([photos.images, photos.images[:, :, ::-1]]),
        np.concatenate([photos.people, others]),
        photos.names + tuple(f"{name} mirrored" for name in photos.names),
    )


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Bytes [N, H, W, C] as float32 [N, C, H, W] in 0 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div_(255)


def change(image: np.ndarray, by: Changes, rng: np.random.Generator) -> np.ndarray:
    """A view of the photograph [H, W, C] bytes, of the same shape."""
    if rng.random() < by.flip:
        image = image[:, ::-1]
    image = _move(image, by, rng)
    if by.blur:
        image = _blur(image, by.blur * rng.random())
    image = _light(image, by, rng)
    return RandomErase(by.erase)(image, rng)


def _move(image: np.ndarray, by: Changes, rng: np.random.Generator) -> np.ndarray:
    """Turned, shifted, scaled and seen askew: four corners are taken from elsewhere."""
    height, width, _ = image.shape
    size = np.array([width, height], dtype=np.float64)
    turn = np.deg2rad(rng.uniform(-by.degrees, by.degrees))
    scale = np.exp(rng.uniform(-1, 1) * np.log1p(by.scale))
    shift = rng.uniform(-by.shift, by.shift, 2) * size
    askew = rng.uniform(-by.corners, by.corners, (4, 2)) * size
    corners = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) * size / 2  # as Pillow goes round
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    source = corners @ rotation.T * scale + shift + askew + size / 2
    # What comes in from outside goes on as the edge does: no black wedge tells how it was moved.
    edge = np.array([width, height]) // 3
    padded = np.pad(image, [(edge[1],) * 2, (edge[0],) * 2, (0, 0)], mode="edge")
    pillow = require("PIL.Image", "train", "moving images")
    moved = to_pillow(padded).transform(
        (width, height),
        pillow.Transform.PERSPECTIVE,
        _perspective(corners + size / 2, source + edge),
        pillow.Resampling.BILINEAR,
    )
    return to_array(moved)


def _perspective(corners: np.ndarray, source: np.ndarray) -> list[float]:
    """The eight numbers of the projection that takes each of four corners [4, 2] to its source."""
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solution: list[float] = np.linalg.solve(np.array(rows), np.array(values)).tolist()
    return solution


def _blur(image: np.ndarray, radius: float) -> np.ndarray:
    blur = require("PIL.ImageFilter", "train", "blurring images").GaussianBlur(radius)
    return to_array(to_pillow(image).filter(blur))


def _light(image: np.ndarray, by: Changes, rng: np.random.Generator) -> np.ndarray:
    height, width, _ = image.shape
    values = image.astype(np.float32)
    contrast = np.float32(np.exp(rng.uniform(-1, 1) * np.log1p(by.contrast)))
    brightness = np.float32(255 * rng.uniform(-by.brightness, by.brightness))
    mean = values.mean()
    values = (values - mean) * contrast + (mean + brightness)
    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * np.float32(np.cos(angle))
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None] * np.float32(np.sin(angle))
    values *= 1 + np.float32(rng.uniform(0, by.shade)) * (across + down)
    if by.noise:
        deviation = np.float32(255 * by.noise * rng.random())
        values += deviation * rng.standard_normal(values.shape, dtype=np.float32)
    return values.round().clip(0, 255).astype(np.uint8)
