"""Annotated images as items to train on or to test with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gdfast.data.boxes.augment import GREY, Affine, Colour, Flip, Mixup, Mosaic, Turn, edges
from gdfast.data.boxes.records import Record, Sample
from gdfast.data.errors import DataError
from gdfast.data.loader import Batch
from gdfast.data.problems import Problems
from gdfast.extras import require

_CACHE_BYTES = 1 << 30
_MULTIPLE = 32  # the coarsest stride


@dataclass(frozen=True)
class Augmentation:
    """How a training image comes about: with probability `mosaic` of four others, else alone and
    with probability `mixup` blended with one more. From epoch `closed` on neither happens, so
    that the last epochs show whole images. `scale` is the most by which they grow or shrink."""

    flips: str = "horizontal"
    mosaic: float = 0.5
    mixup: float = 0.05
    closed: int = 0
    scale: float = 1.5


class BoxSource:
    """Items of records, each on a canvas (height, width), as the `Loader` draws them.

    An item is an index and a Sample; a batch has images [N, 3, H, W] and as targets a list of
    boxes [N, M, 4] in pixels of the canvas, classes [N, M] (-1 in rows that only fill up), and
    indices [N]. Without `augmentation`, images are letterboxed. Images are held scaled to the
    canvas, as bytes, as long as all of them take at most `cache` bytes; then `problems` has those
    that cannot be read.
    """

    def __init__(
        self,
        records: Sequence[Record],
        canvas: tuple[int, int],
        augmentation: Augmentation | None = None,
        *,
        cache: int = _CACHE_BYTES,
    ) -> None:
        self.records = records
        self.canvas = canvas
        self.augmentation = augmentation
        self.problems = Problems()
        self._held: dict[int, Sample] = {}
        self._usable: Sequence[int] = range(len(records))
        if sum(_fitted(record.size, canvas).bytes for record in records) <= cache:
            for index in range(len(records)):
                try:
                    self._held[index] = self._fit(index)
                except DataError as error:  # `item` meets it again, and the loader counts it
                    path = records[index].path
                    self.problems.add(path, str(error).removeprefix(f"data: {path}: "))
            self._usable = list(self._held)
        self._steps: list[Callable[[Sample, np.random.Generator], Sample]] = []
        if augmentation is not None:
            self._steps = _mirrors(augmentation.flips)

    def __len__(self) -> int:
        return len(self.records)

    def item(self, index: int, epoch: int, rng: np.random.Generator) -> tuple[int, Sample]:
        """Image `index`, augmented; raises DataError."""
        how = self.augmentation
        if how is None:
            return index, letterbox(self._get(index), self.canvas)
        opened = epoch < how.closed
        if opened and rng.random() < how.mosaic:
            samples = [self._mirrored(index, rng)]
            samples += [self._mirrored(other, rng) for other in self._others(3, rng)]
            # Only a part of each image shows: they are enlarged less, to show the more.
            sample = Mosaic(self.canvas, (1 / how.scale, how.scale**0.5))(samples, rng)
        else:
            affine = Affine(self.canvas, (1 / how.scale, how.scale))
            sample = affine(self._mirrored(index, rng), rng)
            if opened and rng.random() < how.mixup:
                (other,) = self._others(1, rng)
                sample = Mixup()((sample, affine(self._mirrored(other, rng), rng)), rng)
        return index, Colour()(sample, rng)

    def collate(self, items: Sequence[tuple[int, Sample]]) -> Batch:
        """Stack images; fill boxes up to the longest list."""
        most = max(len(sample.classes) for _, sample in items)
        boxes = np.zeros((len(items), most, 4), dtype=np.float32)
        classes = np.full((len(items), most), -1, dtype=np.int64)
        for row, (_, sample) in enumerate(items):
            boxes[row, : len(sample.boxes)] = sample.boxes
            classes[row, : len(sample.classes)] = sample.classes
        images = np.stack([sample.image for _, sample in items])
        return Batch(
            to_input(images),
            [
                torch.from_numpy(boxes),
                torch.from_numpy(classes),
                torch.tensor([index for index, _ in items]),
            ],
        )

    def _get(self, index: int) -> Sample:
        held = self._held.get(index)
        return self._fit(index) if held is None else held

    def _fit(self, index: int) -> Sample:
        return fit(self.records[index].read(), self.canvas)

    def _others(self, count: int, rng: np.random.Generator) -> list[int]:
        return [self._usable[int(at)] for at in rng.integers(len(self._usable), size=count)]

    def _mirrored(self, index: int, rng: np.random.Generator) -> Sample:
        sample = self._get(index)
        for step in self._steps:
            sample = step(sample, rng)
        return sample


def to_input(images: np.ndarray) -> torch.Tensor:
    """Bytes [N, H, W, 3] as a model's input [N, 3, H, W], float32 from 0 to 1, channels_last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).div_(255)


