"""Images and their boxes: what the readers give, and what augmentation works on."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gdfast.data import decode
from gdfast.data.problems import Problems

# Tools round, and cut objects off a little beyond the edge: that much of a side is clipped.
_BEYOND = 0.02
_COUNTED = 1 << 16  # bytes of a file, for a fingerprint
MOST_BOXES = 1000
"""Of one image: more are no annotation, and every one costs memory in training."""


@dataclass(frozen=True)
class Sample:
    """An image [H, W, 3] of bytes with its `boxes` [M, 4] (left, top, right, bottom, in pixels,
    float32) and their `classes` [M] (int64)."""

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True)
class Record:
    """One annotated image: a file, or `image` itself. `size` is its height and width.

    `boxes` [M, 4] and `classes` [M] as in `Sample`; those that are `ignored` [M] (difficult ones,
    crowds) are neither trained on nor judged. `crowds` [M] are those of them that hold any number
    of objects; None: no box does.
    """

    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray
    image: np.ndarray | None = field(default=None, repr=False)
    crowds: np.ndarray | None = None

    def read(self) -> Sample:
        """The image, decoded, and the boxes to train on.

        Raises:
            DataError: the image is missing, damaged, or of another size than the boxes are for.
        """
        image = decode.read(self.path) if self.image is None else self.image
        if image.shape[:2] != self.size:
            raise decode.DataError(
                f"data: {self.path}: expected {_size(self.size)} pixels as its annotation says, "
                f"found {_size(image.shape)}"
            )
        return Sample(image, self.boxes[~self.ignored], self.classes[~self.ignored])


@dataclass(frozen=True)
class Detections:
    """A data set for detection.

    `flips` says which mirror images of its objects are objects too: "none", "horizontal" or "all"
    (with quarter turns).
    """

    name: str
    train: Sequence[Record]
    test: Sequence[Record]
    classes: tuple[str, ...]
    flips: str = "horizontal"
    problems: Problems = field(default_factory=Problems)

    @property
    def epochs(self) -> int:
        """How many passes a training usually needs: 24,000 images, in 20 to 100 epochs."""
        return max(20, min(100, round(24_000 / max(1, len(self.train)))))

    def fingerprint(self) -> str:
        """SHA-256 over all boxes and images: two runs with the same one saw the same data.

        Of an image's file count its name, its length and its first 64 KiB: a change further on
        that keeps the length goes unseen. Of one in memory, all pixels count.
        """
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train, self.test):
            digest.update(repr(len(part)).encode())
            for record in part:
                if record.image is not None:
                    digest.update(np.ascontiguousarray(record.image).data)
                else:
                    digest.update(repr((record.path.name, *_begin(record.path))).encode())
                digest.update(repr((record.size, len(record.boxes))).encode())
                for values in (record.boxes, record.classes, record.ignored, record.crowds):
                    if values is not None:
                        digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def look_for_missing_classes(self, problems: Problems) -> None:
        """Note the classes of which one part has no box."""
        for part, records in (("training", self.train), ("testing", self.test)):
            seen = {int(label) for record in records for label in record.classes}
            for label, name in enumerate(self.classes):
                if label not in seen:
                    problems.add(Path(self.name), f"class {name}: no box for {part}", item=False)


def _begin(path: Path) -> tuple[int, str] | tuple[None, None]:
    """A file's length, and the SHA-256 of its first bytes; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            start = hashlib.sha256(file.read(_COUNTED))
            return os.fstat(file.fileno()).st_size, start.hexdigest()
    except (OSError, ValueError):
        return None, None


class Seen:
    """The image files met so far, whatever path led to them: each may be in one place alone, or
    training would see what is for testing."""

    def __init__(self) -> None:
        self._files: set[str] = set()

    def again(self, image: Path) -> bool:
        """Whether the file was met before."""
        try:
            file = os.path.realpath(image)
        except ValueError:  # a name that no file has
            file = str(image)
        if file in self._files:
            return True
        self._files.add(file)
        return False


class Boxes:
    """Collects one image's boxes, each checked as it comes."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._boxes: list[tuple[float, ...]] = []
        self._classes: list[int] = []
        self._ignored: list[bool] = []
        self._crowds: list[bool] = []

    def add(
        self, box: Sequence[float], label: int, *, ignored: bool = False, crowd: bool = False
    ) -> str | None:
        """Take a box (left, top, right, bottom in pixels), clipped if it is a little outside.
        Crowds are ignored.

        Returns what is wrong with a bad one, which is not taken.
        """
        height, width = self.size
        if len(self._boxes) >= MOST_BOXES:
            return f"more than {MOST_BOXES:,} boxes in one image"
        shown = "(" + ", ".join(f"{value:.6g}" for value in box) + ")"
        if not all(math.isfinite(value) for value in box):
            return f"box {shown}: expected finite numbers"
        left, top, right, bottom = box
        if right < left or bottom < top:
            return f"box {shown}: edges are swapped: expected left < right and top < bottom"
        for low, high, side in ((left, right, width), (top, bottom, height)):
            if low < -_BEYOND * side - 1 or high > (1 + _BEYOND) * side + 1:
                return f"box {shown}: outside the image of {_size(self.size)}"
        clipped = (max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height))
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            return EMPTY.format(shown)
        self._boxes.append(clipped)
        self._classes.append(label)
        self._ignored.append(ignored or crowd)
        self._crowds.append(crowd)
        return None

    def record(self, path: Path) -> Record:
        """The image with the boxes so far."""
        return Record(
            path,
            self.size,
            np.array(self._boxes, dtype=np.float32).reshape(-1, 4),
            np.array(self._classes, dtype=np.int64),
            np.array(self._ignored, dtype=bool),
            crowds=np.array(self._crowds, dtype=bool) if any(self._crowds) else None,
        )


EMPTY = "box {}: empty"


def is_empty(reason: str) -> bool:
    """Whether `Boxes.add` found a box without area: a slip that hides no object from training, so
    it alone is left out and not its image."""
    return reason.startswith("box ") and reason.endswith(": empty")


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"
