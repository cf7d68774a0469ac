"""Images of a data set, and what each augmentation makes of them, to look at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import gdfast.data
from gdfast.data import augment, boxes, face_data
from gdfast.data.classified import Classified, Shape
from gdfast.data.face_views import Changes, change
from gdfast.data.images import ImageSet
from gdfast.train.detections import draw

_SIDE = 160
# Of other tasks' data: gives rows of pictures for a spec, a number of columns and a seed.
Rows = Callable[[str, int, int], dict[str, list[np.ndarray]]]


def rows(spec: str, columns: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Rows of `columns` images, bytes [H, W, C]: as they are, and under each augmentation.

    Raises:
        DataError: data of no known kind, or bad data.
    """
    kind = spec.partition(":")[0]
    if kind in OTHERS:
        return OTHERS[kind](spec, columns, seed)
    data = gdfast.data.load(spec).train
    chosen = np.random.default_rng(seed).choice(len(data), min(columns, len(data)), replace=False)
    if isinstance(data, ImageSet):
        channels, height, width = data.images.shape[1:]
        shape = Shape(channels, (height, width))
    else:
        shape = Shape(3, (_SIDE, _SIDE))
    drawn = {"as it is": [shape.fit(data.image(int(index))) for index in chosen]}
    changes = {name: [change] for name, change in augment.BY_NAME.items()}
    changes["resized crop"] = [augment.RandomResizedCrop(shape.size)]
    for name, each in changes.items():
        drawn[name] = [
            augment.apply(image, each, np.random.default_rng((seed, number)))
            for number, image in enumerate(drawn["as it is"])
        ]
    mixed = Classified(data, shape, mixup=True, classes=1 + int(data.labels.max()))
    drawn["mixup"] = [
        mixed.item(int(index), 0, np.random.default_rng((seed, int(index))))[0] for index in chosen
    ]
    return drawn


def _face_rows(spec: str, columns: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Photographs of people, and what training sees of them."""
    photos = face_data.load(spec, colour=True).photos
    rng = np.random.default_rng(seed)
    chosen = photos.images[rng.choice(len(photos), min(columns, len(photos)), replace=False)]
    views = {f"view {n}": [change(image, Changes(), rng) for image in chosen] for n in range(1, 6)}
    return {"as it is": list(chosen), **views}


def _box_rows(spec: str, columns: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Annotated images with their boxes."""
    data = boxes.load(spec)
    samples = boxes.examples(data, boxes.canvas_for(data.train, 2 * _SIDE), columns, seed)
    return {
        name: [draw(each.image, each.boxes, each.classes, data.classes) for each in row]
        for name, row in samples.items()
    }


OTHERS: dict[str, Rows] = {
    **dict.fromkeys(face_data.KINDS, _face_rows),
    **dict.fromkeys(boxes.KINDS, _box_rows),
}