def canvas_for(records: Sequence[Record], longer: int) -> tuple[int, int]:
    """A canvas (height, width) whose longer side is `longer`, in the images' middle proportion;
    both are rounded up to multiples of 32."""
    ratio = float(np.median([record.size[0] / record.size[1] for record in records]))
    height, width = min(1.0, ratio) * longer, min(1.0, 1 / ratio) * longer
    return _rounded(height), _rounded(width)


def fit(sample: Sample, canvas: tuple[int, int]) -> Sample:
    """The sample scaled, in its proportions, to just fit a canvas (height, width)."""
    size = _fitted(sample.size, canvas)
    if sample.size == (size.height, size.width):
        return sample
    pillow = require("PIL.Image", "train", "scaling images")
    image = pillow.fromarray(np.ascontiguousarray(sample.image)).resize(
        (size.width, size.height), pillow.Resampling.BILINEAR
    )
    across, down = size.width / sample.size[1], size.height / sample.size[0]
    boxes = sample.boxes * edges(across, down)
    return Sample(np.asarray(image), boxes, sample.classes)


def letterbox(sample: Sample, canvas: tuple[int, int]) -> Sample:
    """The sample scaled to just fit a canvas (height, width), in its middle, on grey."""
    small = fit(sample, canvas)
    top, left = margins(sample.size, canvas)
    image = np.full((*canvas, 3), GREY, dtype=np.uint8)
    image[top : top + small.size[0], left : left + small.size[1]] = small.image
    return Sample(image, small.boxes + edges(left, top), small.classes)


def margins(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Rows above and columns left of an image of `size` (height, width) that is letterboxed."""
    small = _fitted(size, canvas)
    return (canvas[0] - small.height) // 2, (canvas[1] - small.width) // 2


def undo_letterbox(boxes: np.ndarray, size: tuple[int, int], canvas: tuple[int, int]) -> np.ndarray:
    """Boxes [M, 4] on the canvas in the pixels of the image of `size`, clipped to it."""
    height, width = size
    small = _fitted(size, canvas)
    top, left = margins(size, canvas)
    moved = (boxes - edges(left, top)) * edges(width / small.width, height / small.height)
    return moved.clip(0, edges(width, height))


@dataclass(frozen=True)
class _Fitted:
    height: int
    width: int

    @property
    def bytes(self) -> int:
        return 3 * self.height * self.width


def _fitted(size: tuple[int, int], canvas: tuple[int, int]) -> _Fitted:
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    sides = zip(size, canvas, strict=True)
    return _Fitted(*(max(1, min(round(own * scale), limit)) for own, limit in sides))


def _rounded(side: float) -> int:
    return max(_MULTIPLE, -int(-side // _MULTIPLE) * _MULTIPLE)


def _mirrors(flips: str) -> list[Callable[[Sample, np.random.Generator], Sample]]:
    steps: dict[str, list[Callable[[Sample, np.random.Generator], Sample]]]
    steps = {"none": [], "horizontal": [Flip()], "all": [Flip(), Turn()]}
    return steps[flips]
