"""Each augmentation alone on images of a data set, to look at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gdfast.data.boxes.augment import Affine, Colour, Flip, Mixup, Mosaic, Turn
from gdfast.data.boxes.records import Detections, Sample
from gdfast.data.boxes.source import Augmentation, BoxSource, letterbox


def examples(
    data: Detections, canvas: tuple[int, int], columns: int = 4, seed: int = 0
) -> dict[str, list[Sample]]:
    """`columns` samples of every augmentation by its name, and of what training sees; first the
    images as they are, letterboxed on a canvas (height, width).

    Raises:
        DataError: an image is bad.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(data.train))[: 2 * columns].tolist()
    samples = [letterbox(data.train[index].read(), canvas) for index in chosen]
    shown = [samples[at % len(samples)] for at in range(columns)]

    def others(count: int) -> list[Sample]:
        return [samples[int(at)] for at in rng.integers(len(samples), size=count)]

    alone: dict[str, Callable[[Sample, np.random.Generator], Sample]] = {
        "flip": Flip(),
        "turn": Turn(),
        "scale, shift": Affine(canvas),
        "colour": Colour(),
    }
    rows = {"as it is": shown}
    rows |= {name: [step(each, rng) for each in shown] for name, step in alone.items()}
    rows["mixup"] = [Mixup()([each, *others(1)], rng) for each in shown]
    rows["mosaic"] = [Mosaic(canvas)([each, *others(3)], rng) for each in shown]
    source = BoxSource(
        [data.train[index] for index in chosen], canvas, Augmentation(data.flips, closed=1)
    )
    rows["in training"] = [source.item(at % len(source), 0, rng)[1] for at in range(columns)]
    return rows
