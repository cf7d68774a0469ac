"""Images of a data set, and what each augmentation makes of them, to look at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import gdfast.data
from gdfast.data import augment
from gdfast.data.classified import Classified, Shape
from gdfast.data.images import ImageSet

_SIDE = 160
# Of other tasks' data: gives rows of pictures for a spec, a number of columns and a seed.
Rows = Callable[[str, int, int], dict[str, list[np.ndarray]]]
OTHERS: dict[str, Rows] = {}


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
