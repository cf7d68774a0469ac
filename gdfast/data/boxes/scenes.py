"""Scenes of handwritten digits on textured grounds: detection with no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gdfast.data import digits
from gdfast.data.boxes.records import Detections, Record
from gdfast.data.images import Labelled
from gdfast.data.problems import Problems
from gdfast.extras import require

SIZE = 96
_TRAIN, _TEST = 1000, 200
_SEED = 20_160_606
_MOST_DIGITS = 5
_SIDES = (16, 36)  # of a digit's box, in pixels


def load(where: str, problems: Problems) -> Detections:
    """1,200 scenes of 96x96 pixels with 1 to 5 of scikit-learn's digits, the same ones always.

    The test scenes show digits that no training scene shows (`gdfast.data.digits` splits them).

    `where` and `problems` are there for the likeness of other readers.

    Raises:
        MissingExtraError: scikit-learn or Pillow is not installed.
    """
    data = digits.load()
    train = [_record("train", number, data.train) for number in range(_TRAIN)]
    test = [_record("test", number, data.test) for number in range(_TEST)]
    return Detections("scenes", train, test, data.classes, flips="none", problems=problems)


def _record(part: str, number: int, source: Labelled) -> Record:
    rng = np.random.default_rng((_SEED, part == "test", number))
    canvas = ground(SIZE, rng)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(rng.integers(1, _MOST_DIGITS + 1)):
        chosen = int(rng.integers(len(source)))
        ink = _ink(source.image(chosen)[:, :, 0], int(rng.integers(*_SIDES, endpoint=True)))
        height, width = ink.shape
        left, top = (int(rng.integers(0, SIZE - side + 1)) for side in (width, height))
        box = (left, top, left + width, top + height)
        if any(_touch(box, other) for other in boxes):
            continue  # a place is taken: one digit less
        _draw(canvas, ink, box, rng)
        boxes.append(box)
        labels.append(int(source.labels[chosen]))
    return Record(
        Path(f"scenes/{part}/{number}"),
        (SIZE, SIZE),
        np.array(boxes, dtype=np.float32),
        np.array(labels, dtype=np.int64),
        np.zeros(len(labels), dtype=bool),
        image=canvas.round().clip(0, 255).astype(np.uint8),
    )


def ground(size: int, rng: np.random.Generator) -> np.ndarray:
    """A texture [size, size, 3], float32 from 0 to 255: noise of several scales over a gradient."""
    pillow = require("PIL.Image", "train", "--data scenes")
    base = rng.uniform(40, 215, 3)
    texture = np.zeros((size, size, 3), dtype=np.float32)
    for cells, strength in ((2, 40.0), (5, 25.0), (17, 15.0), (size, 6.0)):
        grid = rng.normal(size=(cells, cells)).astype(np.float32)
        large = np.asarray(pillow.fromarray(grid).resize((size, size), pillow.Resampling.BICUBIC))
        texture += large[:, :, None] * (strength * rng.uniform(0.3, 1.0, 3)).astype(np.float32)
    return (texture + base.astype(np.float32)).clip(0, 255)


def _ink(digit: np.ndarray, side: int) -> np.ndarray:
    """The digit's strokes, cut out and scaled to `side` on the longer edge: [h, w], 0 to 1."""
    pillow = require("PIL.Image", "train", "--data scenes")
    rows, columns = ((digit > 80).any(axis).nonzero()[0] for axis in (1, 0))
    cut = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = side / max(cut.shape)
    height, width = (max(4, round(edge * scale)) for edge in cut.shape)
    large = pillow.fromarray(cut).resize((width, height), pillow.Resampling.BICUBIC)
    # Faint pixels around the strokes would show the box.
    return ((np.asarray(large, dtype=np.float32) / 255 - 0.15) / 0.7).clip(0, 1)


def _touch(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return min(one[2], other[2]) > max(one[0], other[0]) and min(one[3], other[3]) > max(
        one[1], other[1]
    )


def _draw(
    canvas: np.ndarray, ink: np.ndarray, box: tuple[int, int, int, int], rng: np.random.Generator
) -> None:
    left, top, right, bottom = box
    place = canvas[top:bottom, left:right]
    # Lighter or darker than what it stands on, whichever has room.
    bright = place.mean() < 128
    colour = rng.uniform(170, 255, 3) if bright else rng.uniform(0, 85, 3)
    place += (colour.astype(np.float32) - place) * ink[:, :, None]
